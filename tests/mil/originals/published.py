"""Published models in plain torch, under their authors' names of the tensors and at their sizes.

Written from the formulas, for one bag at a time and without anything of bagscope. A model is the
shapes of its tensors and a function from its tensors and a bag (n, features) to its logits (C,).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published model.

    Attributes:
        shapes: of its tensors, by name.
        logits: of its tensors and a bag.
        settings: of ours that its tensors do not tell and that are not what its authors chose.
    """

    shapes: Shapes
    logits: Callable[[Weights, Tensor], Tensor]
    features: int = 1024
    settings: Mapping[str, Any] = field(default_factory=dict)


def random_weights(shapes: Shapes, seed: int = 0) -> dict[str, Tensor]:
    """Return float32 weights whose layers keep the size of what passes through them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("log"):  # decay rates of a state-space model, of every state
            found[name] = 0.1 * values + torch.arange(1.0, shape[1] + 1).log()
        elif len(shape) == 1:
            is_scale = name.endswith(("norm.weight", ".0.weight", ".D", ".D_b"))
            found[name] = 0.2 * values + float(is_scale)
        else:
            found[name] = values * (math.prod(shape[1:]) ** -0.5)
    return found


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """Return what a linear layer makes of x, with a bias where it has one."""
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def layer_norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Return x normalised over its last axis, scaled and shifted."""
    off = x - x.mean(-1, keepdim=True)
    off = off / (off.square().mean(-1, keepdim=True) + eps).sqrt()
    return off * w[f"{name}.weight"] + w[f"{name}.bias"]


