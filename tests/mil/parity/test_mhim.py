"""MHIM's masks, tokens and steps are those that the original recorded, with its draws given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bagscope.mil.bags import Bags, PoolingTerms
from bagscope.mil.originals.mapping import Original
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes import mhim
from bagscope.mil.regimes.masks import HIGH, RANDOM, MaskSpec, masked_tiles, ranked_share
from bagscope.mil.regimes.mhim import MHIM, class_aware_scores, consistency
from bagscope.mil.regimes.recycle import Recycle, RecycleSpec
from bagscope.mil.regimes.registry import build_model
from tests.kernels.packed import assert_close_to_float64, borders, vectors
from tests.mil.parity.recorded import RELATIVE, ZERO

RECYCLE = {
    "norm": "norm",
    "attn.to_q": "ask",
    "attn.to_kv": "key_value",
    "attn.to_out.0": "out",
    "global_q": "query",
}
TWICE = ("global_q_mm", "merge.global_q_mm")
ATTENTION = "online_encoder.attention.attention"
STUDENT = {
    "feature.0": "embedding",
    f"{ATTENTION}.0": "aggregator.attention.v",
    f"{ATTENTION}.2": "aggregator.attention.w",
    "predictor": "aggregator.classifier",
}


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of parameters below a prefix, without it.

    The queries are there twice, and the same.
    """
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    return {name: found[name] for name in found if name not in ("x", *TWICE)}


