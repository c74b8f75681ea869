"""A study of small slides, tiny encoders, and runs of the extraction engine on them."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bagscope.cohort.executors.local import LocalExecutor
from bagscope.cohort.jobs import Job, RunOptions, RunReport, StageResult
from bagscope.cohort.progress import Event, SlideFinished
from bagscope.cohort.runner import run_cohort
from bagscope.cohort.status import Status, read_statuses
from bagscope.features.encoders.loading import LoadedEncoder
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.extract import ExtractExecutor, ExtractTask
from bagscope.features.feed import ChunkRead, FeedEvent, SlideFeed
from bagscope.features.reader import ReadTask, read_slide
from bagscope.features.ring import TileRing
from bagscope.features.session import EncoderSession
from bagscope.features.targets import Target
from bagscope.features.timing import Timing
from bagscope.pipeline.preload import WORKER_MODULES
from bagscope.wsi.identity import slide_identity
from bagscope.wsi.lattice import lattice_for
from bagscope.wsi.opening import open_slide
from bagscope.wsi.spacing import require_spacing
from bagscope.wsi.tile_file import write_tile_file
from bagscope.wsi.tiles import TileSet, plan_for
from bagscope.wsi.tiling import TilingSpec
from tests.builders import build_svs

TILE_PX = 64
INPUT_PX = 32
COLUMNS = 7

# Threads that wait for each other on a busy machine cost more than they bring to tiny networks.
torch.set_num_threads(1)


# --- encoders -------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A convolution and a mean: two tiles' vectors are far apart, and quickly computed."""

    def __init__(self, dimension: int = 8, *, seed: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, dimension, 8, stride=8)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 * scale)

    def forward(self, images: Tensor) -> Tensor:
        return self.conv(images).relu().mean(dim=(2, 3))


class Neighbourly(Tiny):
    """Rows depend on the whole batch, as with batch statistics."""

    def forward(self, images: Tensor) -> Tensor:
        vectors = super().forward(images)
        return vectors + 0.25 * vectors.mean(dim=0, keepdim=True)


def encoder_of(network: nn.Module, name: str = "tiny", **facts: Any) -> LoadedEncoder:
    """Return a network as an encoder, which sees tiles shrunk to half their edge."""
    values = {"input_px": INPUT_PX, "dimension": 8, "source": "bagscope", **facts}
    digest = hashlib.sha256(name.encode())
    for parameter in network.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return LoadedEncoder(
        spec=EncoderSpec(name=name, **values),
        network=network.eval().requires_grad_(False),
        weights_sha256=digest.hexdigest(),
    )


def session_of(network: nn.Module | LoadedEncoder, **options: Any) -> EncoderSession:
    """Return a session on the CPU, of batches of 8 tiles where nothing else is said."""
    encoder = network if isinstance(network, LoadedEncoder) else encoder_of(network)
    return EncoderSession(
        encoder, **{"device": "cpu", "tile_px": TILE_PX, "batch_size": 8, **options}
    )


# --- slides ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallStudy:
    """Slides with their tile files; `counts` says how many tiles each of them has."""

    folder: Path
    counts: Mapping[str, int]

    def slide_path(self, slide_id: str) -> Path:
        return self.folder / f"{slide_id}.svs"

    def tile_path(self, slide_id: str) -> Path:
        return self.folder / f"{slide_id}.h5"

    def jobs(self) -> list[Job]:
        return [
            Job(
                slide_id=slide_id,
                payload=ExtractTask(
                    slide_path=self.slide_path(slide_id), tile_path=self.tile_path(slide_id)
                ),
            )
            for slide_id in self.counts
        ]

    def pixels(self, slide_id: str) -> np.ndarray:
        """Return every tile of a slide (N, TILE_PX, TILE_PX, 3), read one by one."""
        with open_slide(self.slide_path(slide_id)) as slide:
            corners_l0 = tiles_of(slide, self.counts[slide_id]).coords_l0
            read = [slide.read_level(0, int(x), int(y), TILE_PX, TILE_PX) for x, y in corners_l0]
        return np.stack(read) if read else np.zeros((0, TILE_PX, TILE_PX, 3), np.uint8)


