"""CLAM with a branch per class (Lu et al. 2021): every class has an attention of its own.

h = relu(W x + b),  e_c = w_c·(tanh(V h) ⊙ σ(U h)) + d_c,  a_c = softmax of e_c over the bag
z_c = Σ a_c h,  logit_c = Linear_c(z_c);  the loss on tiles: see instance_loss.py
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from bagscope.mil.aggregators.clam import CLAMOptions, attention_of, instance_loss_of
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms


@register(
    "clam_mb",
    CLAMOptions,
    summary="as clam_sb, with an attention for every class",
    reference="Lu et al., Data-efficient and weakly supervised computational pathology on "
    "whole-slide images, Nature Biomedical Engineering 2021",
)
class CLAMMB(Aggregator):
    """One attention for each class; its scores have a column per class."""

    label_terms = ("instance",)

    def __init__(self, features: int, outputs: int, options: CLAMOptions) -> None:
        super().__init__()
        self.attention = attention_of(features, outputs, options)
        self.classifier = nn.Linear(options.hidden, outputs)
        self.instance_loss = instance_loss_of(outputs, options)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits, and the loss "instance" where the classes are known."""
        found = self.attention(bags)
        weight, bias = self.classifier.weight, self.classifier.bias
        loss = self.instance_loss(bags, found.scores, self.attention)
        return BagOutput(
            logits=(found.pooled * weight).sum(-1) + bias,
            embedding=found.pooled.flatten(1),
            scores=found.scores,
            score_kind="log_weight",
            entropy=found.entropy,
            losses={} if loss is None else {"instance": loss},
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's scores and its logits at weight 1; column c adds to logit c alone."""
        weight, bias = self.classifier.weight, self.classifier.bias
        h = self.attention.projected(bags.features.to(weight.dtype))
        return PoolingTerms(
            scores=self.attention(bags).scores,
            values=torch.diag_embed(functional.linear(h, weight)),
            bias=bias,
        )
