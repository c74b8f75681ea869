"""How fast tiles become vectors, against the encoder alone and the loop that the field runs.

The loop: a DataLoader over openslide-python whose items are resized and normalised one by one, and
a float32 network. Ours: the whole engine, from the slide's file to the stored features. Networks
have random weights, which cost what trained ones do. Correctness first: the engine's vectors must
equal those of the loop's own pixels up to the resampling.

    python benchmarks/bench_extract.py [--rounds 3] [--tiles 768] [--record]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import recording
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bagscope.arithmetic import avoid_broken_units, keep_freed_memory
from bagscope.cohort.jobs import Job
from bagscope.cohort.progress import SilentReporter
from bagscope.features.encoders.loading import LoadedEncoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.extract import ExtractExecutor, ExtractTask, make_feed
from bagscope.features.feature_file import read_feature_file
from bagscope.features.precision import cpu_policy
from bagscope.features.ring import TileRing
from bagscope.features.session import EncoderSession
from bagscope.features.targets import Target
from bagscope.features.transform import TileTransform
from bagscope.pipeline.extract import read_task_for
from bagscope.pipeline.preload import WORKER_MODULES
from bagscope.pipeline.study import init_study, open_study
from bagscope.pipeline.tile import tile_cohort
from bagscope.wsi.opening import open_slide
from bagscope.wsi.synthetic import SyntheticSpec, write_slide
from bagscope.wsi.tile_file import TileFile, read_tile_file

TILE_PX, INPUT_PX, BATCH = 256, 224, 32
NETWORKS = {"resnet18": 512, "vit_tiny_patch16_224": 192}
GOALS = {"resnet18": 4.0, "vit_tiny_patch16_224": 3.0}
LEAST_COSINE = 0.99
SMALL_AND_LARGE = (5_000, 100_000)
MEMORY_SCRIPT = """
import resource
from pathlib import Path
from bagscope.cohort.progress import SilentReporter
from bagscope.pipeline.extract import extract_cohort
from bagscope.pipeline.study import open_study
features = {{"encoders": ["color-texture"], "device": "cpu", "batch_size": 64}}
study = open_study(Path("{study}"), {{"tiling": {options}, "features": features}})
report = extract_cohort(study, SilentReporter()).report
print(report.tiles, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def build_study(folder: Path, tiles: int) -> tuple[Path, TileFile, Path]:
    """Write a slide, tile it and return slide, tiles and the tile file's path."""
    slide = folder / "slides" / "a.svs"
    slide.parent.mkdir()
    edge_px = int(np.ceil(np.sqrt(tiles / 0.55)) + 2) * TILE_PX
    spec = SyntheticSpec(width_px=edge_px, height_px=edge_px, mpp=0.5, seed=1, tissue_fraction=0.6)
    write_slide(slide, spec, threads=2)
    init_study(folder / "study", str(slide.parent))
    study = open_study(folder / "study", {"tiling": {"max_tiles": tiles}})
    tile_cohort(study, SilentReporter())
    (path,) = (folder / "study").rglob("a.h5")
    return slide, read_tile_file(path), path


def encoder(name: str) -> LoadedEncoder:
    """Return an encoder with random weights."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    spec = EncoderSpec(
        name=name,
        source="timm",
        input_px=INPUT_PX,
        interpolation="bilinear",
        dimension=NETWORKS[name],
        dtype="bfloat16",
    )
    return LoadedEncoder(spec=spec, network=network, weights_sha256="random")


class FieldLoop(Dataset[Any]):
    """One tile per item, as tools in use read them."""

    def __init__(self, slide: Path, tiles: TileFile) -> None:
        self.slide, self.coords = slide, tiles.coords_l0
        self.mean = np.array([0.485, 0.456, 0.406], np.float32)
        self.std = np.array([0.229, 0.224, 0.225], np.float32)
        self.opened: openslide.OpenSlide | None = None

    def __len__(self) -> int:
        return len(self.coords)

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.opened is None:
            self.opened = openslide.OpenSlide(self.slide)
        x_l0, y_l0 = self.coords[index].tolist()
        image = self.opened.read_region((x_l0, y_l0), 0, (TILE_PX, TILE_PX)).convert("RGB")
        small = image.resize((INPUT_PX, INPUT_PX), Image.Resampling.BILINEAR)
        pixels = np.asarray(small, np.float32) / 255
        return torch.from_numpy((pixels - self.mean) / self.std).permute(2, 0, 1).contiguous()


def run_loop(data: FieldLoop, network: torch.nn.Module) -> NDArray[np.float32]:
    """Encode all tiles the way of the field, float32."""
    with torch.inference_mode():
        parts = [network(batch) for batch in DataLoader(data, batch_size=BATCH, num_workers=0)]
    vectors: NDArray[np.float32] = torch.cat(parts).numpy()
    return vectors


class LoopProcess:
    """The loop in a process of its own, which our settings don't reach."""

    def __init__(self, name: str, slide: Path, tile_path: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(
            target=serve_loop, args=(theirs, name, slide, tile_path), daemon=True
        )
        self.process.start()

    def run(self) -> NDArray[np.float32]:
        """Encode all tiles once."""
        self.channel.send("run")
        vectors: NDArray[np.float32] = self.channel.recv()
        return vectors

    def close(self) -> None:
        """End the process."""
        self.channel.send("stop")
        self.process.join()


def serve_loop(channel: Any, name: str, slide: Path, tile_path: Path) -> None:
    """Run the loop whenever asked."""
    avoid_broken_units()
    data, network = FieldLoop(slide, read_tile_file(tile_path)), encoder(name).network
    while channel.recv() == "run":
        channel.send(run_loop(data, network))


class Engine:
    """The engine on one slide, session and readers at hand."""

    def __init__(
        self,
        session: EncoderSession,
        slide: Path,
        tile_path: Path,
        out: Path,
        slide_id: str = "a",
    ) -> None:
        self.out, self.slide_id = out, slide_id
        self.task = ExtractTask(slide_path=slide, tile_path=tile_path)
        ring = TileRing(slots=8, rows=64, tile_px=TILE_PX)
        self.executor = ExtractExecutor(
            [Target(session=session, folder=out)],
            make_feed(
                ring, readers=1, timeout_s=None, memory_limit_mib=None, preload=WORKER_MODULES
            ),
            readers=1,
            read_task=read_task_for(ring, threads=1),
        )

    def run(self) -> None:
        """Extract the slide anew."""
        (self.out / f"{self.slide_id}.h5").unlink(missing_ok=True)
        self.executor.start(Job(slide_id=self.slide_id, payload=self.task))
        ended = self.executor.wait(600.0)
        while not ended:
            ended = self.executor.wait(600.0)
        assert ended[0].record["outcome"] == "done", ended[0].record

    def vectors(self) -> NDArray[np.float32]:
        """Return what was stored."""
        return np.asarray(read_feature_file(self.out / f"{self.slide_id}.h5").features, np.float32)


def rate(work: Callable[[], object], tiles: int) -> float:
    """Return tiles per second of one go."""
    begin_s = time.perf_counter()
    work()
    return tiles / (time.perf_counter() - begin_s)


def bench_network(
    name: str, slide: Path, tiles: TileFile, tile_path: Path, out: Path, rounds: int, compiled: bool
) -> list[recording.Row]:
    """Return the ratios of one network."""
    session = EncoderSession(encoder(name), device="cpu", tile_px=TILE_PX, batch_size=BATCH)
    if compiled:
        session.compile()
    engine = Engine(session, slide, tile_path, out / name)
    loop = LoopProcess(name, slide, tile_path)
    engine.run()
    ours, theirs = engine.vectors(), loop.run()
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine = float(((ours * theirs).sum(axis=1) / norms).min())
    if cosine < LEAST_COSINE:
        sys.exit(f"{name}: the engine's vectors differ from the loop's (cosine {cosine:.4f})")
    ready = session.ready(session.new_batch())
    count = len(tiles) - len(tiles) % BATCH

    def alone() -> None:
        with torch.inference_mode():
            for _ in range(count // BATCH):
                session.run_ready(ready)

    cases: dict[str, Callable[[], object]] = {
        "alone": alone,
        "engine": engine.run,
        "loop": loop.run,
    }
    found: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case, work in cases.items():
            found[case].append(rate(work, count if case == "alone" else len(tiles)))
    engine.executor.close()
    loop.close()
    of_alone = [a / b for a, b in zip(found["engine"], found["alone"], strict=True)]
    of_loop = [a / b for a, b in zip(found["engine"], found["loop"], strict=True)]
    how = f"{session.precision}{', compiled' if session.is_compiled else ''}"
    median = statistics.median
    return [
        recording.Row(f"{name}: encoder alone ({how})", median(found["alone"]), "tiles/s"),
        recording.Row(f"{name}: engine, slide to features", median(found["engine"]), "tiles/s"),
        recording.Row(f"{name}: DataLoader loop, float32", median(found["loop"]), "tiles/s"),
        recording.Row(f"{name}: engine ÷ encoder alone", median(of_alone), "×", at_least=0.93),
        recording.Row(f"{name}: engine ÷ loop", median(of_loop), "×", at_least=GOALS[name]),
        recording.Row(f"{name}: least cosine to the loop's vectors", cosine, "", at_least=0.99),
    ]


def bench_feed(slide: Path, tiles: TileFile, rounds: int) -> list[recording.Row]:
    """Return how fast one core feeds an encoder, against the loop's items."""
    from bagscope.features.reader import read_plan_of

    transform = TileTransform(encoder("resnet18").spec)
    data = FieldLoop(slide, tiles)
    count = min(len(tiles), 512)
    found: dict[str, list[float]] = {"ours": [], "loop": []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with open_slide(slide) as opened:
            plan = read_plan_of(tiles, opened)

            def feed() -> None:
                for start in range(0, count, 64):
                    batch = opened.read_tiles(tiles.coords_l0[start : start + 64], plan, threads=1)
                    pixels = torch.from_numpy(batch.images)
                    transform.normalise(transform.to_input_u8(pixels), torch.float32)

            def items() -> None:
                for index in range(count):
                    data[index]

            feed()
            for _ in range(rounds):
                found["ours"].append(rate(feed, count))
                found["loop"].append(rate(items, count))
    finally:
        torch.set_num_threads(threads)
    ratio = statistics.median(a / b for a, b in zip(found["ours"], found["loop"], strict=True))
    return [
        recording.Row(
            "feed, one core: decode to normalised", statistics.median(found["ours"]), "tiles/s"
        ),
        recording.Row(
            "feed, one core: the loop's dataset", statistics.median(found["loop"]), "tiles/s"
        ),
        recording.Row("feed, one core: ours ÷ loop's dataset", ratio, "×", at_least=7),
    ]


def bench_memory(folder: Path) -> list[recording.Row]:
    """Return how much more memory twenty times as many tiles take, in processes of their own."""
    slide = folder / "memory" / "a.svs"
    slide.parent.mkdir()
    spec = SyntheticSpec(width_px=8192, height_px=8192, mpp=0.5, seed=1, tissue_fraction=0.6)
    write_slide(slide, spec, threads=2)
    peaks = []
    for tiles in SMALL_AND_LARGE:
        study = folder / f"memory_{tiles}"
        options = {"tile_px": 64, "overlap_px": 46, "max_tiles": tiles, "min_sharpness": 0}
        init_study(study, str(slide.parent))
        tile_cohort(open_study(study, {"tiling": options}), SilentReporter())
        script = MEMORY_SCRIPT.format(study=str(study), options=options)
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        made, peak_kib = map(int, ran.stdout.split())
        assert made == tiles, f"{made} tiles in place of {tiles}"
        peaks.append(peak_kib / 1024)
    small, large = SMALL_AND_LARGE
    return [
        recording.Row(f"peak memory, {small:,} tiles", peaks[0], "MiB"),
        recording.Row(f"peak memory, {large:,} tiles", peaks[1], "MiB"),
        recording.Row("peak memory, large ÷ small", peaks[1] / peaks[0], "×", at_most=1.05),
    ]


def bench_bfloat16(folder: Path) -> list[recording.Row]:
    """Return how near bfloat16 features are to float32, and what a linear probe makes of both."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    from bagscope.features.encoders.loading import load_encoder
    from bagscope.wsi.synthetic import write_cohort

    write_cohort(folder / "cohort", slides=16, positives=8, size_px=3072, seed=3, workers=2)
    init_study(folder / "probe", str(folder / "cohort" / "cohort.csv"))
    study = open_study(folder / "probe", {"tiling": {"max_tiles": 24}})
    tile_cohort(study, SilentReporter())
    vectors: dict[str, list[NDArray[np.float32]]] = {"float32": [], "bfloat16": []}
    rows = study.cohort().rows
    for precision in vectors:
        session = EncoderSession(
            load_encoder("efficientnet-lite0"),
            device="cpu",
            tile_px=TILE_PX,
            precision=precision,  # type: ignore[arg-type]
            batch_size=BATCH,
        )
        for row in rows:
            (path,) = (folder / "probe" / "tilings").rglob(f"{row.slide_id}.h5")
            engine = Engine(session, row.path, path, folder / precision, slide_id=row.slide_id)
            engine.run()
            engine.executor.close()
            vectors[precision].append(engine.vectors())
    exact, short = (np.concatenate(vectors[name]) for name in ("float32", "bfloat16"))
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(short, axis=1)
    cosine = (exact * short).sum(axis=1) / norms
    labels = np.array([row.columns["label"] for row in rows])
    scores = {
        name: float(
            cross_val_score(
                LogisticRegression(C=0.01, max_iter=2000),
                np.stack([part.mean(axis=0) for part in parts]),
                labels,
                cv=4,
            ).mean()
        )
        for name, parts in vectors.items()
    }
    return [
        recording.Row("bfloat16: mean cosine to float32", float(cosine.mean()), "", at_least=0.999),
        recording.Row("bfloat16: least cosine to float32", float(cosine.min()), ""),
        recording.Row("linear probe, slides, float32", scores["float32"], "accuracy"),
        recording.Row("linear probe, slides, bfloat16", scores["bfloat16"], "accuracy"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=768)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    print(cpu_policy().note)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        rows = bench_memory(Path(folder)) + bench_bfloat16(Path(folder))
        slide, tiles, tile_path = build_study(Path(folder), arguments.tiles)
        print(f"{len(tiles)} tiles")
        rows += bench_feed(slide, tiles, arguments.rounds)
        for name in NETWORKS:
            rows += bench_network(
                name,
                slide,
                tiles,
                tile_path,
                Path(folder),
                arguments.rounds,
                not arguments.no_compile,
            )
    recording.show(rows)
    if arguments.record:
        packages = ("torch", "timm", "openslide-python", "simplejpeg")
        recording.record("extract", rows, packages=packages)


if __name__ == "__main__":
    main()
