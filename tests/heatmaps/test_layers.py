"""Layers against numbers made by hand; colours that mean the same on all slides and classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import special

from bagscope.errors import ArtifactError
from bagscope.heatmaps.layers import (
    LayerKind,
    layer_colours,
    layer_kinds,
    layer_values,
    layers_of,
)
from bagscope.heatmaps.scores import Column
from bagscope.mil.score_file import ScoreFile, read_score_file
from tests.heatmaps.made_run import write_scores

RNG = np.random.default_rng(3)
ONE = Column(name="", index=0)


def attention_file(folder: Path, name: str, count: int = 30, **known: object) -> ScoreFile:
    each = special.log_softmax(RNG.normal(size=(3, count, 1)), axis=1)
    known = {
        "member_scores": each.astype(np.float32),
        "contributions": RNG.normal(size=(count, 2)).astype(np.float32),
        "contribution_bias": np.zeros(2),
        "contribution_names": ("normal", "tumor"),
        **known,
    }
    write_scores(folder, name, special.logsumexp(each, axis=0) - np.log(3), **known)  # type: ignore[arg-type]
    return read_score_file(folder / "scores" / f"{name}.h5")


def test_layers_of_attention(tmp_path: Path) -> None:
    files = {name: attention_file(tmp_path, name) for name in "ab"}
    colours = layer_colours(files, "classes")
    found = {layer.kind.id: layer for layer in layers_of(files["a"], files, colours, "classes")}
    assert list(found) == [
        "ratio", "contribution-normal", "contribution-tumor", "disagreement-ratio"
    ]  # fmt: skip
    file = files["a"]
    assert file.member_scores is not None and file.contributions is not None
    np.testing.assert_allclose(found["ratio"].values, 30 * np.exp(file.scores[:, 0]), rtol=1e-5)
    ratios = 30 * np.exp(file.member_scores[:, :, 0].astype(float))
    np.testing.assert_allclose(
        found["disagreement-ratio"].values, ratios.std(axis=0, ddof=1), rtol=1e-5
    )
    tumor = found["contribution-tumor"]
    np.testing.assert_array_equal(tumor.values, file.contributions[:, 1])
    assert tumor.title == "Contribution to the logit: tumor" and tumor.class_name == "tumor"
    # Diverging around 0, the same for both classes: a switch of class keeps a colour's meaning.
    assert tumor.colours == found["contribution-normal"].colours
    assert tumor.colours.low == -tumor.colours.high and tumor.colours.map_name == "RdBu_r"
    apart = found["disagreement-ratio"].colours
    assert apart.low == 0 and apart.high >= np.percentile(found["disagreement-ratio"].values, 99)
    assert len({layer.meaning for layer in found.values()}) == 3


def test_rollout_is_drawn_like_a_ratio(tmp_path: Path) -> None:
    ratios = RNG.uniform(0.2, 3, size=30).astype(np.float32)
    files = {"a": attention_file(tmp_path, "a", rollout=ratios), "b": attention_file(tmp_path, "b")}
    colours = layer_colours(files, "classes")
    found = {layer.kind.id: layer for layer in layers_of(files["a"], files, colours, "classes")}
    np.testing.assert_array_equal(found["rollout"].values, ratios)
    assert found["rollout"].colours.logarithmic
    assert found["rollout"].colours.low == 1 / found["rollout"].colours.high
    assert "rollout" not in {
        layer.kind.id for layer in layers_of(files["b"], files, colours, "classes")
    }
    with pytest.raises(ArtifactError, match="b: has no rollout"):
        layer_values(files["b"], found["rollout"].kind, files, "classes")
    broken = attention_file(tmp_path, "c", rollout=np.full(30, np.nan, np.float32))
    with pytest.raises(ArtifactError, match="c: has a rollout that is no finite numbers"):
        layer_values(broken, found["rollout"].kind, {}, "classes")


def test_a_patients_slides_disagree_on_one_scale(tmp_path: Path) -> None:
    case = {"stage": "scores", "case": "p", "slides": {"a": "1", "b": "2"}}
    each = special.log_softmax(RNG.normal(size=(2, 20, 1)), axis=1).astype(np.float32)
    mean = special.logsumexp(each, axis=0) - np.log(2)
    for name, rows in (("a", slice(0, 12)), ("b", slice(12, 20))):
        write_scores(tmp_path, name, mean[rows], case=case, member_scores=each[:, rows])
    files = {name: read_score_file(tmp_path / "scores" / f"{name}.h5") for name in "ab"}
    kind = LayerKind(scale="ratio", shows="disagreement", column=ONE)
    found = np.concatenate([layer_values(files[n], kind, files, "classes") for n in "ab"])
    by_hand = (20 * np.exp(each[:, :, 0].astype(float))).std(axis=0, ddof=1)
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)


def test_classes_of_instances_and_what_a_file_lacks(tmp_path: Path) -> None:
    names = ("x", "y", "z")
    each = RNG.normal(size=(2, 8, 3)).astype(np.float32)
    write_scores(
        tmp_path, "a", each.mean(axis=0), kind="instance_logit", names=names, member_scores=each
    )
    file = read_score_file(tmp_path / "scores" / "a.h5")
    ids = [kind.id for kind in layer_kinds(file, "classes")]
    assert ids == [
        *(f"probability-{name}" for name in names),
        *(f"disagreement-probability-{name}" for name in names),
    ]
    apart = LayerKind(scale="probability", shows="disagreement", column=Column(name="y", index=1))
    by_hand = special.softmax(each.astype(float), axis=2)[:, :, 1].std(axis=0, ddof=1)
    np.testing.assert_allclose(layer_values(file, apart, {}, "classes"), by_hand, rtol=1e-5)
    added = LayerKind(scale="contribution", shows="score", column=ONE)
    with pytest.raises(ArtifactError, match="has no contributions"):
        layer_values(file, added, {}, "classes")
    write_scores(tmp_path, "b", np.zeros((8, 3)), kind="instance_logit", names=names)
    old = read_score_file(tmp_path / "scores" / "b.h5")
    with pytest.raises(ArtifactError, match="of an older bagscope"):
        layer_values(old, apart, {}, "classes")
    assert len(layer_kinds(old, "classes")) == 3
    broken = attention_file(tmp_path, "c", contributions=np.full((30, 2), np.nan, np.float32))
    kind = LayerKind(scale="contribution", shows="score", column=Column(name="tumor", index=1))
    with pytest.raises(ArtifactError, match="no finite numbers"):
        layer_values(broken, kind, {}, "classes")
    # A slide whose numbers can't be used has no say in the colours of the others.
    both = {"c": broken, "d": attention_file(tmp_path, "d")}
    assert layer_colours(both, "classes")[kind].high < 100
