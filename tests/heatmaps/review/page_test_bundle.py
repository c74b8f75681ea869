"""Made-up review bundles, written straight from the page's contract and from nothing else.

Slides are small pictures with planted scores; `checkerboard` has scores that must coincide with the
picture's squares, at a place and a scale that forgive no confusion of frames.
"""

from __future__ import annotations

import base64
import importlib.resources
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

CLASSES = ["normal", "tumor"]
RED_LUT = np.stack([np.arange(256), np.zeros(256), 255 - np.arange(256)], 1).astype(np.uint8)
"""Blue to red: neither stands in a grey picture."""

Json = dict[str, Any]
Pixels = NDArray[np.uint8]


def base64_of(numbers: NDArray[Any], kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).astype(kind).tobytes()).decode()


def cohort_row(number: int, **changes: Any) -> Json:
    """Return a slide of the table; every third answer is wrong, some are marked."""
    truth, right = CLASSES[number % 2], number % 3 != 0
    answer = truth if right else CLASSES[1 - number % 2]
    value = round(0.5 + (number * 37 % 50) / 100, 2)
    other = CLASSES[1 - CLASSES.index(answer)]
    warning = "Random tiles move the answer as much." if number % 5 == 0 else ""
    return {
        "key": f"slide_{number:04d}", "slide": f"slide_{number:04d}",
        "patient": f"patient_{number // 2:03d}", "fold": number % 5,
        "truth": {"label": truth},
        "predicted": {"label": {
            "text": answer, "value": value, "probabilities": {answer: value, other: 1 - value},
            "low": max(value - 0.1, 0), "high": min(value + 0.05, 1),
        }},
        "correct": right, "ood": number % 7 == 0, "tiles": 100 + number,
        "faithfulness": {"score": round((number * 13 % 100) / 100, 2), "warning": warning},
        "thumb": None, "verdict": None, "verdicts": [], "notes": [], **changes,
    }  # fmt: skip


def cohort_data(rows: list[Json], **changes: Any) -> Json:
    return {
        "schema": "bagscope.review", "version": 1, "run": "abmil", "title": "Review of abmil",
        "live": False, "pseudonymised": False, "fingerprint": "f" * 16,
        "reviewer_csv_columns": ["slide", "verdict", "comment", "reviewer", "run"],
        "verdict_words": {}, "interval_text": "± one standard deviation",
        "targets": [
            {"name": "label", "task": "classes", "classes": CLASSES, "threshold": 0.5}
        ],
        "headline": ["AUROC 0.97 (0.93–1.00), 40 patients"],
        "notes": ["Ten slides come from one site only."], "slides": rows, **changes,
    }  # fmt: skip


def layer_data(
    layer_id: str, title: str, values: NDArray[Any], lut: Pixels, **changes: Any
) -> Json:
    return {
        "id": layer_id, "title": title, "class": None, "scale": "ratio", "kind": "score",
        "meaning": "1 is what a tile would weigh if all weighed the same", "low": 0.25, "high": 4.0,
        "log": True, "ticks": [[0.25, "0.25"], [0.5, "½"], [1, "1"], [2, "2"], [4, "4"]],
        "unit_text": "× uniform", "lut": base64_of(lut, "u1"), "values": base64_of(values, "<f4"),
        **changes,
    }  # fmt: skip


def slide_data(key: str, coords: NDArray[Any], layers: list[Json], **changes: Any) -> Json:
    """Return a slide; `coords` (N, 2) level-0 corners of tiles of 512 pixels unless changed."""
    return {
        "key": key, "width_l0": 20_000, "height_l0": 14_000, "mpp": 0.25, "frame_note": "Level 0.",
        "picture": None, "tiles": {
            "count": len(coords), "size_l0": 512, "coords": base64_of(coords, "<i4"),
        },
        "layers": layers, "initial_layer": layers[0]["id"] if layers else None, "gallery": [],
        "faithfulness": None, "annotations": [], "notes": [], **changes,
    }  # fmt: skip