def ours_of(
    layers: Mapping[str, str], theirs: Mapping[str, Tensor], ours: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the original's tensors under our names and in our shapes."""
    return Original(aggregator="mhim", layers=layers).renamed("mhim", theirs, ours)


def numbers_of(permutation: Tensor, candidates: Tensor, tiles: int) -> Tensor:
    """Return draws (tiles,) by which candidates come in the order of a recorded permutation."""
    numbers = torch.full((tiles,), torch.inf, dtype=torch.float64)
    numbers[candidates[permutation]] = torch.arange(len(permutation)).double()
    return numbers


def test_masks() -> None:
    tensors, meta = vectors("mhim_masks_A")
    scores, tiles = tensors["input/scores"], meta["config"]["n"]
    rising, falling = scores.argsort(), scores.argsort(descending=True)
    compared = 0
    for name, options in meta["config"]["strategies"].items():
        if name.startswith("vote"):
            continue
        spec = MaskSpec(
            high=options["h"],
            high_within=options["hr"],
            random=options.get("r", 0.0),
            low=options.get("l", 0.0),
        )
        uses = [(RANDOM, rising)] if spec.random else []
        uses += [(HIGH, falling)] if spec.high_within < 1 else []
        draws = {
            use: numbers_of(tensors[f"input/{name}_permutation{place}"], candidates, tiles)
            for place, (use, candidates) in enumerate(uses)
        }
        drawn: list[int] = []

        def draw(use: int, draws: Any = draws, drawn: Any = drawn) -> Tensor:
            drawn.append(use)
            return draws.get(use, torch.zeros(tiles).double())

        found = masked_tiles(scores[:, None], borders([tiles]), spec, draw)
        assert torch.equal(found.nonzero()[:, 0], tensors[f"output/{name}_masked"])
        assert torch.equal((~found).nonzero()[:, 0], tensors[f"output/{name}_kept"])
        assert set(draws) <= set(drawn)
        compared += 1
    assert compared == 6


@pytest.mark.parametrize("end", ["high", "low"])
def test_heads_vote(end: str) -> None:
    tensors, meta = vectors("mhim_masks_A")
    votes = tensors[f"output/vote-{end}_votes"]
    wanted = tensors[f"output/vote-{end}_masked"]
    found = ranked_share(
        tensors["input/scores_heads"].T,
        borders([len(votes)]),
        meta["config"]["strategies"][f"vote-{end}"]["ratio"],
        lowest=end == "low",
    )
    # Which of equally many votes is taken, the original leaves open.
    assert torch.equal(votes[found].sort().values, votes[wanted].sort().values)


def test_class_aware_score() -> None:
    tensors, _ = vectors("mhim_class-aware-score_A")
    features = tensors["input/features"]
    terms = PoolingTerms(
        scores=tensors["input/attention"].log()[:, None],
        values=functional.linear(features, tensors["weights/weight"])[:, None],
        bias=tensors["weights/bias"],
    )
    found = class_aware_scores(terms, borders([len(features)]))
    assert_close_to_float64(found[:, 0], tensors["output/score"], rtol=RELATIVE)


def test_consistency() -> None:
    tensors, meta = vectors("mhim_consistency-loss_A")
    for tau in meta["config"]["taus"]:
        student = tensors["input/student"].clone().requires_grad_()
        found = consistency(
            student,
            tensors["input/teacher"],
            temperature=tau,
            student_temperature=meta["config"]["student_temperature"],
        ).mean()
        found.backward()
        assert student.grad is not None
        assert_close_to_float64(found, tensors[f"output/loss_tau{tau}"], rtol=RELATIVE)
        assert_close_to_float64(student.grad, tensors[f"grad/student_tau{tau}"], rtol=RELATIVE)


@pytest.mark.parametrize("variant", ["k1", "k5"])
def test_global_recycle(variant: str) -> None:
    tensors, meta = vectors(f"mhim_global-recycle-{variant}_A")
    config, uniforms = meta["config"], tensors["input/uniforms"]
    spec = RecycleSpec(
        queries=config["k"],
        keep=config["keep_ratio"],
        heads=config["heads"],
        head=config["head_dim"],
        momentum=config["momentum"],
        dropout=config["dropout"],
    )
    model = Recycle(config["dim"], spec).train()
    model.load_state_dict(ours_of(RECYCLE, named(tensors, "weights/"), model.state_dict()))
    x = tensors["input/x"].clone().requires_grad_()
    found = model(Bags.of([x]), uniforms)
    # Ours leaves the tiles that stay in their order; the original shuffles them.
    kept = int(spec.keep * len(x))
    shuffled = uniforms.argsort()[:kept].argsort().argsort()
    tokens = torch.cat([found.features[:kept][shuffled], found.features[kept:]])
    assert_close_to_float64(tokens, tensors["output/out"], rtol=RELATIVE)
    assert_close_to_float64(tokens[kept:], tensors["output/recycled"], rtol=RELATIVE)
    loss = (tokens * tensors["input/cotangent"]).sum()
    assert_close_to_float64(loss, tensors["output/loss_total"], rtol=RELATIVE)
    loss.backward()
    grads = {name: weight.grad for name, weight in model.named_parameters()}
    wanted = ours_of(RECYCLE, named(tensors, "grad/"), grads)
    for name, grad in grads.items():
        assert grad is not None
        assert_close_to_float64(grad, wanted[name], rtol=RELATIVE, atol=ZERO, what=name)
    assert x.grad is not None
    assert_close_to_float64(x.grad, tensors["grad/x"], rtol=RELATIVE)
    assert_close_to_float64(model.query, tensors["weights/global_q"][0], rtol=0.0)
    model.after_step()
    assert_close_to_float64(model.query, tensors["output/query_after"], rtol=RELATIVE)


@pytest.mark.parametrize("variant", ["v1-step-attention", "v2-step-scored"])
def test_step(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, meta = vectors(f"mhim_{variant}_A")
    config = meta["config"]
    recycle = None
    if config["recycle"]:
        recycle = {
            "queries": config["merge_k"],
            "keep": config["keep_ratio"],
            "heads": config["merge_heads"],
            "head": config["merge_head_dim"],
            "dropout": 0.0,
        }
    regime = {
        "embedding": {
            "width": config["hidden"],
            "activation": config["activation"],
            "dropout": 0.0,
        },
        "masks": {
            "high": config["beta_h"],
            "high_within": config["hr"],
            "random": config["beta_r"],
        },
        "score": "class_aware" if "scored" in variant else "attention",
        "temperature": config["tau_t"],
        "recycle": recycle,
    }
    attention = {
        "projection": False,
        "attention": config["attention_hidden"],
        "gate": config["da_act"],
        "attention_bias": False,
    }
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {"name": "abmil", "options": attention},
            "regime": {"name": "mhim", "options": regime},
        }
    )
    model = build_model(recipe, config["in_features"], config["n_classes"]).train()
    assert isinstance(model, MHIM)
    layers = {theirs: f"inner.{ours}" for theirs, ours in STUDENT.items()}
    if model.recycle is not None:
        layers |= {f"merge.{theirs}": f"recycle.{ours}" for theirs, ours in RECYCLE.items()}
        draws = {3: tensors["input/draw0"]}
    else:
        rising = tensors["input/teacher_score"].argsort()
        draws = {RANDOM: numbers_of(tensors["input/draw0"], rising, len(rising))}
    teacher = {
        name: tensor
        for name, tensor in named(tensors, "input/teacher/").items()
        if not name.startswith("merge.")
    }
    model.teacher.load_state_dict(ours_of(STUDENT, teacher, model.teacher.state_dict()))
    ours = {n: t for n, t in model.state_dict().items() if not n.startswith("teacher.")}
    missing = model.load_state_dict(
        ours_of(layers, named(tensors, "weights/"), ours), strict=False
    ).missing_keys
    assert all(name.startswith("teacher.") for name in missing)
    shown: list[int] = []

    def draw(bags: Bags, use: int) -> Tensor:
        shown.append(use)
        return draws.get(use, torch.zeros(len(bags.features)))

    monkeypatch.setattr(mhim, "uniforms", draw)
    x = tensors["input/x"].clone().requires_grad_()
    label = tensors["input/label"]
    bags = Bags.of([x], targets={"label": label.double()[:, None]})
    feature, score = model._taught(bags)
    assert_close_to_float64(feature[0], tensors["input/teacher_feature"], rtol=RELATIVE)
    scores = score[:, 0] if regime["score"] == "class_aware" else score.softmax(0)[:, 0]
    assert_close_to_float64(scores, tensors["input/teacher_score"], rtol=RELATIVE)

    output = model(bags)
    assert set(draws) <= set(shown)
    assert len(output.scores) == int(tensors["output/kept_tokens"])
    assert_close_to_float64(output.logits, tensors["output/logits"], rtol=RELATIVE)
    bag = functional.cross_entropy(output.logits, label)
    apart = output.losses["consistency"].mean()
    assert_close_to_float64(bag, tensors["output/loss_classification"], rtol=RELATIVE)
    assert_close_to_float64(apart, tensors["output/loss_consistency"], rtol=RELATIVE)
    loss = bag + config["alpha"] * apart
    assert_close_to_float64(loss, tensors["output/loss_total"], rtol=RELATIVE)
    loss.backward()
    learnt = {name: w.grad for name, w in model.named_parameters() if w.requires_grad}
    wanted = ours_of(layers, named(tensors, "grad/"), learnt)
    for name, grad in learnt.items():
        assert grad is not None
        assert_close_to_float64(grad, wanted[name], rtol=RELATIVE, atol=ZERO, what=name)
    assert x.grad is not None
    assert_close_to_float64(x.grad, tensors["grad/x"], rtol=RELATIVE)
