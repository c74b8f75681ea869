"""What goes wrong with one slide stays with that slide, and is said in one sentence."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
import torch

from bagscope.cohort.executors.protocol import Finished
from bagscope.cohort.jobs import Job
from bagscope.errors import EncoderUnavailable
from bagscope.features.feature_file import read_feature_file
from bagscope.features.feed import ReadingEnded, SlideFeed
from bagscope.features.ring import TileRing
from bagscope.wsi.synthetic.faults import corrupt_tiles
from bagscope.wsi.tile_file import read_tile_file
from tests.features.engine_parts import (
    Ran,
    SmallStudy,
    Tiny,
    alone,
    changed,
    encoder_of,
    features_of,
    leftovers,
    make_study,
    run_engine,
    session_of,
    tile_file,
)
from tests.features.planted_readers import read_badly

TOLERANCE = 5e-3
PATIENT_S = 4.0


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SmallStudy]:
    def make_it(counts: dict[str, int], **options: float) -> SmallStudy:
        return make_study(tmp_path / "study", counts, **options)

    return make_it


def require_only(ran: Ran, out: Path, slide_id: str, error_class: str) -> str:
    """Check that this slide alone failed and left nothing; return what was said of it."""
    others = {outcome for name, outcome in ran.outcomes.items() if name != slide_id}
    assert others == {"done"}
    status = ran.status(slide_id)
    assert (status.outcome, status.error_class) == ("failed", error_class), status.message
    assert ran.report.exit_code == 1
    assert not list(out.rglob(f"features/*/{slide_id}.h5"))
    assert leftovers(out) == []
    assert status.message
    assert "\n" not in status.message
    return status.message


# --- readers --------------------------------------------------------------------------------


@pytest.mark.parametrize("disaster", ["abort", "hang", "swell"])
def test_a_reader_that_came_to_grief_once_is_given_another_try(
    make: Callable[..., SmallStudy], tmp_path: Path, disaster: str
) -> None:
    counts = {"a": 12, f"{disaster}-once": 14, "c": 9}
    study, out, undisturbed = make(counts), tmp_path / "out", tmp_path / "undisturbed"
    run_engine(study, session_of(Tiny()), undisturbed)
    ran = run_engine(
        study, session_of(Tiny()), out, readers=2, work=read_badly,
        timeout_s=PATIENT_S if disaster == "hang" else None,
        memory_limit_mib=900 if disaster == "swell" else None,
    )  # fmt: skip
    assert set(ran.outcomes.values()) == {"done"}
    assert study.tile_path(f"{disaster}-once").with_suffix(".mark").read_text() == "xx"
    assert features_of(out) == features_of(undisturbed)
    assert leftovers(out) == []


@pytest.mark.parametrize(
    ("disaster", "error_class"),
    [("abort", "WorkerDied"), ("hang", "WorkerTimeout"), ("swell", "WorkerOutOfMemory")],
)
def test_the_second_death_is_the_slides_end(
    make: Callable[..., SmallStudy], tmp_path: Path, disaster: str, error_class: str
) -> None:
    slide_id = f"{disaster}-always"
    study, out = make({"a": 12, slide_id: 14, "c": 9, "d": 1}), tmp_path / "out"
    ran = run_engine(
        study, session_of(Tiny()), out, readers=2, work=read_badly,
        timeout_s=PATIENT_S if disaster == "hang" else None,
        memory_limit_mib=900 if disaster == "swell" else None,
    )  # fmt: skip
    message = require_only(ran, out, slide_id, error_class)
    assert slide_id in message
    assert study.tile_path(slide_id).with_suffix(".mark").read_text() == "xx"


def test_an_error_in_a_reader_is_no_death_and_not_tried_again(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "raise-always": 14, "c": 9}), tmp_path / "out"
    ran = run_engine(study, session_of(Tiny()), out, work=read_badly)
    assert require_only(ran, out, "raise-always", "ZeroDivisionError") == "division by zero"
    assert study.tile_path("raise-always").with_suffix(".mark").read_text() == "x"


def test_vectors_of_a_first_attempt_never_reach_the_second(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"abort-once": 6, "b": 3}), tmp_path / "out"
    chunk = 4

    class BadForTheFirst(Tiny):
        armed = False

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            vectors = super().forward(images)
            if self.armed:  # the first attempt's one chunk, with which the batch begins
                vectors[:chunk] = float("nan")
            return vectors

    network = BadForTheFirst()
    session = session_of(network, batch_size=64)
    network.armed = True
    ran = run_engine(study, session, out, work=read_badly, rows=chunk)
    assert ran.tiles_read == chunk + 6 + 3
    assert set(ran.outcomes.values()) == {"done"}
    for slide_id in study.counts:
        found = read_feature_file(out / "features/tiny" / f"{slide_id}.h5").features
        expected = alone(encoder_of(Tiny()), study.pixels(slide_id))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_reader_takes_no_slot_into_its_grave(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    # Six deaths, and two slots in all.
    counts = {"drop-always1": 9, "drop-always2": 9, "drop-always3": 9, "good": 17}
    ran = run_engine(
        make(counts), session_of(Tiny()), tmp_path / "out", work=read_badly, rows=4, slots=2
    )
    assert ran.outcomes == {name: "done" if name == "good" else "failed" for name in counts}
    assert ran.tiles_read == 17


def test_a_job_whose_reader_was_gone_before_it_began_is_given_again() -> None:
    events: SimpleQueue[object] = SimpleQueue()

    class Vanishing:
        def __init__(self) -> None:
            self.given: list[str] = []
            self.ended: list[Finished] = []

        def start(self, job: Job) -> None:
            self.given.append(job.slide_id)
            is_first = len(self.given) == 1
            record = {} if is_first else {"outcome": "done"}
            self.ended.append(
                Finished(slide_id="a", record=record, seconds=0, host="h", requeue=is_first)
            )

        def wait(self, timeout_s: float) -> list[Finished]:
            time.sleep(0.01)
            ended, self.ended = self.ended, []
            return ended

        def wake(self) -> None: ...

        def close(self) -> None: ...

    executor = Vanishing()
    ring = TileRing(slots=1, rows=1, tile_px=8)
    feed = SlideFeed(lambda _: executor, ring, events.put)  # type: ignore[arg-type,return-value]
    feed.start(Job(slide_id="a"))
    event = events.get(timeout=10)
    feed.close()
    assert isinstance(event, ReadingEnded)
    assert event.finished.record == {"outcome": "done"}
    assert executor.given == ["a", "a"]
    assert events.empty()


# --- the encoder ----------------------------------------------------------------------------


class Choosy(Tiny):
    """Gives something else for tiles whose mean colour is that of one tile."""

    def __init__(self, tile: np.ndarray, value: float) -> None:
        super().__init__()
        self.value = value
        self.wanted = torch.tensor(tile.mean(axis=(0, 1)), dtype=torch.float32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vectors = super().forward(images)
        mean, std = (torch.tensor(v) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        colours = (images.mean(dim=(2, 3)) * std + mean) * 255
        hit = ((colours - self.wanted).abs().max(dim=1).values < 1.0)[:, None]
        return torch.where(hit, torch.full_like(vectors, self.value), vectors)


def test_nan_fails_the_slide_and_names_the_tile(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 17, "c": 9}), tmp_path / "out"
    network = Choosy(study.pixels("b")[13], float("nan"))
    ran = run_engine(study, session_of(network), out, readers=2)
    message = require_only(ran, out, "b", "SlideError")
    x_l0, y_l0 = read_tile_file(study.tile_path("b")).coords_l0[13]
    assert f"x={x_l0}, y={y_l0}" in message
    assert "b" in message
    assert "tiny" in message
    assert "NaN" in message


@pytest.mark.parametrize("readers", [1, 2])
def test_a_slide_that_is_lost_is_not_read_to_its_end(
    make: Callable[..., SmallStudy], tmp_path: Path, readers: int
) -> None:
    study, out = make({"b": 400, "a": 12}), tmp_path / "out"
    session = session_of(Choosy(study.pixels("b")[0], float("nan")), batch_size=1)
    ran = run_engine(study, session, out, readers=readers, rows=2, slots=3)
    require_only(ran, out, "b", "SlideError")
    assert ran.tiles_read < 200


def test_infinity_from_the_encoder_is_not_taken_for_overflow(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 3}), tmp_path / "out"
    ran = run_engine(study, session_of(Choosy(study.pixels("b")[2], float("inf"))), out)
    require_only(ran, out, "b", "SlideError")


def test_what_float16_can_not_hold_is_stored_as_float32(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 17, "c": 9}), tmp_path / "out"
    encoder = encoder_of(Choosy(study.pixels("b")[13], 1e6))
    ran = run_engine(study, session_of(encoder), out, readers=2)
    assert set(ran.outcomes.values()) == {"done"}
    found = {s: read_feature_file(out / "features/tiny" / f"{s}.h5").features for s in "abc"}
    assert {s: f.dtype.name for s, f in found.items()} == {
        "a": "float16", "b": "float32", "c": "float16"
    }  # fmt: skip
    assert (found["b"][13] == 1e6).all()
    expected = alone(encoder, study.pixels("b"))
    np.testing.assert_allclose(found["b"], expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert ran.status("b").facts["encoders"] == {"tiny": "float32"}
    assert leftovers(out) == []


def test_an_overflow_leaves_the_other_encoders_as_they_are(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out, apart = make({"a": 12, "b": 17}), tmp_path / "out", tmp_path / "apart"

    def sessions() -> list[object]:
        wild = encoder_of(Choosy(study.pixels("b")[0], 1e6), "wild")
        return [session_of(wild, batch_size=2), session_of(Tiny(), batch_size=64)]

    run_engine(study, sessions(), out)
    for session in sessions():
        run_engine(study, session, apart)
    assert read_feature_file(out / "features/wild/b.h5").features.dtype == np.float32
    assert read_feature_file(out / "features/tiny/b.h5").features.dtype == np.float16
    assert features_of(out) == features_of(apart)


class Cramped(Tiny):
    """Has no room for batches above `limit`, from the moment that it is `armed`."""

    limit, armed = 3, True

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.armed and len(images) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().forward(images)


class Uneven(Cramped):
    """As cramped, and its rows depend on each other where a batch has more than one."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        vectors = super().forward(images)
        return vectors + 1e-3 * vectors.mean(dim=0, keepdim=True)