def write_bundle(
    folder: Path, cohort: Json, slides: list[Json], pictures: dict[str, Pixels]
) -> Path:
    """Write a bundle into an empty folder; `pictures` (H, W, 3) by key. Returns the page."""
    page = importlib.resources.files("bagscope.heatmaps.review") / "page"
    (folder / "assets").mkdir(parents=True)
    for part in page.iterdir():
        with importlib.resources.as_file(part) as source:
            place = folder if part.name == "index.html" else folder / "assets"
            shutil.copyfile(source, place / part.name)
    _write_script(folder / "data/cohort.js", "cohort", cohort)
    for slide in slides:
        _write_script(folder / "slides" / slide["key"] / "slide.js", "slide", slide)
    for key, pixels in pictures.items():
        _write_pyramid(folder / "slides" / key / "picture_files", pixels)
        write_jpeg(folder / "slides" / key / "thumb.jpg", cv2.resize(pixels, (144, 96)))
    return folder / "index.html"


def _write_script(path: Path, name: str, data: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"bagscope.{name}({json.dumps(data)});\n", encoding="utf-8")


def write_jpeg(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    path.write_bytes(encoded.tobytes())


PICTURE_TILE_PX = 510
OVERLAP_PX = 1


def picture_data(pixels: Pixels, downsample: float, x_l0: float = 0, y_l0: float = 0) -> Json:
    return {
        "width": pixels.shape[1], "height": pixels.shape[0], "tile_size": PICTURE_TILE_PX,
        "overlap": OVERLAP_PX, "downsample": downsample, "x_l0": x_l0, "y_l0": y_l0,
    }  # fmt: skip


def _write_pyramid(folder: Path, pixels: Pixels) -> None:
    """Write Deep Zoom levels: the last is whole, each before it half as wide, rounded up."""
    for level in range(int(np.ceil(np.log2(max(pixels.shape[:2])))), -1, -1):
        height, width = pixels.shape[:2]
        for row in range(-(-height // PICTURE_TILE_PX)):
            for column in range(-(-width // PICTURE_TILE_PX)):
                top, left = row * PICTURE_TILE_PX, column * PICTURE_TILE_PX
                cut = pixels[
                    max(top - OVERLAP_PX, 0) : top + PICTURE_TILE_PX + OVERLAP_PX,
                    max(left - OVERLAP_PX, 0) : left + PICTURE_TILE_PX + OVERLAP_PX,
                ]
                write_jpeg(folder / str(level) / f"{column}_{row}.jpg", cut)
        half = (max(1, -(-width // 2)), max(1, -(-height // 2)))
        pixels = cv2.resize(pixels, half, interpolation=cv2.INTER_AREA)


SQUARE_PX = 48
SQUARES_ACROSS, SQUARES_DOWN = 24, 16
DOWNSAMPLE = 8.0
PICTURE_CORNER_L0 = (1_000, 600)


def checkerboard(key: str) -> tuple[Json, Pixels]:
    """Return a slide whose red tiles lie exactly on white squares, and its picture.

    Layers: `squares` (red on white, blue on black), `inverse`, and `white-only`.
    """
    rows, columns = np.mgrid[:SQUARES_DOWN, :SQUARES_ACROSS]
    # A diagonal band breaks the symmetry, so that a shift by two squares is seen too.
    white = ((rows + columns) % 2 == 0) ^ (rows == columns)
    pixels = np.kron(white, np.ones((SQUARE_PX, SQUARE_PX))).astype(np.uint8) * 255
    size_l0 = SQUARE_PX * DOWNSAMPLE
    coords = np.stack([columns.ravel(), rows.ravel()], 1) * size_l0 + PICTURE_CORNER_L0
    score = np.where(white.ravel(), 4.0, 0.25)
    layers = [
        layer_data("squares", "tumor: attention", score, RED_LUT, **{"class": "tumor"}),
        layer_data("inverse", "normal: attention", 1 / score, RED_LUT, **{"class": "normal"}),
        layer_data("white-only", "disagreement", np.where(score > 1, 4.0, np.nan), RED_LUT),
    ]
    picture = np.repeat(pixels[..., None], 3, axis=2)
    gallery = [
        {"layer": layer, "side": side, "rank": rank, "tile": tile, "value": float(score[tile]),
         "image": f"slides/{key}/tiles/{tile}.jpg"}
        for layer in ("squares", "inverse")
        for side, wanted in (("top", 4.0), ("bottom", 0.25))
        for rank, tile in enumerate(np.flatnonzero(score == wanted)[100:103].tolist(), 1)
    ]  # fmt: skip
    slide = slide_data(
        key, coords, layers, gallery=gallery,
        tiles={"count": len(coords), "size_l0": size_l0, "coords": base64_of(coords, "<i4")},
        picture=picture_data(picture, DOWNSAMPLE, *PICTURE_CORNER_L0),
    )  # fmt: skip
    return slide, picture
