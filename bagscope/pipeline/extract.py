"""The extract stage over a cohort: what the command and the library call. Light to import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.arithmetic import keep_freed_memory
from bagscope.artifacts import Json
from bagscope.cohort.jobs import Job, RunReport, StageResult, select_shard
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.cohort.status import read_status, read_statuses, tiles_of
from bagscope.cohort.table import SlideRow
from bagscope.errors import ArtifactError, ConfigError, EncoderUnavailable, SchemaError
from bagscope.features.extraction import NUMERICS, ExtractSpec
from bagscope.pipeline.preload import WORKER_MODULES
from bagscope.pipeline.study import Study, available_cores
from bagscope.pipeline.tile import run_options, scene_of, size_weight, tile_cohort
from bagscope.wording import counted
from bagscope.wsi.opening import require_backend
from bagscope.wsi.tiling import tiling_name

if TYPE_CHECKING:
    from bagscope.features.encoders.loading import LoadedEncoder
    from bagscope.features.encoders.weights import WeightSource
    from bagscope.features.extract import ExtractExecutor, ExtractTask
    from bagscope.features.reader import ReadTask
    from bagscope.features.ring import TileRing
    from bagscope.features.session import EncoderSession, Execution
    from bagscope.features.targets import Target
    from bagscope.features.timing import Timing

STAGE = "extract"
EXECUTION_NAME = "execution.json"

_CHUNK_BYTES = 16 << 20
_CHUNK_TILES = 64
_RING_BYTES = 384 << 20
_COMPILE_COST_S = 60.0
_COMPILE_GAIN = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractResult:
    """How an extraction ended.

    Attributes:
        report: of the slides.
        timing: where the time went; None where other processes did the work.
        notes: sentences about the whole run.
    """

    report: RunReport
    timing: Timing | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions:
    """What is asked for besides the study's own options.

    Attributes:
        tiling: folder name under `tilings/`; the study's own if None.
        backend: reads slides with this one; chosen if None.
        overwrite: replace features that were made differently.
        shard: (i, n), to work on the i-th of n parts.
        executor: "local", or the address of a Dask scheduler.
    """

    tiling: str | None = None
    backend: str | None = None
    overwrite: bool = False
    shard: tuple[int, int] | None = None
    executor: str = "local"


def extract_cohort(
    study: Study, report: Reporter, options: ExtractOptions | None = None
) -> ExtractResult:
    """Make a vector of every tile of a study; tiles first where they are missing.

    Resumes where an earlier run stopped.

    Raises:
        ConfigError: an option does not fit.
        EncoderUnavailable: weights or a package missing, found before any slide is touched.
        FingerprintMismatch: the features exist and were made differently.
    """
    options = options or ExtractOptions()
    spec = study.spec.features
    require_backend(options.backend)
    rows = study.cohort().rows
    name = options.tiling or tiling_name(study.spec.tiling)
    encoders = load_encoders(spec)
    devices = _devices_at_hand(spec) if options.executor == "local" else []
    folders = [features_folder(study, name, encoder) for encoder in encoders]
    for folder, encoder in zip(folders, encoders, strict=True):
        _claim_features(folder, encoder, overwrite=options.overwrite)
    tiled = _tile_missing(study, rows, name, report, options)
    if tiled is not None and tiled.interrupted:
        return ExtractResult(report=tiled)
    if options.executor != "local":
        from bagscope.pipeline.extract_remote import extract_on_cluster

        return ExtractResult(report=extract_on_cluster(study, name, folders, report, options))
    if len(devices) > 1:
        from bagscope.pipeline.extract_devices import extract_on_devices

        return ExtractResult(
            report=extract_on_devices(study, devices, report, options),
            notes=_notes(study, name, encoders),
        )
    return _extract_here(study, rows, name, encoders, folders, devices[0], report, options)


def load_encoders(spec: ExtractSpec) -> list[LoadedEncoder]:
    """Load the encoders of a pass.

    Raises:
        ConfigError: an encoder that does not exist, or twice the same.
        EncoderUnavailable: weights or a package missing.
    """
    from bagscope.features.encoders.access import find_access
    from bagscope.features.encoders.loading import load_encoder
    from bagscope.features.encoders.registry import find_encoder

    doubled = {name for name in spec.encoders if spec.encoders.count(name) > 1}
    if doubled:
        raise ConfigError(f"encoder {', '.join(sorted(doubled))} is asked for more than once")
    source = weight_source(spec)
    for name in spec.encoders:
        # Asked first: the hub's client itself tries for a minute before it gives up.
        access = find_access(find_encoder(name).spec, source, ask=True)
        if access.problem:
            raise EncoderUnavailable(access.problem)
    return [load_encoder(name, source=source, stain=spec.stain) for name in spec.encoders]


def weight_source(spec: ExtractSpec) -> WeightSource:
    """Return where an extraction's weights come from.

    Raises:
        ConfigError: no such folder.
    """
    from bagscope.features.encoders.weights import WeightSource

    folder = Path(spec.weights) if spec.weights else None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--weights {folder}: no such folder; make it with encoders fetch")
    return WeightSource(folder=folder, trust_remote_code=spec.trust_remote_code)


def features_folder(study: Study, tiling: str, encoder: LoadedEncoder) -> Path:
    """Return the folder of an encoder's features."""
    return study.features_folder(tiling) / encoder.spec.folder


