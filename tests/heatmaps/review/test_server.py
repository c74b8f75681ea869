"""What the viewer answers: the bundle's addresses, from the slides themselves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openslide
import pytest
import simplejpeg
from numpy.typing import NDArray
from openslide.deepzoom import DeepZoomGenerator

from bagscope.heatmaps.review.live.readers import SlideReaders
from bagscope.heatmaps.review.pyramid import OVERLAP_PX, TILE_PX, Picture, unreadable_tile
from bagscope.wsi.tiff_directory import read_structure
from tests.builders import build_svs
from tests.heatmaps.review.asgi import Client, client_of
from tests.heatmaps.review.served_runs import PAGE, made_viewer

WIDTH, HEIGHT = 1300, 1031
SLIDE = "/abmil/slides/a"


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    build_svs(path, width_px=WIDTH, height_px=HEIGHT, downsamples=(1, 4), quality=95)
    return path


@pytest.fixture(scope="module")
def readers() -> Iterator[SlideReaders]:
    made = SlideReaders()
    yield made
    made.close()


@pytest.fixture
def client(slide: Path, readers: SlideReaders) -> Iterator[Client]:
    slides = {"a": slide, "case-7#2": slide, "gone": slide.with_name("gone.svs"), "nowhere": None}
    viewer = made_viewer({**slides, "damaged": None}, readers)
    with client_of(viewer.app(token=None)) as made:
        yield made


def pixels(jpeg: bytes) -> NDArray[np.int32]:
    return simplejpeg.decode_jpeg(jpeg, colorspace="RGB").astype(np.int32)


def test_every_address_of_the_bundle_is_answered(client: Client) -> None:
    kinds = {
        "/abmil/": ("text/html; charset=utf-8", PAGE.index),
        "/abmil/assets/app.css": ("text/css; charset=utf-8", b"body {}"),
        "/abmil/assets/app.js": ("text/javascript; charset=utf-8", b"let page;"),
        "/assets/app.css": ("text/css; charset=utf-8", b"body {}"),
        "/abmil/data/cohort.js": ("text/javascript; charset=utf-8", b"bagscope.cohort({});"),
        f"{SLIDE}/slide.js": ("text/javascript; charset=utf-8", b"bagscope.slide('a', 1300);"),
    }
    for target, (kind, body) in kinds.items():
        answer = client.get(target)
        assert (answer.status, answer.headers["content-type"]) == (200, kind), target
        assert answer.body == body
        head = client.get(target, method="HEAD")
        assert (head.status, head.headers["content-length"]) == (200, str(len(body)))
    for name, size in (("thumb.jpg", (126, 160)), ("tiles/7.jpg", (64, 64))):
        answer = client.get(f"{SLIDE}/{name}")
        assert answer.headers["content-type"] == "image/jpeg"
        assert pixels(answer.body).shape[:2] in (size, (size[0] + 1, size[1]))
    assert client.get("/abmil/slides/case-7%232/thumb.jpg").status == 200


def test_a_single_run_is_led_to_and_several_are_listed(slide: Path, readers: SlideReaders) -> None:
    with client_of(made_viewer({"a": slide}, readers).app(token=None)) as client:
        answer = client.get("/")
        assert (answer.status, answer.headers["location"]) == (307, "abmil/")
        assert client.get("/abmil").headers["location"] == "abmil/"
    odd = 'b <i> & "c"'
    viewer = made_viewer({"a": slide}, readers, runs=("abmil", odd))
    with client_of(viewer.app(token=None)) as client:
        listed = client.get("/").text
        assert '<a href="abmil/">abmil</a>' in listed
        assert '<a href="b%20%3Ci%3E%20%26%20%22c%22/">b &lt;i&gt; &amp; ' in listed
        assert client.get("/b%20%3Ci%3E%20%26%20%22c%22/").status == 200


def test_the_pyramid_is_openslide_s_tile_for_tile(client: Client, slide: Path) -> None:
    with openslide.OpenSlide(slide) as opened:
        theirs = DeepZoomGenerator(opened, tile_size=TILE_PX, overlap=OVERLAP_PX, limit_bounds=True)
        for level, (columns, rows) in enumerate(theirs.level_tiles):
            for column, row in np.ndindex(columns, rows):
                answer = client.get(f"{SLIDE}/picture_files/{level}/{column}_{row}.jpg")
                assert answer.status == 200
                ours = pixels(answer.body)
                expected = np.asarray(theirs.get_tile(level, (column, row)), np.int32)
                width, height = theirs.get_tile_dimensions(level, (column, row))
                assert ours.shape == (height, width, 3), (level, column, row)
                if level >= 7:
                    # Its tiles keep the read region's aspect, which may cost a row or a column.
                    h, w = np.minimum(ours.shape, expected.shape)[:2]
                    difference = np.abs(ours[:h, :w] - expected[:h, :w]).mean()
                    assert difference < 6, (level, column, row)
            for beyond in (f"{level}/{columns}_0", f"{level}/0_{rows}"):
                assert client.get(f"{SLIDE}/picture_files/{beyond}.jpg").status == 404
        beyond = f"{SLIDE}/picture_files/{theirs.level_count}/0_0.jpg"
        assert client.get(beyond).status == 404


def test_full_resolution_is_what_openslide_reads(client: Client, slide: Path) -> None:
    level = 11
    with openslide.OpenSlide(slide) as opened:
        for column, row in ((0, 0), (1, 1), (2, 2)):
            left, top = column * TILE_PX - (column > 0), row * TILE_PX - (row > 0)
            right = min(WIDTH, (column + 1) * TILE_PX + 1)
            bottom = min(HEIGHT, (row + 1) * TILE_PX + 1)
            region = opened.read_region((left, top), 0, (right - left, bottom - top))
            expected = np.asarray(region.convert("RGB"))
            answer = client.get(f"{SLIDE}/picture_files/{level}/{column}_{row}.jpg")
            # The same encoder on the same pixels: equal, or the pixels were not these.
            jpeg = simplejpeg.encode_jpeg(
                np.ascontiguousarray(expected), 85, colorspace="RGB", colorsubsampling="420"
            )
            assert np.abs(pixels(answer.body) - pixels(jpeg)).mean() < 1.5


def test_a_tile_of_the_gallery_is_the_tile_of_the_model(client: Client, slide: Path) -> None:
    with openslide.OpenSlide(slide) as opened:
        region = opened.read_region((128, 256), 0, (128, 128)).convert("RGB")
    expected = np.asarray(region, np.int32).reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(pixels(client.get(f"{SLIDE}/tiles/7.jpg").body) - expected).mean() < 3
    assert client.get(f"{SLIDE}/tiles/8.jpg").status == 404


def test_what_a_slide_lacks_is_said_in_a_sentence(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.get("/abmil/slides/gone/slide.js").text == "bagscope.slide('gone', None);"
    assert client.get("/abmil/slides/nowhere/slide.js").text == "bagscope.slide('nowhere', None);"
    for target in (
        "/abmil/slides/gone/thumb.jpg",
        "/abmil/slides/gone/tiles/7.jpg",
        "/abmil/slides/gone/picture_files/0/0_0.jpg",
        "/abmil/slides/nowhere/thumb.jpg",
        "/abmil/slides/nowhere/picture_files/0/0_0.jpg",
        "/abmil/slides/damaged/slide.js",
    ):
        answer = client.get(target)
        assert answer.status == 404
        assert answer.text.count("\n") == 1
        assert "/home" not in answer.text
        assert answer.headers["cache-control"] == "no-store"
    # What the browser is not told, the terminal is.
    assert "damaged.h5: is no score file" in caplog.text
    assert "gone.svs" in caplog.text


def test_pixels_that_can_t_be_read_are_striped_and_not_kept(
    readers: SlideReaders, tmp_path: Path
) -> None:
    path = tmp_path / "torn.svs"
    build_svs(path, width_px=1024, height_px=1024, downsamples=(1,))
    content = bytearray(path.read_bytes())
    with path.open("rb") as handle:
        level_0 = read_structure(handle.fileno()).directories[0]
        first = level_0.values(324)[5], level_0.values(325)[5]
    content[first[0] : first[0] + first[1]] = bytes(first[1])
    path.write_bytes(content)
    with client_of(made_viewer({"a": path}, readers).app(token=None)) as client:
        answer = client.get(f"{SLIDE}/picture_files/10/0_0.jpg")
    picture = Picture(width=1024, height=1024, downsample=1.0, x_l0=0, y_l0=0)
    stripes = pixels(unreadable_tile(picture, 10, 0, 0))
    lost = np.abs(pixels(answer.body) - stripes).max(axis=-1) < 16
    assert answer.status == 200
    assert answer.headers["cache-control"] == "no-store"
    assert "etag" not in answer.headers
    assert lost[300:500, 300:500].all()
    assert lost[:250, :250].mean() < 0.1
    assert 50 < np.ptp(stripes[:, :, 1]) < 150


def test_a_browser_that_has_a_picture_is_not_sent_it_again(client: Client) -> None:
    target = f"{SLIDE}/picture_files/11/0_0.jpg"
    first = client.get(target)
    assert first.headers["cache-control"] == "private, no-cache"
    again = client.get(target, if_none_match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")
    # Another viewer on this port shows other slides.
    assert client.get(target, if_none_match='"0123456789abcdef"').status == 200
