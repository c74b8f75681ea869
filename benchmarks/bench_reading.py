"""How fast tiles are read, against raw libjpeg-turbo and OpenSlide on the same slide.

Correctness first: a sample of tiles must equal OpenSlide's pixel by pixel, or nothing is timed.
Then every case runs once per round, all cases interleaved, so that a slow moment of the machine
hits them alike; numbers are medians over the rounds, and goals are ratios within one run.

    python benchmarks/bench_reading.py [--rounds 7] [--slide FILE.svs] [--record]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import openslide
import recording
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from bagscope.wsi.geometry import ReadPlan, plan_read
from bagscope.wsi.jpeg_stream import cached_buffer, complete_stream
from bagscope.wsi.jpegtiff_backend import JpegTiffSlide
from bagscope.wsi.opening import open_slide
from bagscope.wsi.slide import Level
from bagscope.wsi.stored_tiles import StoredLevel, stored_levels
from bagscope.wsi.synthetic import SyntheticSpec, write_slide

EDGE_PX = 20_480
MPP = 0.25
QUALITY = 90
"""Makes a stored tile of synthetic tissue weigh what one of a scanner's does (about 20 kB)."""
STORED_PX = 256
COLUMNS, ROWS = 40, 32
"""Stored tiles of the block that is read: the one with the most tissue."""
OFFSET_PX = (96, 160)
BATCH = 256
QUIET, PATIENCE = 0.03, 60
"""Share of the processor that other programs may use, and how often a case is timed for it."""
OPENSLIDE_SHARE = 4
"""OpenSlide reads a quarter of the tiles: it is slower, and its rate does not depend on it."""


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is timed, and how many tiles it makes.

    `start` opens what is read, with empty caches, and returns what is timed.
    """

    name: str
    tiles: int
    start: Callable[[], Callable[[], None]]


def build_slide(path: Path) -> None:
    """Write a slide of synthetic tissue, 4:2:2 as many scanners do."""
    spec = SyntheticSpec(
        width_px=EDGE_PX,
        height_px=EDGE_PX,
        mpp=MPP,
        seed=1,
        tissue_fraction=0.6,
        subsampling="4:2:2",
        quality=QUALITY,
    )
    write_slide(path, spec, threads=2)


def stored_level(path: Path) -> StoredLevel:
    """Return where the level-0 tiles of an SVS lie."""
    with openslide.OpenSlide(path) as slide:
        levels = [
            Level(width_px=width, height_px=height, downsample=downsample)
            for (width, height), downsample in zip(
                slide.level_dimensions, slide.level_downsamples, strict=True
            )
        ]
    return stored_levels(path, "aperio", levels)[0]


def heaviest_block(stored: StoredLevel) -> tuple[int, int]:
    """Return column and row of the block of stored tiles that weighs most."""
    weights = stored.byte_counts.reshape(stored.down, stored.across)
    sums = np.pad(weights.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    blocks = sums[ROWS:, COLUMNS:] - sums[:-ROWS, COLUMNS:]
    blocks = blocks - sums[ROWS:, :-COLUMNS] + sums[:-ROWS, :-COLUMNS]
    row, column = np.unravel_index(int(blocks.argmax()), blocks.shape)
    return int(column), int(row)


def lattice(
    origin: tuple[int, int], edge_l0: int, offset: tuple[int, int] = (0, 0)
) -> NDArray[np.int32]:
    """Return the corners of all squares of this edge that lie in the block: (N, 2)."""
    columns = (COLUMNS * STORED_PX - offset[0]) // edge_l0
    rows = (ROWS * STORED_PX - offset[1]) // edge_l0
    x, y = np.meshgrid(np.arange(columns) * edge_l0, np.arange(rows) * edge_l0)
    corners = np.stack([x.ravel() + offset[0], y.ravel() + offset[1]], axis=1)
    return (corners + np.array(origin) * STORED_PX).astype(np.int32)


def stored_streams(
    path: Path, stored: StoredLevel, corners: NDArray[np.int32], edge_px: int
) -> list[bytes]:
    """Return the complete JPEG of every stored tile that squares at level 0 touch, once each."""
    numbers = set()
    for x, y in corners.tolist():
        columns = range(x // STORED_PX, -(-(x + edge_px) // STORED_PX))
        for row in range(y // STORED_PX, -(-(y + edge_px) // STORED_PX)):
            numbers |= {row * stored.across + column for column in columns}
    with path.open("rb") as handle:
        streams = []
        for number in sorted(numbers):
            handle.seek(int(stored.offsets[number]))
            content = handle.read(int(stored.byte_counts[number]))
            streams.append(complete_stream(stored.prefix, content))
    return streams


def raw_decode(streams: list[bytes]) -> Callable[[], Callable[[], None]]:
    buffer = cached_buffer(256, 256)

    def run() -> None:
        for stream in streams:
            simplejpeg.decode_jpeg(stream, "RGB", buffer=buffer)

    return lambda: run


def ours(
    path: Path, corners: NDArray[np.int32], plan: ReadPlan, threads: int
) -> Callable[[], Callable[[], None]]:
    out = np.empty((BATCH, plan.tile_px, plan.tile_px, 3), np.uint8)

    def start() -> Callable[[], None]:
        slide = open_slide(path)

        def run() -> None:
            for first in range(0, len(corners), BATCH):
                part = corners[first : first + BATCH]
                slide.read_tiles(part, plan, threads=threads, out=out[: len(part)])
            slide.close()

        return run

    return start


def theirs(
    path: Path, corners: NDArray[np.int32], plan: ReadPlan
) -> Callable[[], Callable[[], None]]:
    """Read as tools do with OpenSlide: read_region, PIL, resize where the scale differs."""

    def start() -> Callable[[], None]:
        slide = openslide.OpenSlide(path)

        def run() -> None:
            for x, y in corners.tolist():
                image = slide.read_region((x, y), 0, (plan.region_px,) * 2).convert("RGB")
                if plan.region_px != plan.tile_px:
                    image = image.resize((plan.tile_px,) * 2, Image.Resampling.BILINEAR)
                np.asarray(image)
            slide.close()

        return run

    return start


def check_pixels(path: Path, corners: NDArray[np.int32], plan: ReadPlan) -> None:
    """Stop unless a sample of tiles equals OpenSlide's."""
    sample = corners[:: max(1, len(corners) // 64)]
    with open_slide(path) as slide, openslide.OpenSlide(path) as reference:
        if not isinstance(slide, JpegTiffSlide):
            sys.exit("the fast path does not read this slide")
        tiles = slide.read_tiles(sample, plan).images
        for tile, (x, y) in zip(tiles, sample.tolist(), strict=True):
            region = reference.read_region((x, y), 0, (plan.region_px,) * 2).convert("RGB")
            expected = np.asarray(region)
            if plan.region_px != plan.tile_px:
                size = (plan.tile_px,) * 2
                expected = cv2.resize(expected, size, interpolation=cv2.INTER_AREA)
            if not np.array_equal(tile, expected):
                sys.exit(f"tile at {x}, {y} differs from OpenSlide's: nothing was timed")


def measure(cases: list[Case], rounds: int) -> dict[str, float]:
    """Return tiles per second, the median over interleaved rounds.

    A case during which other programs used the processor is timed again, a few times at most.
    """
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_ in range(rounds + 1):
        for case in cases:
            for _ in range(PATIENCE):
                run = case.start()
                watch = recording.Watch()
                run()
                seconds, others = watch.stop()
                if round_ == 0 or others < QUIET:
                    break
                time.sleep(0.5)
            if round_:  # the first round fills the page cache
                rates[case.name].append(case.tiles / seconds)
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--slide", type=Path, help="an SVS of tiled JPEG at 256 px; else made")
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.slide or Path(folder) / "slide.svs"
        if options.slide is None:
            build_slide(path)
        rows = run_all(path, options.rounds)
    recording.show(rows)
    if options.record:
        recording.record(
            "reading", rows, packages=("simplejpeg", "openslide-bin", "opencv-python-headless")
        )


def run_all(path: Path, rounds: int) -> list[recording.Row]:
    native = plan_read([1.0], MPP, mpp=MPP, tile_px=256)
    half = plan_read([1.0], MPP, mpp=2 * MPP, tile_px=256)
    stored = stored_level(path)
    origin = heaviest_block(stored)
    aligned = lattice(origin, 256)
    unaligned = lattice(origin, 256, OFFSET_PX)
    coarse = lattice(origin, 512)
    for corners, plan in ((aligned, native), (unaligned, native), (coarse, half)):
        check_pixels(path, corners, plan)
    aligned_streams = stored_streams(path, stored, aligned, 256)
    unaligned_streams = stored_streams(path, stored, unaligned, 256)
    fewer = slice(None, None, OPENSLIDE_SHARE)
    # OpenSlide has a cache too, so where tiles overlap stored ones it gets neighbouring ones.
    block = slice(0, len(unaligned) // OPENSLIDE_SHARE)
    count = len(aligned)
    cases = [
        Case("raw", count, raw_decode(aligned_streams)),
        Case("aligned 1", count, ours(path, aligned, native, 1)),
        Case("aligned 2", count, ours(path, aligned, native, 2)),
        Case("aligned openslide", len(aligned[fewer]), theirs(path, aligned[fewer], native)),
        Case("unaligned 1", len(unaligned), ours(path, unaligned, native, 1)),
        Case("unaligned 2", len(unaligned), ours(path, unaligned, native, 2)),
        Case("unaligned openslide", len(unaligned[block]), theirs(path, unaligned[block], native)),
        Case("raw again", len(unaligned_streams), raw_decode(unaligned_streams)),
        Case("half 1", len(coarse), ours(path, coarse, half, 1)),
        Case("half 2", len(coarse), ours(path, coarse, half, 2)),
        Case("half openslide", len(coarse[fewer]), theirs(path, coarse[fewer], half)),
    ]
    rate = measure(cases, rounds)
    touched = len(unaligned_streams) / len(unaligned)
    limit = rate["raw again"] / touched
    kilobytes = sum(map(len, aligned_streams)) / len(aligned_streams) / 1000
    row = recording.Row
    return [
        row("stored tile, mean", kilobytes, "kB"),
        row("raw libjpeg-turbo", rate["raw"], "tiles/s"),
        row("aligned 256 px, 1 thread", rate["aligned 1"], "tiles/s"),
        row("aligned ÷ raw", rate["aligned 1"] / rate["raw"], "×", at_least=0.90),
        row("aligned ÷ OpenSlide", rate["aligned 1"] / rate["aligned openslide"], "×", at_least=4),
        row("aligned, 2 threads ÷ 1", rate["aligned 2"] / rate["aligned 1"], "×", at_least=1.8),
        row("stored tiles touched per unaligned tile", touched, ""),
        row("unaligned 256 px, 1 thread", rate["unaligned 1"], "tiles/s"),
        row("unaligned ÷ (raw ÷ touched)", rate["unaligned 1"] / limit, "×", at_least=0.85),
        row("unaligned ÷ OpenSlide", rate["unaligned 1"] / rate["unaligned openslide"], "×"),
        row(
            "unaligned, 2 threads ÷ 1", rate["unaligned 2"] / rate["unaligned 1"], "×", at_least=1.6
        ),
        row("512 → 256 px, exact, 1 thread", rate["half 1"], "tiles/s"),
        row("512 → 256 px ÷ (raw ÷ 4)", rate["half 1"] / (rate["raw again"] / 4), "×"),
        row(
            "512 → 256 px ÷ OpenSlide and resize",
            rate["half 1"] / rate["half openslide"],
            "×",
            at_least=5.5,
        ),
        row("512 → 256 px, 2 threads ÷ 1", rate["half 2"] / rate["half 1"], "×"),
    ]


if __name__ == "__main__":
    main()
