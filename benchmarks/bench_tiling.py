"""Tissue and tiles of a 60,000 × 50,000 px slide: in process, and as a cold command.

    python benchmarks/bench_tiling.py [--record] [--slide SLIDE.svs] [--rounds 7]

The cold command is compared with starting Python and importing what any tiler needs, in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import recording

from bagscope.wsi.lattice import Lattice
from bagscope.wsi.opening import open_slide
from bagscope.wsi.outline import MaskFrame
from bagscope.wsi.synthetic import SyntheticSpec, write_slide
from bagscope.wsi.tiles import tile_slide
from bagscope.wsi.tiling import TilingSpec

IMPORTS = "import numpy, cv2, h5py, openslide"
BAGSCOPE = Path(sys.executable).with_name("bagscope")


def main() -> None:
    """Measure, compare with the targets, record."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = arguments.slide or make_slide(folder / "slide.svs")
        check(path)
        rows = [
            recording.Row(
                "tissue + tiles in process, warm, 2 threads",
                median_seconds(lambda: tile(path, threads=2), arguments.rounds),
                "s",
                at_most=0.3,
            ),
            recording.Row(
                "tissue + tiles in process, warm, 1 thread",
                median_seconds(lambda: tile(path, threads=1), arguments.rounds),
                "s",
            ),
            lattice_row(arguments.rounds),
            *command_rows(folder, path, arguments.rounds),
        ]
    recording.show(rows)
    if arguments.record:
        packages = ["numpy", "opencv-python-headless", "h5py", "openslide-python"]
        recording.record("tiling", rows, packages=packages)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="append to results.csv")
    parser.add_argument("--slide", type=Path, help="use this slide and do not make one")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def make_slide(path: Path) -> Path:
    started = time.perf_counter()
    write_slide(path, SyntheticSpec(width_px=60_000, height_px=50_000, seed=1))
    print(f"made the slide in {time.perf_counter() - started:.0f} s, {path.stat().st_size:,} bytes")
    return path


def tile(path: Path, *, threads: int) -> int:
    with open_slide(path) as slide:
        return len(tile_slide(slide, TilingSpec(), threads=threads).tiles)


def check(path: Path) -> None:
    """Refuse to time what is wrong: tiles must lie in bounds and on tissue."""
    with open_slide(path) as slide:
        tiled = tile_slide(slide, TilingSpec())
        tiles = tiled.tiles
        edge = tiles.plan.extent_l0
        inside = tiles.coords_l0 + edge <= (slide.info.width_l0 + 0.5, slide.info.height_l0 + 0.5)
        picture = slide.read_tiles(tiles.coords_l0[:: max(1, len(tiles) // 50)], tiles.plan)
    if not (len(tiles) > 1000 and inside.all() and picture.readable.all()):
        raise SystemExit(f"{path}: {len(tiles)} tiles; the tiling is wrong, not timing it")
    if picture.images.mean() > 235:
        raise SystemExit(f"{path}: the tiles show glass; the tiling is wrong, not timing it")
    print(f"{len(tiles)} tiles kept")


def lattice_row(rounds: int) -> recording.Row:
    mask = np.random.default_rng(0).random((1600, 1900)) < 0.5
    frame = MaskFrame(shape=mask.shape, origin_x_l0=0, origin_y_l0=0, px_l0_x=32.0, px_l0_y=32.0)
    lattice = Lattice(
        origin_x_l0=0, origin_y_l0=0, step_l0=116.0, extent_l0=512.0, columns=500, rows=400
    )
    seconds = median_seconds(lambda: lattice.coverage(mask, frame), rounds)
    return recording.Row("200,000 candidates measured against a mask", seconds * 1000, "ms")


def command_rows(folder: Path, slide: Path, rounds: int) -> list[recording.Row]:
    """Time the cold command and the bare imports in turn, and the command's peak memory."""
    command_s, imports_s = [], []
    study = folder / "study"
    subprocess.run([BAGSCOPE, "init", study, "--slides", slide], check=True, capture_output=True)
    for _ in range(rounds + 1):
        shutil.rmtree(study / "tilings", ignore_errors=True)
        shutil.rmtree(study / "status", ignore_errors=True)
        command_s.append(run([str(BAGSCOPE), "tile", str(study)]))
        imports_s.append(run([sys.executable, "-c", IMPORTS]))
    ratios = [a / b for a, b in zip(command_s[1:], imports_s[1:], strict=True)]
    peak = peak_mib([str(BAGSCOPE), "tile", str(study), "--overwrite", "--tile-px", "255"])
    return [
        recording.Row("bagscope tile, cold", statistics.median(command_s[1:]), "s"),
        recording.Row(f"python -c '{IMPORTS}'", statistics.median(imports_s[1:]), "s"),
        recording.Row("bagscope tile ÷ those imports", statistics.median(ratios), "×", at_most=3),
        recording.Row("peak memory of the largest process", peak, "MiB", at_most=250),
    ]


def run(command: list[str]) -> float:
    """Run a command; return its seconds."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def peak_mib(command: list[str]) -> float:
    """Run a command; return the peak memory of its largest process, workers included.

    Each process keeps its own high-water mark, which is read as often as the system allows, so
    that what a short-lived worker reached last is not missed by much.
    """
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError, IndexError):
                status = Path(f"/proc/{member.pid}/status").read_text()
                peak = max(peak, int(status.split("VmHWM:")[1].split()[0]))
    return peak / 1024


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    work()
    samples = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)


if __name__ == "__main__":
    main()