def stage_name(tiling: str, folders: Sequence[Path]) -> str:
    """Return the stage under which status and claims stand: that of one set of encoders."""
    return f"{STAGE}/{tiling}/{'+'.join(sorted(folder.name for folder in folders))}"


def _devices_at_hand(spec: ExtractSpec) -> list[str]:
    """Return the devices that are meant, each of which is there and takes the precision.

    Raises:
        ConfigError: one is not, or does not.
    """
    from bagscope.features.precision import choose_precision
    from bagscope.features.session import require_device

    names = resolve_devices(spec.device)
    for name in names:
        device = require_device(name)
        if spec.precision != "auto":
            choose_precision(spec.precision, device, asked=spec.precision)
    return names


def resolve_devices(device: str) -> list[str]:
    """Return the devices that are meant, one per process.

    Raises:
        ConfigError: none is named.
    """
    if device != "auto":
        names = [name.strip() for name in device.split(",") if name.strip()]
        if not names:
            raise ConfigError(f"device is {device!r}; name one, such as cpu or cuda:0")
        return names
    import torch

    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["mps"] if torch.backends.mps.is_available() else ["cpu"]


# --- this process ---------------------------------------------------------------------------


def _extract_here(
    study: Study,
    rows: Sequence[SlideRow],
    tiling: str,
    encoders: Sequence[LoadedEncoder],
    folders: Sequence[Path],
    device: str,
    report: Reporter,
    options: ExtractOptions,
) -> ExtractResult:
    readers = max(1, min(study.spec.run.worker_count, len(rows)))
    sessions = make_sessions(study, encoders, folders, device, tiling)
    made: list[ExtractExecutor] = []

    def make_executor() -> ExtractExecutor:
        targets = make_targets(study, sessions, folders)
        made.append(make_engine(study, targets, readers=readers, overwrite=options.overwrite))
        return made[0]

    result = run_cohort(
        [slide_job(study, tiling, row, options) for row in rows],
        _never_called,
        stage=stage_name(tiling, folders),
        status_dir=study.status_folder,
        options=run_options(
            study.spec.run, options.shard, "local", preload=(), sweep=tuple(folders)
        ),
        report=report,
        make_executor=make_executor,
    )
    # A device that ran out of memory is spared the same another time.
    for session, folder in zip(sessions, folders, strict=True):
        _remember_execution(folder, session.execution)
    notes = _notes(study, tiling, encoders)
    return ExtractResult(report=result, timing=made[0].timing(), notes=notes)


