"""The bundle: what goes in comes out to the bit, and nothing damaged or half-written is taken."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bagscope import artifacts
from bagscope.errors import ConfigError, SchemaError
from bagscope.mil.bundle import (
    BUNDLE_NAME,
    Bundle,
    MemberPlace,
    find_bundle,
    load_bundle,
    write_bundle,
)
from bagscope.mil.feature_origin import FeatureOrigin, compare
from bagscope.mil.member import Member, load_member, save_member
from bagscope.mil.ood import reference_of
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.trainer import Trainer
from tests.features.stored import store_slide
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

ORIGIN = FeatureOrigin(
    encoder={"name": "demo", "dimension": DIMENSION},
    weights_sha256="ab" * 32,
    dimension=DIMENSION,
    mpp=(0.5,),
    tile_px=(256,),
    mpp_effective=(0.499, 0.503),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of three small members."""
    found = {}
    for seed in range(3):
        train = made_source(12, seed=seed, name="t")
        trained = Trainer(made_recipe(), [TARGET], train, None, seed=seed).run()
        member = finish(trained, made_recipe(), None, seed=seed, fields={"seed": seed})
        member = replace(member, ood=reference_of(train, member.statistics))
        name = f"fold_r0_f{seed}_s0"
        found[name] = tmp_path_factory.mktemp("members") / name
        save_member(member, found[name])
    return found


def made_bundle(path: Path, folders: dict[str, Path], *, final: bool = False) -> bool:
    names = list(folders)
    members = [
        (MemberPlace(name=name, fold=place), folders[name]) for place, name in enumerate(names)
    ]
    if final:
        return write_bundle(
            path, run="r", per="slide", origin=ORIGIN, members=members[:2], final=members[2][1]
        )
    return write_bundle(path, run="r", per="slide", origin=ORIGIN, members=members)


def same_bits(one: Member, other: Member) -> bool:
    source = made_source(6, seed=9)
    mine, theirs = one.infer(source), other.infer(source)
    return bool(
        np.array_equal(mine.logits, theirs.logits)
        and np.array_equal(mine.embedding, theirs.embedding)
        and all(
            np.array_equal(mine_p, theirs_p)
            for mine_p, theirs_p in zip(
                one.predictions(mine.logits).values(),
                other.predictions(theirs.logits).values(),
                strict=True,
            )
        )
    )


