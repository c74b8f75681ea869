"""Tiles as PNG: the pixels of the slide, deterministic archives, nothing left behind on errors."""

import json
import tarfile
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from bagscope import artifacts
from bagscope.errors import ArtifactError
from bagscope.wsi import tile_export
from bagscope.wsi.geometry import plan_read
from bagscope.wsi.slide import TileBatch

PLAN = plan_read([1.0], 0.5, mpp=0.5, tile_px=32)
CORNERS = np.array([[0, 0], [64, 0], [-8, 32], [32, 96], [64, 96]], np.int32)


class PaintedSlide:
    """A slide whose every pixel says where it lies."""

    def __init__(self, broken=()):
        self.broken = set(broken)
        self.batches = []

    def pixels(self, x_l0, y_l0):
        y, x = np.mgrid[y_l0 : y_l0 + 32, x_l0 : x_l0 + 32]
        return np.stack([x % 251, y % 241, (x + y) % 239], axis=-1).astype(np.uint8)

    def read_tiles(self, corners_l0, plan, *, downscale="area", threads=1, out=None):
        self.batches.append(len(corners_l0))
        readable = np.array([tuple(corner) not in self.broken for corner in corners_l0.tolist()])
        for i, (x, y) in enumerate(corners_l0.tolist()):
            out[i] = self.pixels(x, y) if readable[i] else 255
        return TileBatch(images=out, readable=readable)


def decoded(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def export(slide, target, corners=CORNERS, **options):
    return tile_export.export(slide, corners, PLAN, target, slide_id="a", **options)


@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_every_tile_is_there_with_the_pixels_of_its_place(tmp_path, layout):
    slide, target = PaintedSlide(), tmp_path / "out"
    assert export(slide, target, layout=layout) == (5, 0)
    if layout == "tar":
        with tarfile.open(target) as shard:
            files = {member.name: shard.extractfile(member).read() for member in shard}
    else:
        files = {path.name: path.read_bytes() for path in target.glob("*.png")}
        assert artifacts.folder_faults(target) == []
    assert set(files) == {f"a_x{x}_y{y}.png" for x, y in CORNERS.tolist()}
    for x, y in CORNERS.tolist():
        assert np.array_equal(decoded(files[f"a_x{x}_y{y}.png"]), slide.pixels(x, y))


@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_unreadable_tiles_are_left_out_and_counted(tmp_path, layout):
    target = tmp_path / "out"
    assert export(PaintedSlide([(64, 0), (64, 96)]), target, layout=layout) == (3, 2)
    if layout == "tar":
        with tarfile.open(target) as shard:
            assert "a_x64_y0.png" not in shard.getnames()
    else:
        assert not (target / "a_x64_y0.png").exists()


@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_no_tiles_make_an_empty_export(tmp_path, layout):
    assert export(PaintedSlide(), tmp_path / "out", CORNERS[:0], layout=layout) == (0, 0)
    assert (tmp_path / "out").exists()


def test_the_same_tiles_give_the_same_bytes_without_time_or_owner(tmp_path, monkeypatch):
    export(PaintedSlide(), tmp_path / "a.tar")
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("os.getuid", lambda: 4321)
    export(PaintedSlide(), tmp_path / "b.tar")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as shard:
        for member in shard:
            assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")


def test_tiles_are_read_in_batches_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(tile_export, "BATCH_BYTES", 2 * 32 * 32 * 3)
    slide, seen = PaintedSlide(), []
    assert export(slide, tmp_path / "a.tar", progress=seen.append) == (5, 0)
    assert slide.batches == [2, 2, 1]
    assert seen == [2, 4, 5]


@pytest.mark.parametrize("layout", ["tar", "folder"])
def test_a_failure_half_way_leaves_nothing_and_keeps_what_was_there(tmp_path, monkeypatch, layout):
    target = tmp_path / "out"
    export(PaintedSlide(), target, layout=layout)
    monkeypatch.setattr(tile_export, "BATCH_BYTES", 1)
    slide = PaintedSlide()

    def full(corners, *args, **options):
        if len(slide.batches) == 2:
            raise OSError(28, "No space left on device")
        return PaintedSlide.read_tiles(slide, corners, *args, **options)

    with pytest.raises(ArtifactError, match="No space left"):
        export(SimpleNamespace(read_tiles=full), target, layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    if layout == "folder":
        assert len(list(target.glob("*.png"))) == 5


def test_a_folder_states_what_it_was_made_from(tmp_path):
    export(PaintedSlide(), tmp_path / "out", layout="folder", fields={"mpp": 0.5})
    record = json.loads((tmp_path / "out" / "complete.json").read_text())
    assert record["fields"] == {"mpp": 0.5, "slide_id": "a", "tiles": 5}