def make_engine(
    study: Study, targets: Sequence[Target], *, readers: int, overwrite: bool
) -> ExtractExecutor:
    """Start readers and return the engine that they feed."""
    from bagscope.features.extract import ExtractExecutor, make_feed

    tile_px = targets[0].session.tile_px
    ring = _ring(readers, tile_px, max(target.session.batch_size for target in targets))
    feed = make_feed(
        ring,
        readers=readers,
        timeout_s=study.spec.run.timeout_minutes * 60,
        memory_limit_mib=study.spec.run.memory_limit_gib * 1024,
        preload=WORKER_MODULES,
    )
    return ExtractExecutor(
        targets,
        feed,
        readers=readers,
        read_task=read_task_for(ring, threads=max(1, available_cores() // readers)),
        overwrite=overwrite,
    )


def _never_called(job: Job) -> StageResult:
    raise AssertionError("the extraction engine does the work itself")


def make_sessions(
    study: Study,
    encoders: Sequence[LoadedEncoder],
    folders: Sequence[Path],
    device: str,
    tiling: str,
) -> list[EncoderSession]:
    """Bring the encoders onto a device, as an earlier run of the same study did."""
    from bagscope.features.session import EncoderSession, device_text, require_device

    spec = study.spec.features
    tile_px = _tile_px(study, tiling)
    key = device_text(require_device(device))
    if key == "cpu":
        keep_freed_memory()
    sessions = []
    for encoder, folder in zip(encoders, folders, strict=True):
        known = _known_execution(folder, key)
        session = EncoderSession(
            encoder,
            device=device,
            tile_px=tile_px,
            precision=None if spec.precision == "auto" else spec.precision,
            batch_size=spec.batch_size or known.get("batch_size"),
        )
        if spec.compile == "auto" and "compiled" in known:
            compiled = bool(known["compiled"])
        elif spec.compile == "auto":
            seconds = session.seconds_per_tile * _tiles_to_come(study, tiling)
            compiled = seconds * _COMPILE_GAIN > _COMPILE_COST_S
        else:
            compiled = spec.compile == "on"
        if compiled:
            session.compile()
        _remember_execution(folder, session.execution)
        sessions.append(session)
    return sessions


def make_targets(
    study: Study, sessions: Sequence[EncoderSession], folders: Sequence[Path]
) -> list[Target]:
    """Return where each encoder's vectors go."""
    from bagscope.features.targets import Target

    stored_dtype = study.spec.features.stored_dtype
    return [
        Target(session=session, folder=folder, stored_dtype=stored_dtype)
        for session, folder in zip(sessions, folders, strict=True)
    ]


def _known_execution(folder: Path, device: str) -> dict[str, Json]:
    """Return how an earlier run on such a device was carried out; empty where there was none."""
    try:
        found = artifacts.read_json(folder / EXECUTION_NAME).get(device, {})
    except ArtifactError:
        return {}
    return dict(found)


def _remember_execution(folder: Path, execution: Execution) -> None:
    path = folder / EXECUTION_NAME
    try:
        known = artifacts.read_json(path)
    except ArtifactError:
        known = {}
    if known.get(execution.device) != execution.as_json():
        artifacts.write_json(path, {**known, execution.device: execution.as_json()})


def _tiles_to_come(study: Study, tiling: str) -> int:
    statuses = read_statuses(study.status_folder, f"tile/{tiling}")
    return sum(tiles_of(status.facts) for status in statuses.values())


def _tile_px(study: Study, tiling: str) -> int:
    """Return the tile edge of a tiling."""
    path = study.tiling_folder(tiling) / "spec.json"
    stated = artifacts.read_json(path)
    try:
        return int(stated["spec"]["tile_px"])
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"{path}: states no tile_px; tile again with --overwrite") from error


def _ring(readers: int, tile_px: int, batch_size: int) -> TileRing:
    """Return shared memory for two batches and two chunks per reader, within bounds."""
    from bagscope.features.ring import TileRing

    tile_bytes = tile_px * tile_px * 3
    rows = max(1, min(_CHUNK_TILES, _CHUNK_BYTES // tile_bytes))
    wanted = 2 * readers + -(-2 * batch_size // rows)
    slots = max(readers + 1, min(wanted, _RING_BYTES // (rows * tile_bytes)))
    return TileRing(slots=slots, rows=rows, tile_px=tile_px)


def read_task_for(ring: TileRing, *, threads: int) -> Callable[[ExtractTask], ReadTask]:
    """Return what makes a reader's task of a slide's."""
    from bagscope.features.reader import ReadTask

    def make(task: ExtractTask) -> ReadTask:
        return ReadTask(
            slide_path=task.slide_path,
            tile_path=task.tile_path,
            mpp=task.mpp,
            scene=task.scene,
            backend=task.backend,
            threads=threads,
            ring_path=ring.path,
            ring_slots=ring.slots,
            ring_rows=ring.rows,
            tile_px=ring.tile_px,
        )

    return make


def slide_job(study: Study, tiling: str, row: SlideRow, options: ExtractOptions) -> Job:
    """Return the job of one slide."""
    from bagscope.features.extract import ExtractTask

    tile_path = study.tiling_folder(tiling) / f"{row.slide_id}.h5"
    return Job(
        slide_id=row.slide_id,
        payload=ExtractTask(
            slide_path=row.path,
            tile_path=tile_path,
            mpp=row.mpp,
            scene=scene_of(row.slide_id),
            backend=options.backend,
            not_tiled="" if tile_path.exists() else _why_not_tiled(study, tiling, row.slide_id),
        ),
        weight=size_weight(row.path),
    )


def _why_not_tiled(study: Study, tiling: str, slide_id: str) -> str:
    status = read_status(study.status_folder, f"tile/{tiling}", slide_id)
    if status is None or status.outcome != "failed":
        return f"{slide_id}: is not tiled; run bagscope tile first"
    return f"{slide_id}: could not be tiled ({status.error_class}: {status.message})"


# --- before the first slide -----------------------------------------------------------------


def _tile_missing(
    study: Study,
    rows: Sequence[SlideRow],
    tiling: str,
    report: Reporter,
    options: ExtractOptions,
) -> RunReport | None:
    """Tile the slides that have no tile file; None where there are none.

    Raises:
        ConfigError: tiles of a tiling that is not the study's own are missing.
    """
    folder = study.tiling_folder(tiling)
    jobs = select_shard([Job(slide_id=row.slide_id) for row in rows], options.shard)
    missing = [job.slide_id for job in jobs if not (folder / f"{job.slide_id}.h5").exists()]
    if not missing:
        return None
    if tiling != tiling_name(study.spec.tiling):
        slides = counted(len(missing), "slide")
        raise ConfigError(
            f"{folder}: lacks the tiles of {slides}, such as {missing[0]}; tile them first, this "
            "tiling is not the one that the study's options describe"
        )
    return tile_cohort(
        study,
        report,
        backend=options.backend,
        executor=options.executor,
        only=frozenset(missing),
    )


def _claim_features(folder: Path, encoder: LoadedEncoder, *, overwrite: bool) -> None:
    """Write what the folder's features are made by, or refuse to mix two encoders in it."""
    requested = {
        "encoder": encoder.spec.identity(),
        "weights_sha256": encoder.weights_sha256,
        "numerics": NUMERICS,
    }
    path = folder / "spec.json"
    if path.exists() and not overwrite:
        artifacts.require_same(
            artifacts.read_json(path),
            requested,
            what=str(folder),
            remedy="choose another study folder, or replace the features with --overwrite",
        )
    elif not path.exists() or artifacts.read_json(path) != requested:
        artifacts.write_json(path, requested)


def _notes(study: Study, tiling: str, encoders: Sequence[LoadedEncoder]) -> tuple[str, ...]:
    """Return what the user should know of the run as a whole."""
    spec = study.spec.tiling
    if tiling != tiling_name(spec):
        return ()
    return tuple(
        f"encoder {e.spec.name} is recommended for tiles of {e.spec.tile_px} px at "
        f"{e.spec.mpp:g} mpp; these are {spec.tile_px} px at {spec.mpp:g} mpp"
        for e in encoders
        if (e.spec.tile_px, e.spec.mpp) != (spec.tile_px, spec.mpp)
    )
