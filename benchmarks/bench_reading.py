"""How fast tiles are read, against raw libjpeg-turbo and OpenSlide on the same slide.

Correctness first: a sample of tiles must equal OpenSlide's pixel by pixel, or nothing is timed.
Then every case runs once per round, all cases interleaved, so that a slow moment of the machine
hits them alike; numbers are medians over the rounds, and goals are ratios within one run.

    python benchmarks/bench_reading.py [--rounds 7] [--slide FILE.svs] [--record]
"""

from __future__ import annotations

import argparse
import os
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
from bagscope.wsi.stored_tiles import stored_levels
from bagscope.wsi.synthetic.svs_writer import SvsHeader, SvsWriter

EDGE_PX = 20_480
MPP = 0.25
COLUMNS, ROWS = 40, 25
OFFSET_L0 = (96, 160)
BATCH = 256
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


def build_slide(path: Path, seed: int = 0) -> None:
    """Write a slide whose stored tiles weigh what tissue weighs (about 20 kB at 4:2:2, Q80)."""
    rng = np.random.default_rng(seed)
    edge = 4096
    field = np.zeros((edge, edge, 3), np.float32)
    for sigma, strength in ((1.2, 22), (4, 30), (16, 30)):
        grains = rng.normal(0, 1, (edge, edge)).astype(np.float32)
        smooth = cv2.GaussianBlur(grains, (0, 0), sigma)
        smooth *= strength / smooth.std()
        field += smooth[..., None] * np.float32([0.8, 1.1, 0.6])
    texture = np.clip(field + np.float32([190, 140, 180]), 0, 255).astype(np.uint8)
    with SvsWriter(
        path,
        [(EDGE_PX, EDGE_PX), (EDGE_PX // 4, EDGE_PX // 4)],
        tile_px=256,
        header=SvsHeader(mpp=MPP, objective=40),
        quality=80,
        subsampling="4:2:2",
        force_bigtiff=True,
    ) as writer:
        for level, size in enumerate((EDGE_PX, EDGE_PX // 4)):
            for _ in range(size // 256):
                x, y = rng.integers(0, edge - 256, 2)
                strip = np.roll(texture[y : y + 256], -int(x), axis=1)
                writer.write_tile_row(level, np.tile(strip, (1, -(-size // edge), 1))[:, :size])


def lattice(step_l0: int, columns: int, rows: int, offset_l0: tuple[int, int]) -> NDArray[np.int32]:
    x, y = np.meshgrid(np.arange(columns) * step_l0, np.arange(rows) * step_l0)
    corners = np.stack([x.ravel() + offset_l0[0], y.ravel() + offset_l0[1]], axis=1)
    return corners.astype(np.int32)


def stored_streams(path: Path, corners: NDArray[np.int32], edge_px: int) -> list[bytes]:
    """Return the complete JPEG of every stored tile that squares at level 0 touch, once each."""
    slide = openslide.OpenSlide(path)
    levels = [
        Level(width_px=w, height_px=h, downsample=d)
        for (w, h), d in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
    ]
    stored = stored_levels(path, "aperio", levels)[0]
    descriptor = os.open(path, os.O_RDONLY)
    numbers = set()
    for x, y in corners.tolist():
        for row in range(y // 256, -(-(y + edge_px) // 256)):
            numbers |= {row * stored.across + c for c in range(x // 256, -(-(x + edge_px) // 256))}
    streams = [
        complete_stream(
            stored.prefix,
            os.pread(descriptor, int(stored.byte_counts[n]), int(stored.offsets[n])),
        )
        for n in sorted(numbers)
    ]
    os.close(descriptor)
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
    """Return tiles per second, the median over interleaved rounds."""
    rates: dict[str, list[float]] = {case.name: [] for case in cases}
    for round_ in range(rounds + 1):
        for case in cases:
            run = case.start()
            begin = time.perf_counter()
            run()
            if round_:  # the first round fills the page cache
                rates[case.name].append(case.tiles / (time.perf_counter() - begin))
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
    native = plan_read([1.0, 4.0], MPP, mpp=MPP, tile_px=256)
    half = plan_read([1.0, 4.0], MPP, mpp=2 * MPP, tile_px=256)
    aligned = lattice(256, COLUMNS, ROWS, (0, 0))
    unaligned = lattice(256, COLUMNS, ROWS, OFFSET_L0)
    coarse = lattice(512, COLUMNS, ROWS, (0, 0))
    for corners, plan in ((aligned, native), (unaligned, native), (coarse, half)):
        check_pixels(path, corners, plan)
    aligned_streams = stored_streams(path, aligned, 256)
    unaligned_streams = stored_streams(path, unaligned, 256)
    coarse_streams = stored_streams(path, coarse, 512)
    fewer = slice(None, None, OPENSLIDE_SHARE)
    block = slice(0, len(aligned) // OPENSLIDE_SHARE)
    count = len(aligned)
    cases = [
        Case("raw", len(aligned_streams), raw_decode(aligned_streams)),
        Case("aligned 1", count, ours(path, aligned, native, 1)),
        Case("aligned 2", count, ours(path, aligned, native, 2)),
        Case("aligned openslide", len(aligned[fewer]), theirs(path, aligned[fewer], native)),
        Case("raw again", len(unaligned_streams), raw_decode(unaligned_streams)),
        Case("unaligned 1", count, ours(path, unaligned, native, 1)),
        Case("unaligned 2", count, ours(path, unaligned, native, 2)),
        Case("unaligned openslide", len(unaligned[block]), theirs(path, unaligned[block], native)),
        Case("half raw", len(coarse_streams) // 4, raw_decode(coarse_streams[::4])),
        Case("half 1", count, ours(path, coarse, half, 1)),
        Case("half 2", count, ours(path, coarse, half, 2)),
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
        row("512 → 256 px ÷ (raw ÷ 4)", rate["half 1"] / (rate["half raw"] / 4), "×"),
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
