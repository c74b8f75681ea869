from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bagscope.errors import SchemaError
from bagscope.mil.member import (
    FACTS_NAME,
    WEIGHTS_NAME,
    Member,
    load_member,
    read_facts,
    save_member,
)
from bagscope.mil.ood import reference_of
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from tests.mil.made_bags import TARGET, made_recipe, made_source


@pytest.fixture(scope="module")
def member() -> Member:
    recipe = made_recipe(training={"epochs": 2}, bags={"standardise": True})
    train, inner = made_source(8, seed=1), made_source(4, seed=2)
    trained = Trainer(recipe, [TARGET], train, inner, seed=3).run()
    made = finish(trained, recipe, inner, seed=3, fields={"stage": "train", "seed": 3})
    made = dataclasses.replace(made, temperatures={"label": 1.25}, thresholds={"label": 0.1 + 0.2})
    return dataclasses.replace(made, ood=reference_of(train, trained.statistics))


def test_a_member_comes_back_to_the_same_bits(member: Member, tmp_path: Path) -> None:
    member = dataclasses.replace(member, unchosen={"label": "a reason"})
    digest = save_member(member, tmp_path)
    again = load_member(tmp_path)
    for name, weight in member.weights.items():
        assert torch.equal(weight, again.weights[name])
    for field in dataclasses.fields(Member):
        if field.name not in ("weights", "statistics", "ood"):
            assert getattr(again, field.name) == getattr(member, field.name), field.name
    for part in ("statistics", "ood"):
        ours, theirs = getattr(member, part).tensors(), getattr(again, part).tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    source = made_source(5, seed=4)
    one, other = member.infer(source), again.infer(source)
    np.testing.assert_array_equal(one.logits, other.logits)
    np.testing.assert_array_equal(one.embedding, other.embedding)
    np.testing.assert_array_equal(
        member.predictions(one.logits)["label"], again.predictions(other.logits)["label"]
    )
    facts = read_facts(tmp_path)
    assert facts is not None
    assert facts["weights_sha256"] == digest


def test_saving_again_gives_the_same_bytes(member: Member, tmp_path: Path) -> None:
    save_member(member, tmp_path / "a")
    save_member(load_member(tmp_path / "a"), tmp_path / "b")
    for name in (FACTS_NAME, WEIGHTS_NAME):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_without_facts_holds_no_member(member: Member, tmp_path: Path) -> None:
    assert read_facts(tmp_path) is None
    with pytest.raises(SchemaError, match="no finished member"):
        load_member(tmp_path)
    save_member(member, tmp_path)
    (tmp_path / FACTS_NAME).unlink()
    with pytest.raises(SchemaError, match="no finished member"):
        load_member(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_changed_weights_are_named(member: Member, tmp_path: Path, damage: str) -> None:
    save_member(member, tmp_path)
    path = tmp_path / WEIGHTS_NAME
    content = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        content[-1] ^= 1
        path.write_bytes(content if damage == "flip" else content[:-8])
    with pytest.raises(SchemaError, match=r"member\.safetensors: missing, or changed"):
        load_member(tmp_path)


def test_damaged_facts_are_named(member: Member, tmp_path: Path) -> None:
    save_member(member, tmp_path)
    path = tmp_path / FACTS_NAME
    facts = json.loads(path.read_text())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(SchemaError, match=r"member\.json: not readable"):
        load_member(tmp_path)
    path.write_text("[]")
    with pytest.raises(SchemaError, match=r"member\.json: is no member"):
        load_member(tmp_path)
    path.write_text(json.dumps({**facts, "schema_version": 99}))
    with pytest.raises(SchemaError, match="99 is newer"):
        load_member(tmp_path)


@pytest.mark.parametrize("gone", ["weights_sha256", "temperatures", "recipe", "seed"])
def test_facts_that_lack_a_field_are_named(member: Member, tmp_path: Path, gone: str) -> None:
    save_member(member, tmp_path)
    path = tmp_path / FACTS_NAME
    facts = json.loads(path.read_text())
    del facts[gone]
    path.write_text(json.dumps(facts))
    with pytest.raises(SchemaError, match=rf"member\.json: lacks {gone}"):
        load_member(tmp_path)