def layer(name: str, width: int, out: int, *, bias: bool = True) -> Shapes:
    """Return the shapes of a linear layer."""
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    """Return the shapes of a layer norm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# --- attention pooling ----------------------------------------------------------------------


def gated(w: Weights, v: str, u: str | None, last: str, h: Tensor) -> Tensor:
    """Return a (n, K) of e = W (tanh(V h) ⊙ σ(U h)), one softmax over the bag for each column."""
    gate = linear(w, v, h).tanh()
    if u is not None:
        gate = gate * linear(w, u, h).sigmoid()
    return linear(w, last, gate).softmax(0)


def abmil(first: str, v: str, u: str | None, last: str, head: str, width: int) -> Published:
    """Return attention pooling of 1,024 → 512 tiles with gates of a width."""

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = linear(w, first, x).relu()
        return linear(w, head, (gated(w, v, u, last, h) * h).sum(0))

    shapes = layer(first, 1024, 512) | layer(v, 512, width) | layer(last, width, 1)
    shapes |= layer(head, 512, 2) | (layer(u, 512, width) if u else {})
    return Published(shapes=shapes, logits=logits)


def clam(width: int, classes: int, *, branches: bool, place: int = 3) -> Published:
    """Return CLAM; with branches, each class has its column of attention and its classifier."""
    first, net = "attention_net.0", f"attention_net.{place}.attention"
    names = (f"{net}_a.0", f"{net}_b.0", f"{net}_c")

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = linear(w, first, x).relu()
        pooled = gated(w, *names, h).T @ h
        if not branches:
            return linear(w, "classifiers", pooled[0])
        return torch.cat([linear(w, f"classifiers.{c}", pooled[c]) for c in range(classes)])

    shapes = layer(first, 1024, 512) | layer(names[0], 512, width) | layer(names[1], 512, width)
    shapes |= layer(names[2], width, classes if branches else 1)
    for c in range(classes):
        shapes |= layer(f"instance_classifiers.{c}", 512, 2)
        shapes |= layer(f"classifiers.{c}", 512, 1) if branches else {}
    return Published(
        shapes=shapes if branches else shapes | layer("classifiers", 512, classes), logits=logits
    )


def acmil_gated(branches: int = 5) -> Published:
    """Return ACMIL with gated attention: of the branches, the mean attention answers."""
    gates = [f"attention.attention_{name}" for name in ("V.0", "U.0", "weights")]

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = linear(w, "dimreduction.fc1", x).relu()
        a = gated(w, gates[0], gates[1], gates[2], h).mean(1)
        return linear(w, "Slide_classifier.fc", a @ h)

    shapes = layer("dimreduction.fc1", 1024, 512, bias=False) | layer(gates[0], 512, 128)
    shapes |= layer(gates[1], 512, 128) | layer(gates[2], 128, branches)
    shapes |= layer("Slide_classifier.fc", 512, 2)
    for m in range(branches):
        shapes |= layer(f"classifier.{m}.fc", 512, 2)
    return Published(shapes=shapes, logits=logits)


def acmil_multihead(branches: int = 5, heads: int = 8, width: int = 128) -> Published:
    """Return ACMIL with multi-head attention, at the width for vectors of 384."""

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = linear(w, "dimreduction.fc1", x).relu()
        attention = []
        for m in range(branches):
            own = f"sub_attention.{m}"
            q = linear(w, f"{own}.q_proj", w["q"][0, m]).view(heads, -1)
            k = linear(w, f"{own}.k_proj", h).view(len(h), heads, -1)
            e = torch.einsum("hd,nhd->nh", q, k) / math.sqrt(q.shape[1])
            attention.append(e.softmax(0))
        mean = torch.stack(attention).mean(0)
        v = linear(w, "bag_attention.v_proj", h).view(len(h), heads, -1)
        z = torch.einsum("nh,nhd->hd", mean, v).flatten()
        z = layer_norm(w, "bag_attention.layer_norm", linear(w, "bag_attention.out_proj", z), 1e-6)
        return linear(w, "Slide_classifier.fc", z)

    shapes = layer("dimreduction.fc1", 384, width, bias=False) | {"q": (1, branches, width)}
    for m in range(branches):
        own = f"sub_attention.{m}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= layer(f"{own}.{name}", width, width)
        shapes |= norm(f"{own}.layer_norm", width) | layer(f"classifier.{m}.fc", width, 2)
    shapes |= layer("bag_attention.v_proj", width, width) | norm("bag_attention.layer_norm", width)
    shapes |= layer("bag_attention.out_proj", width, width) | layer("Slide_classifier.fc", width, 2)
    return Published(shapes=shapes, logits=logits, features=384)


# --- two streams ----------------------------------------------------------------------------


def dsmil(classes: int, *, deep: bool = True, passing: bool = False) -> Published:
    """Return DSMIL on vectors of 512: likeness to each class's best tile."""
    bag, query = "b_classifier", "b_classifier.q.0" if deep else "b_classifier.q"

    def queries(w: Weights, x: Tensor) -> Tensor:
        q = linear(w, query, x)
        return linear(w, f"{bag}.q.2", q.relu()).tanh() if deep else q

    def logits(w: Weights, x: Tensor) -> Tensor:
        best = linear(w, "i_classifier.fc.0", x).argmax(0)
        v = linear(w, f"{bag}.v.1", x).relu() if passing else x
        q = queries(w, x)
        a = (q @ q[best].T / math.sqrt(128)).softmax(0)
        pooled = a.T @ v
        return torch.einsum("ocf,cf->o", w[f"{bag}.fcc.weight"], pooled) + w[f"{bag}.fcc.bias"]

    shapes = layer("i_classifier.fc.0", 512, classes) | layer(query, 512, 128)
    shapes |= layer(f"{bag}.q.2", 128, 128) if deep else {}
    shapes |= layer(f"{bag}.v.1", 512, 512) if passing else {}
    shapes |= {f"{bag}.fcc.weight": (classes, classes, 512), f"{bag}.fcc.bias": (classes,)}
    return Published(shapes=shapes, logits=logits, features=512)


# --- state spaces ---------------------------------------------------------------------------

_RATE, _STATES, _RANK, _INNER, _TAPS = 5, 16, 32, 1024, 4


