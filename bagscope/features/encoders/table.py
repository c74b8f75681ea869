"""The page docs/encoders.md, rendered from the registry, so that no fact stands in two places.

    python -m bagscope.features.encoders.table > docs/encoders.md

writes it anew; a test compares the page with what is rendered.
"""

from __future__ import annotations

import sys

from bagscope.features.encoders.registry import encoder_specs
from bagscope.features.encoders.spec import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EncoderSpec,
)

_KNOWN_CONSTANTS = {
    (IMAGENET_MEAN, IMAGENET_STD): "ImageNet",
    (CLIP_MEAN, CLIP_STD): "CLIP",
    (HALF, HALF): "½, ½",
}
_VECTORS = {
    "output": "pooled",
    "token": "class token",
    "token+mean": "class token ⊕ mean of patches",
    "mean": "mean of patches",
    "map": "mean of the map",
}
_HEADER = (
    "name", "encoder", "vector", "sees", "normalised by", "best tiles", "built by",
    "licence", "commercial use", "access asked for", "run with real weights here",
)  # fmt: skip

_BEFORE = """\
# Encoders

An encoder turns a tile into a vector. Its name stands for one embedding: where the same network
gives two (the class token alone, or beside the mean of the patch tokens), they have two names. What
changes a vector (network, weights, resize, crop, constants, pooling) goes into the fingerprint of
every feature file; the facts of the table below that only inform people don't.

This page is rendered from the registry by `python -m bagscope.features.encoders.table`.
`bagscope encoders list` shows the same in a terminal, `bagscope encoders check NAME` says whether
one works on this machine, `bagscope encoders fetch NAME --to DIR` prepares a machine without a
connection.

"""

_AFTER = """
- **sees**: the tile is resized to the first number and its centre cropped to the second; one number
  means that the whole tile is resized. Antialiased, by the method named.
- **best tiles**: edge and µm per pixel that the authors or most tools use; any other can be asked
  for.
- **built by**: *timm*, *transformers*, *open_clip* (the last two come with the extra `encoders`),
  *its repository* (code of the model's page, which runs only with `--trust-remote-code`), or *its
  package* (the message names the line to run).
- **licence**, **commercial use**, **access asked for**: of the weights, as far as known; "?" is not
  known. Read the card before you rely on it.
- **run with real weights here**: "not yet" means that the network was built and run without its
  weights: its size, tokens and vector were checked, its numbers were not.

Where tools differ, the authors' transform was taken; the module of each family in
`bagscope/features/encoders/` says where it could not be settled. Names of other tools are not
accepted, because they name several embeddings, but the right one is suggested.

## Weights

Weights are taken from `--weights DIR` (`DIR/<encoder>/<file>`, as `encoders fetch` lays them), else
from the hub's cache, else they are downloaded; with `HF_HUB_OFFLINE=1` nothing is. safetensors are
preferred; other checkpoints are read without running anything in them, and one that holds Python
code is refused. Every key and every shape has to fit.

## Any model of timm

`timm:MODEL`, such as `timm:resnet50.a1_in1k`: input, crop, constants, licence and weights are those
that timm states; the vector is what timm's own classifier would see.

## Your own checkpoint

`local:PATH` takes three things.

- A folder with `config.json` and `model.safetensors`, as timm saves a model for the hub.
- A folder with weights (`model.safetensors` or `pytorch_model.bin`) and an `encoder.yaml`.
- A checkpoint `NAME.pth` with a `NAME.yaml` beside it.

The YAML names a network of timm and what tiles go through. This is how a cytology transformer that
was trained with DINO, iBOT or DINOv2 (CytoFM and its kind) is used, here a ViT-B/16 in
`cytofm.pth`:

```yaml
{example}```

Options that are left out have defaults; the length of the vector and the number of class and
register tokens are measured on the network, and refused if they are given wrongly. Wrappers that
training leaves (`teacher`, `state_dict`, `module.`, `backbone.`, projection heads, DINOv2's own
names) are taken off. Further options are those of `EncoderSpec` in
`bagscope/features/encoders/spec.py`. Then:

```
bagscope extract STUDY --encoder local:weights/cytofm.pth
```

## Your own package

A package registers encoders through the entry point group `bagscope.encoders`: the entry point
names a module, which registers on import with `register_encoder`. Check it in your tests with
`bagscope.testing.check_encoder`.
"""

EXAMPLE_YAML = """\
architecture: vit_base_patch16_224   # as timm calls it
builder_args: {}                     # what timm.create_model gets besides
input_px: 224
interpolation: bicubic
mean: [0.485, 0.456, 0.406]
std: [0.229, 0.224, 0.225]
pooling: token                       # or token+mean, mean, map, output
licence: unknown
"""


def encoders_page() -> str:
    """Return docs/encoders.md."""
    rows = [_row(spec) for spec in encoder_specs().values()]
    lines = [_HEADER, ("---",) * len(_HEADER), *rows]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return _BEFORE + table + _AFTER.replace("{example}", EXAMPLE_YAML)


def _row(spec: EncoderSpec) -> tuple[str, ...]:
    title = spec.title or spec.name
    scaled = ", length 1" if spec.normalise else ""
    return (
        f"`{spec.name}`",
        f"[{title}]({spec.card})" if spec.card else title,
        f"{spec.dimension}, {_VECTORS[spec.pooling]}{scaled}",
        _sees(spec),
        _KNOWN_CONSTANTS.get((spec.mean, spec.std), "its own"),
        f"{spec.tile_px} px, {spec.mpp:g} µm",
        {"remote-code": "its repository", "package": "its package"}.get(spec.source, spec.source),
        spec.licence or "?",
        _yes(spec.commercial_use),
        _yes(spec.gated),
        "yes" if spec.run_here else "not yet",
    )


def _sees(spec: EncoderSpec) -> str:
    sizes = f"{spec.input_px}"
    if spec.resize_px is not None:
        sizes = f"{spec.resize_px} → {sizes}"
    return f"{sizes}, {spec.interpolation}"


def _yes(value: bool | None) -> str:
    return "?" if value is None else "yes" if value else "no"


if __name__ == "__main__":
    sys.stdout.write(encoders_page())