def test_out_of_memory_goes_on_with_smaller_batches(
    make: Callable[..., SmallStudy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study, out = make({"a": 12, "b": 17, "c": 1}), tmp_path / "out"
    network = Cramped()
    network.armed = False
    encoder = encoder_of(network)
    session = session_of(encoder, batch_size=16)
    network.armed = True
    with caplog.at_level(logging.WARNING):
        ran = run_engine(study, session, out, readers=2)
    assert set(ran.outcomes.values()) == {"done"}
    assert session.batch_size == 2
    assert "out of memory" in caplog.text
    assert "batches of 2" in caplog.text
    for slide_id in study.counts:
        found = read_feature_file(out / "features/tiny" / f"{slide_id}.h5").features
        network.armed = False
        expected = alone(encoder, study.pixels(slide_id))
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_out_of_memory_while_every_slide_has_its_own_batches(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 20, "b": 17, "c": 9}), tmp_path / "out"
    network = Uneven()
    network.armed = False
    encoder = encoder_of(network)
    session = session_of(encoder, batch_size=16)
    assert not session.crosses_slides
    network.armed = True
    ran = run_engine(study, session, out, readers=3, rows=3)
    assert set(ran.outcomes.values()) == {"done"}
    for slide_id in study.counts:
        found = read_feature_file(out / "features/tiny" / f"{slide_id}.h5").features
        expected = alone(encoder_of(Tiny()), study.pixels(slide_id))
        np.testing.assert_allclose(found, expected, atol=0.02, rtol=TOLERANCE)


def test_one_tile_that_is_too_much_ends_the_run_in_plain_words(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    network = Cramped()
    network.armed = False
    session = session_of(network)
    network.armed, network.limit = True, 0
    with pytest.raises(EncoderUnavailable, match="has not enough memory for one tile"):
        run_engine(make({"a": 12}), session, tmp_path / "out")
    assert leftovers(tmp_path / "out") == []


# --- slides and tile files ------------------------------------------------------------------


def test_unreadable_tiles_are_left_out_below_the_limit(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 30}, max_unreadable=0.2), tmp_path / "out"
    encoder, pixels = encoder_of(Tiny()), study.pixels("b")
    damage_after_tiling(study, "b", [3, 4, 20])
    ran = run_engine(study, session_of(encoder), out, readers=2)
    assert set(ran.outcomes.values()) == {"done"}
    kept = np.delete(np.arange(30), [3, 4, 20])
    found = read_feature_file(out / "features/tiny/b.h5")
    tiles = read_tile_file(study.tile_path("b"))
    np.testing.assert_array_equal(found.coords_l0, tiles.coords_l0[kept])
    np.testing.assert_array_equal(found.grid, tiles.grid[kept])
    np.testing.assert_allclose(
        found.features, alone(encoder, pixels[kept]), atol=TOLERANCE, rtol=TOLERANCE
    )
    status = ran.status("b")
    assert status.facts["tiles"] == 27
    assert status.facts["unreadable"] == 3
    assert len(status.warnings) == 1
    assert "3 of 30 tiles" in status.warnings[0]


def test_too_many_unreadable_tiles_fail_the_slide(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 30}, max_unreadable=0.05), tmp_path / "out"
    damage_after_tiling(study, "b", [3, 4], max_unreadable=0.05)
    message = require_only(run_engine(study, session_of(Tiny()), out), out, "b", "ReadError")
    assert message.startswith("b: 2 of 30 tiles")


