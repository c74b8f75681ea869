"""Feature files that are there already, and those that can't be written."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.features.engine_parts import (
    SmallStudy,
    Tiny,
    encoder_of,
    features_of,
    leftovers,
    make_study,
    run_engine,
    session_of,
    tile_file,
)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., SmallStudy]:
    def make_it(counts: dict[str, int], **options: float) -> SmallStudy:
        return make_study(tmp_path / "study", counts, **options)

    return make_it


# --- feature files that are there -----------------------------------------------------------


def test_a_damaged_feature_file_is_made_again(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9, "c": 3}), tmp_path / "out"
    run_engine(study, session_of(Tiny()), out)
    before = features_of(out)
    path = out / "features/tiny/b.h5"
    path.write_bytes(path.read_bytes()[:5000])
    (out / "features/tiny/c.h5").write_bytes(b"")
    ran = run_engine(study, session_of(Tiny()), out)
    assert ran.outcomes == {"a": "done", "b": "done", "c": "done"}
    assert ran.report.counts == {"done": 2, "skipped": 1, "failed": 0}
    assert features_of(out) == before


def test_what_was_made_differently_is_refused_by_name_and_replaced_on_request(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    run_engine(study, session_of(encoder_of(Tiny(seed=9), input_px=48)), out)
    before = features_of(out)
    ran = run_engine(study, session_of(Tiny()), out)
    assert ran.outcomes == {"a": "failed", "b": "failed"}
    assert ran.tiles_read == 0
    status = ran.status("a")
    assert status.error_class == "FingerprintMismatch"
    assert "encoder.input_px is 48, asked for 32" in status.message
    assert "weights_sha256" in status.message
    assert "--overwrite" in status.message
    assert "a.h5" in status.message
    assert features_of(out) == before
    fresh = tmp_path / "fresh"
    run_engine(study, session_of(Tiny()), fresh)
    ran = run_engine(study, session_of(Tiny()), out, overwrite=True)
    assert ran.report.counts["done"] == 2
    assert features_of(out) == features_of(fresh)


def test_tiles_that_were_made_again_make_features_again(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12, "b": 9}), tmp_path / "out"
    run_engine(study, session_of(Tiny()), out)
    tile_file(study, "b", max_unreadable=0.5)
    ran = run_engine(study, session_of(Tiny()), out)
    assert ran.report.counts == {"done": 0, "skipped": 1, "failed": 1}
    assert "tiles is" in ran.status("b").message


# --- the disk -------------------------------------------------------------------------------


def test_a_full_disk_fails_the_slide_and_leaves_nothing_half_written(
    make: Callable[..., SmallStudy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = make({"a": 12, "b": 17, "c": 9}), tmp_path / "out"
    plain, written = os.pwrite, threading.local()

    def pwrite(descriptor: int, content: bytes, offset: int) -> int:
        if ".b.h5." in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            written.count = getattr(written, "count", 0) + 1
            if written.count > 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    ran = run_engine(study, session_of(Tiny(), batch_size=4), out, readers=2)
    assert ran.outcomes == {"a": "done", "b": "failed", "c": "done"}
    assert ran.status("b").error_class == "ArtifactError"
    message = ran.status("b").message
    assert "\n" not in message
    assert "No space left" in message
    assert "b.h5" in message
    assert sorted(features_of(out)) == ["tiny/a.h5", "tiny/c.h5"]
    assert leftovers(out) == []
    monkeypatch.undo()
    again = run_engine(study, session_of(Tiny(), batch_size=4), out)
    assert again.report.counts == {"done": 1, "skipped": 2, "failed": 0}


def test_a_folder_that_can_not_be_written_fails_each_slide_in_plain_words(
    make: Callable[..., SmallStudy], tmp_path: Path
) -> None:
    study, out = make({"a": 12}), tmp_path / "out"
    (out / "features").mkdir(parents=True)
    (out / "features/tiny").write_text("a file where the folder should be")
    ran = run_engine(study, session_of(Tiny()), out)
    assert ran.status("a").error_class == "ArtifactError"
    assert "tiny" in ran.status("a").message