def s6(w: Weights, own: str, end: str, xz: Tensor) -> Tensor:
    """Return y (n, inner) of x and z side by side: a convolution, then one state after another."""
    x, z = xz.chunk(2, 1)
    kernel, taps = w[f"{own}.conv1d{end}.weight"][:, 0], x.new_zeros(_TAPS - 1, _INNER)
    behind = torch.cat([taps, x])
    x = sum(behind[t : t + len(x)] * kernel[:, t] for t in range(_TAPS)) + 0.0
    x = functional.silu(x + w[f"{own}.conv1d{end}.bias"])
    step, b, c = linear(w, f"{own}.x_proj{end}", x).split([_RANK, _STATES, _STATES], 1)
    step = functional.softplus(linear(w, f"{own}.dt_proj{end}", step))
    rates = -w[f"{own}.A{end}_log"].exp()
    state, found = x.new_zeros(_INNER, _STATES), []
    for t in range(len(x)):
        state = (step[t, :, None] * rates).exp() * state
        state = state + (step[t] * x[t])[:, None] * b[t]
        found.append(state @ c[t])
    return (torch.stack(found) + w[f"{own}.D{end}"] * x) * functional.silu(z)


def in_strides(xz: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in SR-Mamba's order, filled up with zeros, and where each row went."""
    n = len(xz)
    steps = math.ceil(n / _RATE)
    place = torch.tensor([i % _RATE * steps + i // _RATE for i in range(n)])
    found = xz.new_zeros(steps * _RATE, xz.shape[1])
    found[place] = xz
    return found, place


def mambamil(ways: str, layers: int = 2) -> Published:
    """Return MambaMIL: plain, read backwards too (bi), or in strides too (sr)."""

    def mixed(w: Weights, own: str, h: Tensor) -> Tensor:
        xz = linear(w, f"{own}.in_proj", h)
        y = s6(w, own, "", xz)
        if ways == "bi":
            y = y + s6(w, own, "_b", xz.flip(0)).flip(0)
        if ways == "sr":
            other, place = in_strides(xz)
            y = y + s6(w, own, "_b", other)[place]
        return linear(w, f"{own}.out_proj", y)

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = functional.gelu(linear(w, "_fc1.0", x))
        for number in range(layers):
            own = f"layers.{number}"
            h = h + mixed(w, f"{own}.1", layer_norm(w, f"{own}.0", h))
        h = layer_norm(w, "norm", h)
        return linear(w, "classifier", (gated(w, "attention.0", None, "attention.2", h) * h).sum(0))

    shapes = layer("_fc1.0", 1024, 512) | norm("norm", 512) | layer("classifier", 512, 2)
    shapes |= layer("attention.0", 512, 128) | layer("attention.2", 128, 1)
    for number in range(layers):
        own = f"layers.{number}.1"
        shapes |= norm(f"layers.{number}.0", 512)
        shapes |= layer(f"{own}.in_proj", 512, 2 * _INNER, bias=False)
        shapes |= layer(f"{own}.out_proj", _INNER, 512, bias=False)
        for end in ("",) if ways == "plain" else ("", "_b"):
            shapes |= {
                f"{own}.conv1d{end}.weight": (_INNER, 1, _TAPS),
                f"{own}.conv1d{end}.bias": (_INNER,),
                f"{own}.A{end}_log": (_INNER, _STATES),
                f"{own}.D{end}": (_INNER,),
                **layer(f"{own}.x_proj{end}", _INNER, _RANK + 2 * _STATES, bias=False),
                **layer(f"{own}.dt_proj{end}", _RANK, _INNER),
            }
    settings = {"ways": "bi"} if ways == "bi" else {}
    return Published(shapes=shapes, logits=logits, settings=settings)


# --- Nyström attention ----------------------------------------------------------------------

_WIDTH, _HEADS, _LANDMARKS, _STEPS, _WINDOW = 512, 8, 256, 6, 33


def pseudo_inverse(s: Tensor) -> Tensor:
    """Return the pseudo-inverse (heads, m, m) after a few steps from one start for all heads."""
    unit = torch.eye(s.shape[-1], dtype=s.dtype)
    z = s.mT / (s.sum(-1).max() * s.sum(-2).max())
    for _ in range(_STEPS):
        product = s @ z
        z = z @ (13 * unit - product @ (15 * unit - product @ (7 * unit - product))) / 4
    return z


def nystrom(w: Weights, own: str, x: Tensor) -> Tensor:
    """Return attention through landmarks; zeros in front fill the rows up, as published."""
    n = len(x)
    run = math.ceil(n / _LANDMARKS)
    filled = torch.cat([x.new_zeros(run * _LANDMARKS - n, _WIDTH), x])
    qkv = linear(w, f"{own}.to_qkv", filled).view(len(filled), 3, _HEADS, -1).permute(1, 2, 0, 3)
    q, k, v = qkv[0] / math.sqrt(_WIDTH // _HEADS), qkv[1], qkv[2]
    means = [rows.unflatten(1, (_LANDMARKS, run)).mean(2) for rows in (q, k)]
    s1 = (q @ means[1].mT).softmax(-1)
    s2 = (means[0] @ means[1].mT).softmax(-1)
    s3 = (means[0] @ k.mT).softmax(-1)
    out = s1 @ pseudo_inverse(s2) @ (s3 @ v)
    kernel = w[f"{own}.res_conv.weight"][:, 0, :, 0]
    wide = functional.pad(v, (0, 0, _WINDOW // 2, _WINDOW // 2))
    out = out + sum(wide[:, t : t + len(filled)] * kernel[:, t, None, None] for t in range(_WINDOW))
    return linear(w, f"{own}.to_out.0", out.permute(1, 0, 2).flatten(1))[-n:]


def transmil() -> Published:
    """Return TransMIL, tiles in a square in stored order, its first ones again at the end."""

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = linear(w, "_fc1.0", x).relu()
        side = math.ceil(math.sqrt(len(h)))
        h = torch.cat([w["cls_token"][0], h, h[: side**2 - len(h)]])
        h = h + nystrom(w, "layer1.attn", layer_norm(w, "layer1.norm", h))
        square = h[1:].T.reshape(1, _WIDTH, side, side)
        placed = square + sum(
            functional.conv2d(
                square,
                w[f"pos_layer.{name}.weight"],
                w[f"pos_layer.{name}.bias"],
                padding=size // 2,
                groups=_WIDTH,
            )
            for name, size in (("proj", 7), ("proj1", 5), ("proj2", 3))
        )
        h = torch.cat([h[:1], placed.reshape(_WIDTH, -1).T])
        h = h + nystrom(w, "layer2.attn", layer_norm(w, "layer2.norm", h))
        return linear(w, "_fc2", layer_norm(w, "norm", h)[0])

    shapes = layer("_fc1.0", 1024, _WIDTH) | {"cls_token": (1, 1, _WIDTH)}
    for own in ("layer1", "layer2"):
        shapes |= norm(f"{own}.norm", _WIDTH)
        shapes |= layer(f"{own}.attn.to_qkv", _WIDTH, 3 * _WIDTH, bias=False)
        shapes |= layer(f"{own}.attn.to_out.0", _WIDTH, _WIDTH)
        shapes |= {f"{own}.attn.res_conv.weight": (_HEADS, 1, _WINDOW, 1)}
    for name, size in (("proj", 7), ("proj1", 5), ("proj2", 3)):
        shapes |= {f"pos_layer.{name}.weight": (_WIDTH, 1, size, size)}
        shapes |= {f"pos_layer.{name}.bias": (_WIDTH,)}
    shapes |= norm("norm", _WIDTH) | layer("_fc2", _WIDTH, 2)
    return Published(shapes=shapes, logits=logits)


# --- pseudo-bags, and tiles before they are pooled ------------------------------------------


def dtfd(classes: int = 2, width: int = 128, groups: int = 4) -> Published:
    """Return DTFD-MIL that distils pseudo-bags' vectors (AFS), dealt in stored order."""
    gates = ("attention_V.0", "attention_U.0", "attention_weights")
    first, second = "attention", "att_classifier.attention"

    def pooled(w: Weights, own: str, h: Tensor) -> Tensor:
        names = [f"{own}.{gate}" for gate in gates]
        return (gated(w, names[0], names[1], names[2], h) * h).sum(0)

    def logits(w: Weights, x: Tensor) -> Tensor:
        h = linear(w, "dim_reduction.fc1", x).relu()
        distilled = torch.stack([pooled(w, first, part) for part in h.tensor_split(groups)])
        return linear(w, "att_classifier.classifier.fc", pooled(w, second, distilled))

    shapes = layer("dim_reduction.fc1", 1024, 512, bias=False) | layer(
        "classifier.fc", 512, classes
    )
    shapes |= layer("att_classifier.classifier.fc", 512, classes)
    for own in (first, second):
        shapes |= layer(f"{own}.{gates[0]}", 512, width) | layer(f"{own}.{gates[1]}", 512, width)
        shapes |= layer(f"{own}.{gates[2]}", width, 1)
    return Published(shapes=shapes, logits=logits, settings={"split": "stored"})


def packmil_downsampler(classes: int = 2) -> Published:
    """Return PackMIL around attention pooling, tiles through its downsampler, none compressed."""

    def logits(w: Weights, x: Tensor) -> Tensor:
        own = "downsampler"
        e = linear(w, f"{own}.attention.2", linear(w, f"{own}.attention.0", x).tanh())
        x = x + e.softmax(0) * x
        x = linear(w, f"{own}.downsample", functional.gelu(linear(w, f"{own}.embed.0", x)))
        h = functional.gelu(linear(w, "mil.embed.0", x))
        net = "mil.aggregate.attention"
        return linear(w, "predictor", (gated(w, f"{net}.0", None, f"{net}.2", h) * h).sum(0))

    shapes = layer("downsampler.attention.0", 1024, 128) | layer("downsampler.attention.2", 128, 1)
    shapes |= layer("downsampler.embed.0", 1024, 1024) | layer("downsampler.downsample", 1024, 1024)
    shapes |= layer("mil.embed.0", 1024, 512) | layer("mil.aggregate.attention.0", 512, 128)
    shapes |= layer("mil.aggregate.attention.2", 128, 1) | layer("predictor", 512, classes)
    return Published(shapes=shapes, logits=logits)


_HIPPO = "attention_weights"
_LAB = "global_attn"
PUBLISHED: Mapping[str, tuple[str, Published]] = {
    "clam-sb-small": ("clam-sb", clam(256, 2, branches=False)),
    "clam-sb-big": ("clam-sb", clam(384, 3, branches=False)),
    "clam-sb-without-dropout": ("clam-sb", clam(256, 2, branches=False, place=2)),
    "clam-mb-small": ("clam-mb", clam(256, 2, branches=True)),
    "clam-mb-big": ("clam-mb", clam(384, 3, branches=True)),
    "hippo-gated": (
        "hippo-gated",
        abmil(
            "encoder.0",
            f"{_HIPPO}.attention_V.0",
            f"{_HIPPO}.attention_U.0",
            f"{_HIPPO}.attention_weights",
            "head",
            384,
        ),
    ),
    "hippo-tanh": (
        "hippo-tanh",
        abmil("encoder.0", f"{_HIPPO}.0", None, f"{_HIPPO}.2", "head", 384),
    ),
    "millab-gated": (
        "millab-gated",
        abmil(
            "patch_embed.0",
            f"{_LAB}.attention_a.0",
            f"{_LAB}.attention_b.0",
            f"{_LAB}.attention_c",
            "classifier",
            384,
        ),
    ),
    "millab-tanh": (
        "millab-tanh",
        abmil("patch_embed.0", f"{_LAB}.module.0", None, f"{_LAB}.module.3", "classifier", 384),
    ),
    "acmil-ga": ("acmil-ga", acmil_gated()),
    "acmil-ga-single": ("acmil-ga", acmil_gated(1)),
    "acmil-mha": ("acmil-mha", acmil_multihead()),
    "dsmil": ("dsmil", dsmil(2)),
    "dsmil-single": ("dsmil", dsmil(1)),
    "dsmil-linear": ("dsmil", dsmil(3, deep=False)),
    "dsmil-passing": ("dsmil", dsmil(2, passing=True)),
    "mambamil-plain": ("mambamil", mambamil("plain")),
    "mambamil-bi": ("mambamil", mambamil("bi")),
    "mambamil-sr": ("mambamil", mambamil("sr")),
    "transmil": ("transmil", transmil()),
    "dtfd": ("dtfd", dtfd()),
    "packmil-downsampler": ("packmil-downsampler", packmil_downsampler()),
}
"""By name: the original, and a model of it."""