def damage_after_tiling(
    study: SmallStudy, slide_id: str, places: list[int], *, max_unreadable: float = 0.2
) -> None:
    """Damage stored tiles, and have the tile file state the identity of the damaged slide.

    Stored tiles and tiles are the same here: 64 px each, seven in a row.
    """
    corrupt_tiles(study.slide_path(slide_id), places)
    tile_file(study, slide_id, max_unreadable=max_unreadable)


def test_a_slide_that_changed_since_tiling_is_refused(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    other = make_study(tmp_path / "other", {"b": 9})
    shutil.copyfile(other.slide_path("b"), study.slide_path("b"))
    ran = run_engine(study, session_of(Tiny()), out)
    message = require_only(ran, out, "b", "FingerprintMismatch")
    assert "b.svs" in message
    assert "bagscope tile" in message


def test_a_slide_that_changed_since_its_features_were_made_is_told_of(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9, "c": 3}), tmp_path / "out"
    run_engine(study, session_of(Tiny()), out)
    other = make_study(tmp_path / "other", {"b": 9})
    shutil.copyfile(other.slide_path("b"), study.slide_path("b"))
    study.slide_path("c").unlink()
    again = run_engine(study, session_of(Tiny()), out)
    # A slide that was moved away says nothing against its features; "done" holds from before.
    assert again.outcomes == {"a": "done", "b": "failed", "c": "done"}
    assert again.report.counts["skipped"] == 2
    assert again.status("b").error_class == "FingerprintMismatch"


