"""The engine as a whole: every vector where it belongs, the same bytes whatever the way."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from bagscope.artifacts import fingerprint, seal_holds
from bagscope.features.extraction import feature_fields
from bagscope.features.feature_file import TILE_ATTRIBUTES, read_feature_file
from bagscope.wsi.tile_file import read_tile_file
from tests.features.engine_parts import (
    Interruption,
    Neighbourly,
    SmallStudy,
    Tiny,
    alone,
    encoder_of,
    features_of,
    leftovers,
    make_study,
    run_engine,
    session_of,
)

COUNTS = {"a": 11, "empty": 0, "b": 1, "c": 23, "d": 8, "e": 5, "f": 2}
TILES = sum(COUNTS.values())
# One grey level of the resize, spread over a tile, and the rounding to float16.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SmallStudy:
    return make_study(tmp_path_factory.mktemp("study"), COUNTS)


@pytest.fixture(scope="module")
def plain(study: SmallStudy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of one run that nothing disturbed."""
    out = tmp_path_factory.mktemp("plain")
    ran = run_engine(study, session_of(Tiny()), out)
    assert set(ran.outcomes.values()) == {"done"}
    return features_of(out)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_every_vector_is_that_of_its_tile_alone(
    study: SmallStudy, tmp_path: Path, batch_size: int
) -> None:
    encoder = encoder_of(Tiny())
    ran = run_engine(study, session_of(encoder, batch_size=batch_size), tmp_path, readers=2)
    assert ran.report.exit_code == 0
    assert ran.report.tiles == ran.tiles_read == TILES
    for slide_id, count in COUNTS.items():
        expected = alone(encoder, study.pixels(slide_id))
        found = read_feature_file(tmp_path / "features/tiny" / f"{slide_id}.h5")
        assert found.features.shape == (count, 8)
        np.testing.assert_allclose(found.features, expected, atol=TOLERANCE, rtol=TOLERANCE)
        if count > 1:  # or else a swapped pair would pass
            apart = np.abs(expected[:, None] - expected[None]).max(axis=2)
            assert apart[~np.eye(count, dtype=bool)].min() > 4 * TOLERANCE


def test_a_file_says_everything_of_its_tiles_and_its_encoder(
    study: SmallStudy, tmp_path: Path
) -> None:
    encoder = encoder_of(Tiny())
    session = session_of(encoder)
    ran = run_engine(study, session, tmp_path)
    for slide_id in COUNTS:
        path = tmp_path / "features/tiny" / f"{slide_id}.h5"
        tiles, found = read_tile_file(study.tile_path(slide_id)), read_feature_file(path)
        assert found.slide_id == slide_id
        np.testing.assert_array_equal(found.coords_l0, tiles.coords_l0)
        np.testing.assert_array_equal(found.grid, tiles.grid)
        for name in TILE_ATTRIBUTES:
            np.testing.assert_array_equal(found.attributes[name], tiles.attributes[name])
        assert found.encoder == encoder.spec.model_dump(mode="json")
        assert found.weights_sha256 == encoder.weights_sha256
        fields = feature_fields(
            str(tiles.attributes["fingerprint"]), encoder.spec.identity(), encoder.weights_sha256
        )
        assert found.fields == fields
        assert found.fingerprint == fingerprint(fields) == ran.status(slide_id).fingerprint
        assert found.sha256 == ran.status(slide_id).content_hash
        assert seal_holds(path)
        assert found.recorded["batch_size"] == 8
        assert found.recorded["device"] == "cpu"
        assert torch.__version__.startswith(found.recorded["torch"])
        assert ran.status(slide_id).facts["tiles"] == COUNTS[slide_id]
        # Neither the folder that it was made in nor the machine is anybody's business.
        for secret in (str(tmp_path), str(study.folder), os.uname().nodename):
            assert secret.encode() not in path.read_bytes()


