"""CLAM with a single branch (Lu et al. 2021): gated attention, and a loss on the tiles it chooses.

h = relu(W x + b),  e = w·(tanh(V h) ⊙ σ(U h)) + c,  a = softmax of e over the bag
z = Σ a h,  logits = Linear(z);  the loss on tiles: see instance_loss.py
"""

from __future__ import annotations

from torch import nn
from torch.nn import functional

from bagscope.mil.aggregators.clam import CLAMOptions, attention_of, instance_loss_of
from bagscope.mil.aggregators.registry import Aggregator, register
from bagscope.mil.bags import BagOutput, Bags, PoolingTerms


@register(
    "clam_sb",
    CLAMOptions,
    summary="attention pooling with a loss on the most and least attended tiles",
    reference="Lu et al., Data-efficient and weakly supervised computational pathology on "
    "whole-slide images, Nature Biomedical Engineering 2021",
)
class CLAMSB(Aggregator):
    """One attention for all classes."""

    label_terms = ("instance",)

    def __init__(self, features: int, outputs: int, options: CLAMOptions) -> None:
        super().__init__()
        self.attention = attention_of(features, 1, options)
        self.classifier = nn.Linear(options.hidden, outputs)
        self.instance_loss = instance_loss_of(outputs, options)

    def forward(self, bags: Bags) -> BagOutput:
        """Return the logits, and the loss "instance" where the classes are known."""
        found = self.attention(bags)
        embedding = found.pooled[:, 0]
        loss = self.instance_loss(bags, found.scores, self.attention)
        return BagOutput(
            logits=self.classifier(embedding),
            embedding=embedding,
            scores=found.scores,
            score_kind="log_weight",
            entropy=found.entropy,
            losses={} if loss is None else {"instance": loss},
        )

    def pooling_terms(self, bags: Bags) -> PoolingTerms:
        """Return each tile's score and its class logits at weight 1."""
        weight, bias = self.classifier.weight, self.classifier.bias
        h = self.attention.projected(bags.features.to(weight.dtype))
        return PoolingTerms(
            scores=self.attention(bags).scores,
            values=functional.linear(h, weight)[:, None],
            bias=bias,
        )