def test_an_encoder_that_breaks_ends_the_run_in_one_sentence(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12}), tmp_path / "out"
    session = session_of(Tiny())
    session.run_ready = broken
    with pytest.raises(EncoderUnavailable, match=r"failed on cpu \(the device is gone\)"):
        run_engine(study, session, out)
    assert leftovers(out) == []


def broken(images: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the device is gone")


def test_a_slide_cut_short_is_refused(make: Callable[..., SmallStudy], tmp_path: Path) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    with study.slide_path("b").open("r+b") as handle:
        handle.truncate(study.slide_path("b").stat().st_size // 2)
    ran = run_engine(study, session_of(Tiny()), out)
    assert "b.svs" in require_only(ran, out, "b", ran.status("b").error_class)


def test_a_slide_that_is_gone_fails_alone(make: Callable[..., SmallStudy], tmp_path: Path) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    study.slide_path("b").unlink()
    ran = run_engine(study, session_of(Tiny()), out)
    assert "b.svs" in require_only(ran, out, "b", ran.status("b").error_class)


def test_the_tile_file_of_another_slide_is_refused(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    tile_file(study, "b", states="somebody")
    message = require_only(
        run_engine(study, session_of(Tiny()), out), out, "b", "FingerprintMismatch"
    )
    assert "'somebody'" in message
    assert "'b'" in message


def test_a_missing_tile_file_fails_the_slide(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    study.tile_path("b").unlink()
    message = require_only(run_engine(study, session_of(Tiny()), out), out, "b", "ArtifactError")
    assert "bagscope tile" in message


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_tile_file_fails_no_other_slide(
    make: Callable[..., SmallStudy], tmp_path: Path, seed: int
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    content = bytearray(study.tile_path("b").read_bytes())
    chance = np.random.default_rng(seed)
    for place in chance.integers(0, len(content), 40):
        content[place] ^= int(chance.integers(1, 256))
    study.tile_path("b").write_bytes(content)
    ran = run_engine(study, session_of(Tiny()), out)
    assert ran.status("a").outcome == "done"
    assert leftovers(out) == []


def test_what_a_job_asks_for_reaches_its_reader(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    jobs = [changed(job, backend="no-such-backend") for job in study.jobs()[1:]]
    ran = run_engine(study, session_of(Tiny()), out, jobs=[study.jobs()[0], *jobs])
    assert ran.outcomes == {"a": "done", "b": "failed"}