def test_batches_cross_slides_and_have_one_shape(study: SmallStudy, tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    class Noting(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(images.shape))
            return super().forward(images)

    session = session_of(Noting())
    assert session.crosses_slides
    shapes.clear()
    run_engine(study, session, tmp_path)
    assert set(shapes) == {(8, 3, 32, 32)}
    # Only the last one is part-filled; slide by slide there would be three more.
    assert len(shapes) == -(-TILES // 8) < sum(-(-count // 8) for count in COUNTS.values())


@pytest.mark.parametrize("readers", [2, 3])
def test_readers_make_no_difference(
    study: SmallStudy, plain: dict[str, bytes], tmp_path: Path, readers: int
) -> None:
    ran = run_engine(study, session_of(Tiny()), tmp_path, readers=readers, rows=3)
    assert ran.report.exit_code == 0
    assert features_of(tmp_path) == plain


def test_shards_make_the_same_files(
    study: SmallStudy, plain: dict[str, bytes], tmp_path: Path
) -> None:
    for shard in ((1, 3), (3, 3), (2, 3)):
        assert run_engine(study, session_of(Tiny()), tmp_path, shard=shard).report.exit_code == 0
    assert features_of(tmp_path) == plain


def test_an_interrupted_run_is_resumed_to_the_same_files(
    study: SmallStudy, plain: dict[str, bytes], tmp_path: Path
) -> None:
    switch = Interruption(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    ran = run_engine(study, session_of(Tiny()), tmp_path, report=switch)
    assert ran.report.interrupted
    assert ran.report.exit_code == 130
    assert leftovers(tmp_path) == []
    made = features_of(tmp_path)
    assert 3 <= len(made) < len(COUNTS)
    assert all(plain[name] == content for name, content in made.items())
    ran = run_engine(study, session_of(Tiny()), tmp_path)
    assert ran.report.counts["skipped"] == len(made)
    assert ran.report.counts["done"] == len(COUNTS) - len(made)
    assert features_of(tmp_path) == plain
    assert leftovers(tmp_path) == []


def test_a_second_run_reads_nothing(study: SmallStudy, tmp_path: Path) -> None:
    first = run_engine(study, session_of(Tiny()), tmp_path)
    before = features_of(tmp_path)
    again = run_engine(study, session_of(Tiny()), tmp_path)
    assert again.report.counts == {"done": 0, "skipped": len(COUNTS), "failed": 0}
    assert again.tiles_read == 0
    assert again.timing.sentence == "nothing was encoded"
    assert features_of(tmp_path) == before
    assert {s: again.status(s).content_hash for s in COUNTS} == {
        s: first.status(s).content_hash for s in COUNTS
    }


def test_several_encoders_share_one_pass(study: SmallStudy, tmp_path: Path) -> None:
    def sessions() -> list[object]:
        wide = encoder_of(Tiny(5, seed=1), "wide", dimension=5, input_px=48)
        return [
            session_of(Tiny()),
            session_of(wide, batch_size=3),
            session_of(encoder_of(Tiny(seed=2), "third"), batch_size=64),
        ]

    together, apart = tmp_path / "together", tmp_path / "apart"
    ran = run_engine(study, sessions(), together, readers=2)
    assert ran.report.exit_code == 0
    assert ran.tiles_read == TILES, "each tile is decoded once"
    assert ran.timing.tiles == 3 * TILES
    for session in sessions():
        run_engine(study, session, apart)
    assert features_of(together) == features_of(apart)
    assert len(features_of(together)) == 3 * len(COUNTS)
    for slide_id in COUNTS:
        found = read_feature_file(together / "features/wide" / f"{slide_id}.h5")
        expected = alone(sessions()[1].encoder, study.pixels(slide_id))
        np.testing.assert_allclose(found.features, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_an_encoder_that_was_added_is_all_that_runs(study: SmallStudy, tmp_path: Path) -> None:
    first, second = session_of(Tiny()), session_of(encoder_of(Tiny(seed=3), "second"))
    run_engine(study, first, tmp_path)
    before = features_of(tmp_path)
    ran = run_engine(study, [first, second], tmp_path)
    assert set(ran.outcomes.values()) == {"done"}
    assert ran.timing.tiles == ran.tiles_read == TILES
    after = features_of(tmp_path)
    assert {name: after[name] for name in before} == before


def test_rows_that_depend_on_each_other_never_meet_another_slide(
    study: SmallStudy, tmp_path: Path
) -> None:
    encoder = encoder_of(Neighbourly())
    session = session_of(encoder)
    assert not session.crosses_slides
    one, other = tmp_path / "one", tmp_path / "other"
    run_engine(study, session, one)
    run_engine(study, session_of(encoder), other, readers=3, rows=2)
    assert features_of(one) == features_of(other)
    for slide_id in COUNTS:
        pixels = study.pixels(slide_id)
        found = read_feature_file(one / "features/tiny" / f"{slide_id}.h5").features
        # A batch of its own, padded with black, from the slide's first tile on.
        for begin in range(0, len(pixels), 8):
            padded = np.zeros((8, *pixels.shape[1:]), np.uint8)
            part = pixels[begin : begin + 8]
            padded[: len(part)] = part
            lone = alone(encoder_of(Tiny()), padded)
            expected = (lone + 0.25 * lone.mean(axis=0, keepdims=True))[: len(part)]
            np.testing.assert_allclose(
                found[begin : begin + 8], expected, atol=TOLERANCE, rtol=TOLERANCE
            )


def test_float32_is_stored_on_request(study: SmallStudy, tmp_path: Path) -> None:
    encoder = encoder_of(Tiny())
    run_engine(study, session_of(encoder), tmp_path, stored_dtype="float32")
    found = read_feature_file(tmp_path / "features/tiny/c.h5").features
    assert found.dtype == np.float32
    assert np.any(found != found.astype(np.float16))


@pytest.mark.slow
def test_many_small_slides_hold_few_files_open(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {f"s{index:03d}": 1 for index in range(72)})
    out = tmp_path / "out"
    # A batch has room for all of them, and none would ever be full.
    ran = run_engine(study, session_of(Tiny(), batch_size=256), out, readers=2, rows=4)
    assert ran.report.counts["done"] == 72
    assert ran.most_open <= 2 + 64 + 2


def test_a_slide_larger_than_the_ring_goes_through_it(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"long": 300, "short": 3})
    encoder = encoder_of(Tiny())
    out = tmp_path / "out"
    ran = run_engine(study, session_of(encoder), out, readers=2, rows=2, slots=3)
    assert ran.tiles_read == 303
    found = read_feature_file(out / "features/tiny/long.h5").features
    expected = alone(encoder, study.pixels("long"))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_run_gives_everything_back(study: SmallStudy, tmp_path: Path) -> None:
    session = session_of(Tiny())
    run_engine(study, session, tmp_path / "first", readers=2)
    process = psutil.Process()
    handles, threads = process.num_fds(), threading.active_count()
    children = {child.pid for child in process.children()}
    for index in range(3):
        run_engine(study, session, tmp_path / str(index), readers=2)
    assert process.num_fds() == handles
    assert threading.active_count() == threads
    assert {child.pid for child in process.children()} <= children
    assert not any("bagscope-tiles" in memory.path for memory in process.memory_maps())