def make_study(
    folder: Path, counts: Mapping[str, int], *, max_unreadable: float = 0.01
) -> SmallStudy:
    """Write slides of so many tiles each, and their tile files."""
    folder.mkdir(parents=True, exist_ok=True)
    study = SmallStudy(folder, dict(counts))
    for index, (slide_id, count) in enumerate(counts.items()):
        rows = max(1, -(-count // COLUMNS))
        build_svs(
            study.slide_path(slide_id),
            width_px=COLUMNS * TILE_PX,
            height_px=rows * TILE_PX,
            downsamples=(1,),
            tile_px=TILE_PX,
            seed=index + 1,
            # Another phase of the field for every slide: noise alone would look the same.
            image=_field(rows * TILE_PX, seed=index),
        )
        tile_file(study, slide_id, max_unreadable=max_unreadable)
    return study


def _field(height_px: int, *, seed: int) -> np.ndarray:
    """Return an image whose every tile has a colour of its own, under some texture."""
    generator = np.random.default_rng(seed)
    cells = generator.integers(40, 216, (height_px // TILE_PX, COLUMNS, 3))
    image = cells.repeat(TILE_PX, axis=0).repeat(TILE_PX, axis=1)
    texture = generator.normal(0, 12, image.shape)
    return np.clip(image + texture, 0, 255).astype(np.uint8)


def tile_file(
    study: SmallStudy, slide_id: str, *, max_unreadable: float = 0.01, states: str | None = None
) -> None:
    """Write the tile file of a slide; it may state the id of another one."""
    with open_slide(study.slide_path(slide_id)) as slide:
        tiles = tiles_of(slide, study.counts[slide_id], max_unreadable=max_unreadable)
    write_tile_file(
        study.tile_path(slide_id),
        tiles,
        slide_id=states or slide_id,
        fields={
            "stage": "tile",
            "spec": tiles.spec.model_dump(mode="json"),
            "slide": slide_identity(study.slide_path(slide_id)),
        },
        tissue_method="none",
        outline_geojson="{}",
        summary={"tiles": len(tiles)},
    )


def tiles_of(slide: Any, count: int, *, max_unreadable: float = 0.01) -> TileSet:
    """Return the first `count` places of a slide's lattice as its tiles."""
    spec = TilingSpec(mpp=0.5, tile_px=TILE_PX, max_unreadable=max_unreadable)
    spacing = require_spacing(slide.info)
    plan = plan_for(slide.info, spacing, spec, spec.mpp)
    lattice = lattice_for(slide.info.bounds_l0, plan, overlap_px=0)
    grid = lattice.grid()[:count]
    assert len(grid) == count
    share = np.ones(count, np.float32)
    return TileSet(
        info=slide.info,
        spacing=spacing,
        spec=spec,
        plan=plan,
        lattice=lattice,
        coords_l0=lattice.corners_l0(grid),
        grid=grid,
        tissue=share,
        pen=share * 0,
        fold=share * 0,
        sharpness=share,
        dropped={"candidates": lattice.columns * lattice.rows},
    )


def alone(encoder: LoadedEncoder, tiles: np.ndarray) -> np.ndarray:
    """Return the vectors of tiles (N, h, w, 3), each encoded by itself: Pillow, NumPy, float32."""
    spec = encoder.spec
    vectors = []
    for tile in tiles:
        small = Image.fromarray(tile).resize((spec.input_px,) * 2, Image.Resampling.BICUBIC)
        values = (np.asarray(small, np.float32) / 255 - np.array(spec.mean)) / np.array(spec.std)
        image = torch.tensor(values.transpose(2, 0, 1)[None], dtype=torch.float32)
        with torch.inference_mode():
            vectors.append(encoder.network(image).numpy()[0])
    return np.stack(vectors) if vectors else np.zeros((0, spec.dimension), np.float32)


# --- runs -----------------------------------------------------------------------------------


@dataclass
class Ran:
    """A run of the engine, and what could be seen of it from outside.

    `tiles_read` counts tiles that readers handed over; `most_open` is how many unfinished files
    stood in the folders at a time.
    """

    report: RunReport
    timing: Timing
    statuses: dict[str, Status]
    seconds: dict[str, float] = field(default_factory=dict)
    tiles_read: int = 0
    most_open: int = 0

    def status(self, slide_id: str) -> Status:
        return self.statuses[slide_id]

    @property
    def outcomes(self) -> dict[str, str]:
        return {slide_id: status.outcome for slide_id, status in self.statuses.items()}


class Interruption:
    """A reporter that calls something when so many slides have ended."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        self.left, self.act = after, act

    def emit(self, event: Event) -> None:
        if isinstance(event, SlideFinished):
            self.left -= 1
            if self.left == 0:
                self.act()


class _Silent:
    def emit(self, event: Event) -> None:
        return None


def run_engine(
    study: SmallStudy,
    sessions: EncoderSession | Sequence[EncoderSession],
    out: Path,
    *,
    readers: int = 1,
    work: Callable[[Job], StageResult] = read_slide,
    rows: int = 5,
    slots: int | None = None,
    timeout_s: float | None = None,
    memory_limit_mib: float | None = None,
    overwrite: bool = False,
    shard: tuple[int, int] | None = None,
    jobs: Sequence[Job] | None = None,
    report: Any = None,
    stored_dtype: Any = "float16",
    see: Callable[[FeedEvent], None] | None = None,
) -> Ran:
    """Extract a study into `out/features/<encoder>`, with status in `out/status`."""
    chosen = [sessions] if isinstance(sessions, EncoderSession) else list(sessions)
    targets = [
        Target(session=s, folder=out / "features" / s.spec.name, stored_dtype=stored_dtype)
        for s in chosen
    ]
    ran = Ran(None, None, {})  # type: ignore[arg-type]
    ring = TileRing(slots=slots or readers + 2, rows=rows, tile_px=TILE_PX)
    made: list[ExtractExecutor] = []

    def feed(post: Callable[[FeedEvent], None]) -> SlideFeed:
        def watched(event: FeedEvent) -> None:
            if isinstance(event, ChunkRead):
                ran.tiles_read += event.chunk.count
                ran.most_open = max(ran.most_open, len(list(out.rglob("*.h5.*.tmp"))))
            if see is not None:
                see(event)
            post(event)

        def pool(on_message: Callable[[str, bytes], None]) -> LocalExecutor:
            return LocalExecutor(
                pickle.dumps(work),
                module=work.__module__,
                workers=readers,
                timeout_s=timeout_s,
                memory_limit_mib=memory_limit_mib,
                preload=WORKER_MODULES,
                on_message=on_message,
            )

        return SlideFeed(pool, ring, watched)

    def make_executor() -> ExtractExecutor:
        made.append(
            ExtractExecutor(
                targets,
                feed,
                readers=readers,
                read_task=lambda task: read_task(task, ring),
                overwrite=overwrite,
            )
        )
        return made[0]

    ran.report = run_cohort(
        study.jobs() if jobs is None else jobs,
        _never,
        stage="extract",
        status_dir=out / "status",
        options=RunOptions(shard=shard, sweep=tuple(target.folder for target in targets)),
        report=report or _Silent(),
        make_executor=make_executor,
    )
    ran.timing = made[0].timing()
    ran.statuses = read_statuses(out / "status", "extract")
    return ran


def read_task(task: ExtractTask, ring: TileRing) -> ReadTask:
    """Return a reader's task."""
    return ReadTask(
        slide_path=task.slide_path,
        tile_path=task.tile_path,
        mpp=task.mpp,
        scene=task.scene,
        backend=task.backend,
        threads=1,
        ring_path=ring.path,
        ring_slots=ring.slots,
        ring_rows=ring.rows,
        tile_px=ring.tile_px,
    )


def _never(job: Job) -> StageResult:
    raise AssertionError("the engine does the work itself")


def features_of(out: Path) -> dict[str, bytes]:
    """Return the bytes of every file below the feature folders."""
    folder = out / "features"
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[Path]:
    """Return temporaries and claims."""
    return [*folder.rglob("*.tmp"), *folder.rglob("*.claim")]


def changed(job: Job, **values: Any) -> Job:
    """Return a job with other values in its payload."""
    return replace(job, payload=replace(job.payload, **values))