def test_what_goes_in_comes_out_to_the_bit(folders: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / BUNDLE_NAME
    assert made_bundle(path, folders)
    bundle = load_bundle(path)
    assert bundle.default == "ensemble"
    assert [place.fold for place in bundle.places] == [0, 1, 2]
    assert bundle.origin == ORIGIN
    assert bundle.targets == (TARGET,)
    for name, folder in folders.items():
        member = load_member(folder)
        assert same_bits(bundle.members[name], member)
        assert bundle.members[name].ood is not None
        assert bundle.members[name].ood.limit == member.ood.limit  # type: ignore[union-attr]


def test_written_again_it_is_left_alone_and_a_final_model_becomes_the_default(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / BUNDLE_NAME
    made_bundle(path, folders)
    assert not made_bundle(path, folders)
    with pytest.raises(ConfigError, match="no final model"):
        load_bundle(path).chosen("final")
    assert made_bundle(path, folders, final=True)
    bundle = load_bundle(path)
    assert bundle.default == "final"
    assert [place.name for place in bundle.chosen()] == ["final"]
    assert len(bundle.chosen("ensemble")) == len(bundle.chosen("all")) == 2
    assert same_bits(bundle.members["final"], load_member(folders["fold_r0_f2_s0"]))


def test_a_run_is_taken_for_its_bundle(folders: dict[str, Path], tmp_path: Path) -> None:
    made_bundle(tmp_path / "runs" / "r" / BUNDLE_NAME, folders)
    assert find_bundle(tmp_path / "runs" / "r") == tmp_path / "runs" / "r" / BUNDLE_NAME
    with pytest.raises(ConfigError, match="no model there"):
        find_bundle(tmp_path)


def test_it_names_no_place_no_machine_and_no_patient(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / BUNDLE_NAME
    made_bundle(path, folders, final=True)
    patients = [case.patient_id for case in made_source(12, name="t").cases]
    for file in path.rglob("*.json"):
        text = file.read_text()
        assert str(tmp_path) not in text
        assert str(Path.home()) not in text
        assert f'"{socket.gethostname()}' not in text
        assert not [name for name in patients if name in text]


@pytest.mark.parametrize("name", ["member.safetensors", "member.json", "bundle.json"])
def test_a_changed_file_is_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    path = tmp_path / BUNDLE_NAME
    made_bundle(path, folders)
    (target, *_) = sorted(path.rglob(name))
    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1
    target.write_bytes(content)
    with pytest.raises(SchemaError, match=rf"{name}: content changed since it was written"):
        load_bundle(path)


def test_missing_and_added_files_and_newer_versions_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / BUNDLE_NAME
    made_bundle(path, folders)
    (path / "note.txt").write_text("x")
    with pytest.raises(SchemaError, match=r"not in complete\.json"):
        load_bundle(path)
    (path / "note.txt").unlink()
    weights = path / "members" / "fold_r0_f1_s0" / "member.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    with pytest.raises(SchemaError, match=r"member.safetensors: missing"):
        load_bundle(path)
    weights.write_bytes(kept)
    newer = tmp_path / "newer.bagscope"
    description = json.loads((path / "bundle.json").read_text()) | {"schema_version": 99}
    with artifacts.atomic_folder(newer, {}) as folder:
        artifacts.write_json(folder / "bundle.json", description)
    with pytest.raises(SchemaError, match="99 is newer"):
        load_bundle(newer)
    (path / "complete.json").unlink()
    with pytest.raises(SchemaError, match="incomplete"):
        load_bundle(path)


KILLED = """
import os, sys
from pathlib import Path
from bagscope import artifacts
from tests.mil.test_bundle import made_bundle

path, folders = Path(sys.argv[1]), {Path(p).name: Path(p) for p in sys.argv[2:]}
steps = []
artifacts.observe_step = steps.append
made_bundle(path / "whole.bagscope", folders)
for place in range(len(steps)):
    child = os.fork()
    if not child:
        left = [place]
        def die(name):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
        artifacts.observe_step = die
        made_bundle(path / f"{place}.bagscope", folders)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
print(*steps)
"""


def test_killed_at_any_step_nothing_looks_done(folders: dict[str, Path], tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), *map(str, folders.values())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert ran.returncode == 0, ran.stderr
    steps = ran.stdout.split()
    assert steps.count("member-copied") == 6
    for place, step in enumerate(steps):
        path = tmp_path / f"{place}.bagscope"
        if path.exists():  # only the last step finds it in its place, and then it is whole
            assert step == "after-rename"
            assert place == len(steps) - 1
            assert isinstance(load_bundle(path), Bundle)
    artifacts.sweep_temporaries(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"whole.bagscope", f"{len(steps) - 1}.bagscope"}


# --- where features come from ---------------------------------------------------------------

TILE = {"mpp": 0.5, "tile_px": 256, "mpp_effective": 0.5}
IMPORTED = {"name": "demo", "imported_from": "clam", "imported_as": "demo"}


@pytest.mark.parametrize(
    ("changes", "origin", "assume", "fault"),
    [
        ({}, {}, None, ""),
        ({"tile": {**TILE, "tile_px": 224}}, {}, None, "tile_px is 224, the model's is 256"),
        ({"tile": {**TILE, "mpp": 0.25}}, {}, None, "mpp is 0.25, the model's is 0.5"),
        ({"tile": {**TILE, "mpp_effective": 0.5131}}, {}, None, "mpp_effective is 0.5131"),
        ({"tile": {**TILE, "mpp_effective": 0.5129}}, {}, None, ""),
        ({"tile": {**TILE, "mpp_effective": 0.4889}}, {}, None, "model's is 0.499 to 0.503"),
        ({"encoder": {"name": "other"}}, {}, None, "encoder is other, the model's is demo"),
        ({"weights_sha256": "cd" * 32}, {}, None, "weights_sha256 of demo is cdcdcdcdcdcd…, the m"),
        (
            {"encoder": {"name": "demo", "dimension": DIMENSION, "stain": "macenko"}},
            {},
            None,
            "encoder.stain is macenko, the model's is absent",
        ),
        ({}, {"dimension": 7}, None, f"dimension is {DIMENSION}, the model's is 7; extract with"),
        (
            {},
            {"dimension": 7, "encoder": {"name": "unknown"}},
            None,
            "the model's is 7; take features of the same encoder",
        ),
        # Imported features, which know nothing of their weights.
        ({"encoder": IMPORTED, "weights_sha256": "unknown"}, {}, None, "pass --assume demo"),
        ({"encoder": IMPORTED, "weights_sha256": "unknown"}, {}, "demo", ""),
        (
            {"encoder": IMPORTED, "weights_sha256": "unknown", "tile": {"mpp": 0.25}},
            {},
            "demo",
            "mpp is 0.25, the model's is 0.5",
        ),
        ({"tile": {}}, {}, None, "tile_px is unknown, the model's is 256"),
        (
            {"encoder": IMPORTED, "weights_sha256": "unknown"},
            {"encoder": IMPORTED, "weights_sha256": "unknown"},
            None,
            "",
        ),
        (
            {"encoder": {**IMPORTED, "imported_from": "trident"}, "weights_sha256": "unknown"},
            {"encoder": IMPORTED, "weights_sha256": "unknown"},
            None,
            "imported from trident as demo, weights unknown",
        ),
    ],
)
def test_every_mismatch_is_named_with_both_values(
    tmp_path: Path,
    changes: dict[str, object],
    origin: dict[str, object],
    assume: str | None,
    fault: str,
) -> None:
    from bagscope.features.store import FeatureStore

    stated = {"encoder": ORIGIN.encoder, "tile": TILE}
    store_slide(tmp_path, "a", 3, DIMENSION, **{**stated, **changes})
    found = compare(replace(ORIGIN, **origin), FeatureStore.open(tmp_path).record("a"), assume)
    assert fault in found.fault
    assert bool(fault) == bool(found.fault)
    assert bool(found.assumed) == (assume is not None and not fault)


def test_stored_dtype_is_no_reason(tmp_path: Path) -> None:
    from bagscope.features.feature_file import FeatureHeader, write_feature_file
    from bagscope.features.store import FeatureStore

    header = FeatureHeader(
        slide_id="a",
        fields={},
        encoder=ORIGIN.encoder,
        weights_sha256=ORIGIN.weights_sha256,
        coords_l0=None,
        tile=TILE,
    )
    write_feature_file(tmp_path / "a.h5", header, np.ones((2, DIMENSION)), dtype="float32")
    assert not compare(ORIGIN, FeatureStore.open(tmp_path).record("a")).fault
