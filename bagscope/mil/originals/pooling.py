"""Attention, CLAM, ACMIL and pooling of single tiles, as their authors name the layers."""

from __future__ import annotations

from bagscope.mil.originals.mapping import Original

_ATTENTION = ("attention.projection", "attention.v", "attention.u", "attention.w", "classifier")
_BRANCHED = tuple(f"branches.{name}" for name in _ATTENTION[:4])


def _attention(
    projection: str, v: str, u: str | None, w: str, classifier: str, **options: str
) -> Original:
    theirs = (projection, v, u, w, classifier)
    pairs = zip(theirs, _ATTENTION, strict=True)
    layers = {name: ours for name, ours in pairs if name}
    return Original(aggregator="abmil", layers=layers, options=options)


def _clam(aggregator: str, classifier: str) -> Original:
    layers = {"attention_net.0": "attention.projection", classifier: "classifier"}
    # Without dropout, earlier versions have one module less before the attention.
    for net in ("attention_net.3.attention", "attention_net.2.attention"):
        layers |= dict(zip((f"{net}_a.0", f"{net}_b.0", f"{net}_c"), _ATTENTION[1:4], strict=True))
    return Original(
        aggregator=aggregator,
        layers={
            **layers,
            "instance_classifiers.*": "instance_loss.classifier",
        },
        left_out=frozenset({"instance_loss_fn.labels"}),
    )


_GATES = ("attention.attention_V.0", "attention.attention_U.0", "attention.attention_weights")
_HEADS = {"classifier.*.fc": "branch_classifier", "Slide_classifier.fc": "classifier"}
_MHIM = "online_encoder.attention.attention"
_HIPPO = "attention_weights"

ORIGINALS: dict[str, Original] = {
    "acmil-ga": Original(
        aggregator="acmil",
        layers={**dict(zip(("dimreduction.fc1", *_GATES), _BRANCHED, strict=True)), **_HEADS},
    ),
    "acmil-mha": Original(
        aggregator="acmil",
        layers={
            "dimreduction.fc1": "branches.projection",
            "q": "branches.scores.query",
            "sub_attention.*.q_proj": "branches.scores.ask",
            "sub_attention.*.k_proj": "branches.scores.key",
            "sub_attention.*.v_proj": "branches.each.value",
            "sub_attention.*.out_proj": "branches.each.out",
            "sub_attention.*.layer_norm": "branches.each.norm_",
            "bag_attention.v_proj": "branches.together.value",
            "bag_attention.out_proj": "branches.together.out",
            "bag_attention.layer_norm": "branches.together.norm_",
            **_HEADS,
        },
        options={"heads": 8},
    ),
    "aem-abmil": _attention("dimreduction.fc1", *_GATES, "classifier.fc"),
    "clam-mb": _clam("clam_mb", "classifiers.*"),
    "clam-sb": _clam("clam_sb", "classifiers"),
    "hippo-gated": _attention(
        "encoder.0",
        f"{_HIPPO}.attention_V.0",
        f"{_HIPPO}.attention_U.0",
        f"{_HIPPO}.attention_weights",
        "head",
    ),
    "hippo-tanh": _attention("encoder.0", f"{_HIPPO}.0", None, f"{_HIPPO}.2", "head"),
    "mambamil-max": Original(
        aggregator="max",
        layers={"head.0": "network.projection", "head.3": "network.classifier"},
    ),
    "mambamil-mean": Original(
        aggregator="mean",
        layers={"head.0": "network.projection", "head.3": "network.classifier"},
    ),
    "mhim-abmil": _attention(
        "feature.0",
        f"{_MHIM}.0",
        None,
        f"{_MHIM}.2",
        "predictor",
        activation="gelu",
        gate="relu",
    ),
    "millab-gated": _attention(
        "patch_embed.0",
        "global_attn.attention_a.0",
        "global_attn.attention_b.0",
        "global_attn.attention_c",
        "classifier",
    ),
    "millab-tanh": _attention(
        "patch_embed.0", "global_attn.module.0", None, "global_attn.module.3", "classifier"
    ),
    "mnist-gated": _attention(
        "feature_extractor_part2.0",
        "attention_V.0",
        "attention_U.0",
        "attention_w",
        "classifier.0",
    ),
    "mnist-tanh": _attention(
        "feature_extractor_part2.0", "attention.0", None, "attention.2", "classifier.0"
    ),
    "packmil-abmil": _attention(
        "feature.0", "attention.0", None, "attention.2", "classifier", activation="gelu"
    ),
}
