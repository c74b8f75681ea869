"""Runs a stage over a cohort: one bad slide never stops it, and nothing half-done is left.

The life of a slide: its claim is taken, a worker does the stage's work, its status is written, its
claim is given back. Slides that other processes have claimed are put off and looked at again when
nothing else is left. Stopping a run at any moment costs the slides in hand and no more: what was
made is found by its fingerprint when the same command is given again.
"""

from __future__ import annotations

import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from bagscope import artifacts
from bagscope.cohort.claims import ClaimBook
from bagscope.cohort.executors.protocol import Executor, Finished, Record, Work
from bagscope.cohort.jobs import (
    Failure,
    Job,
    RunOptions,
    RunReport,
    StageResult,
    check_slide_ids,
    parse_shard,
    select_shard,
)
from bagscope.cohort.progress import (
    Progress,
    Reporter,
    RunFinished,
    RunStarted,
    RunWaiting,
    SlideFinished,
    SlideStarted,
    estimate_left_s,
)
from bagscope.cohort.status import (
    OUTCOMES,
    Outcome,
    Status,
    read_status,
    stage_folder,
    status_path,
    tiles_of,
    write_status,
)
from bagscope.errors import ArtifactError, SchemaError

__all__ = [
    "Job",
    "RunOptions",
    "RunReport",
    "StageResult",
    "parse_shard",
    "run_cohort",
    "select_shard",
]

_WAIT_S = 1.0
_FIRST_LOOK_AGAIN_S = 0.1
_LAST_LOOK_AGAIN_S = 2.0


def run_cohort(
    jobs: Sequence[Job],
    work: Work,
    *,
    stage: str,
    status_dir: Path,
    options: RunOptions,
    report: Reporter,
    make_executor: Callable[[], Executor] | None = None,
    on_message: Callable[[str, bytes], None] | None = None,
) -> RunReport:
    """Do the work of a stage on every slide, each in a process of its own.

    Whether a slide's artefact is already there with the same fingerprint, `work` finds out, and
    returns the outcome "skipped".

    Args:
        jobs: one per slide.
        work: a module-level function, or a `functools.partial` of one.
        stage: its name, under which status and claims stand in `status_dir`; it may have several
            parts, such as "tile/0.50mpp_256px".
        status_dir: the study's `status` folder. Temporaries of dead processes are removed from
            the study folder itself, from the stage's status and from `options.sweep`.
        options: how to run it.
        report: listens.
        make_executor: makes who carries the work out, in place of the one that `options` names,
            which then calls `work` or does as much by its own means.
        on_message: is told what a local worker tells of its job (see `executors.worker.tell`).

    Returns:
        What became of the slides; `interrupted` after Ctrl-C or SIGTERM, by when every worker has
        ended and claims and temporaries are gone.

    Raises:
        ConfigError: slide ids that are no file names or not unique, or an unusable cluster.
        ArtifactError: status or claims can't be written (disk full, no permission).
    """
    check_slide_ids([job.slide_id for job in jobs])
    chosen = select_shard(jobs, options.shard)
    folder = stage_folder(status_dir, stage)
    _make_folder(folder)
    with ExitStack() as stack:
        switch = stack.enter_context(_StopSwitch())
        # The study folder too: whoever was killed while making the study left its traces there.
        swept = [status_dir.parent, folder, *options.sweep]
        stack.callback(_sweep, swept)
        _sweep(swept)
        claims = stack.enter_context(ClaimBook(folder, stage=stage, stale_s=options.stale_claim_s))
        stack.callback(claims.sweep)
        claims.sweep()
        executor = (
            make_executor()
            if make_executor
            else _make_executor(work, options, len(chosen), on_message)
        )
        stack.callback(executor.close)
        run = _Run(chosen, stage, status_dir, options, report, claims, executor)
        stack.callback(switch.disconnect)
        switch.connect(run.interrupt)
        run.loop()
    finished = run.closing_report()
    report.emit(RunFinished(report=finished))
    return finished


@dataclass
class _Tally:
    """What is known of the finished slides."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[tuple[str, str]] = field(default_factory=list)
    tiles: int = 0
    tiles_made: int = 0
    made_weight: float = 0.0
    found_weight: float = 0.0

    def add(self, job: Job, status: Status) -> None:
        self.outcomes[job.slide_id] = status.outcome
        tiles = tiles_of(status.facts)
        self.tiles += tiles
        if status.outcome == "skipped":
            self.found_weight += job.weight
        else:
            self.made_weight += job.weight
            self.tiles_made += tiles
        if status.outcome == "failed":
            self.failures.append(
                Failure(
                    slide_id=job.slide_id, error_class=status.error_class, message=status.message
                )
            )
        self.warnings += [(job.slide_id, text) for text in status.warnings]

    def count(self, outcome: Outcome) -> int:
        return sum(o == outcome for o in self.outcomes.values())


class _Run:
    """The state of one call of `run_cohort`."""

    def __init__(
        self,
        jobs: Sequence[Job],
        stage: str,
        status_dir: Path,
        options: RunOptions,
        report: Reporter,
        claims: ClaimBook,
        executor: Executor,
    ) -> None:
        self.jobs = jobs
        self.stage = stage
        self.status_dir = status_dir
        self.options = options
        self.report = report
        self.claims = claims
        self.executor = executor
        self.tally = _Tally()
        self.interrupted = False
        self.started_s = time.monotonic()
        self.total_weight = sum(job.weight for job in jobs)
        self.queue = deque(sorted(jobs, key=lambda job: -job.weight))
        self.in_hand: dict[str, Job] = {}
        self.tries: dict[str, int] = {}
        # Claimed elsewhere: the job, and what its status file looked like when we first came by.
        self.put_off: dict[str, tuple[Job, object]] = {}

    def interrupt(self) -> None:
        self.interrupted = True
        self.executor.wake()

    def loop(self) -> None:
        self.report.emit(
            RunStarted(
                stage=self.stage,
                total=len(self.jobs),
                workers=self.executor.size(),
                shard=self.options.shard,
                noun=self.options.noun,
            )
        )
        look_again_s = _FIRST_LOOK_AGAIN_S
        announced = False
        while not self.interrupted:
            self._fill()
            if self.in_hand:
                self._collect(_WAIT_S)
                continue
            if self.queue:  # no slot: a cluster that has no worker at the moment
                self.executor.wait(_WAIT_S)
                continue
            if not self.put_off or not self.options.wait_for_others:
                return
            if self._look_again():
                look_again_s = _FIRST_LOOK_AGAIN_S
                continue
            if not announced:
                self.report.emit(RunWaiting(stage=self.stage, slide_ids=tuple(self.put_off)))
                announced = True
            self.executor.wait(look_again_s)
            look_again_s = min(_LAST_LOOK_AGAIN_S, look_again_s * 1.5)

    def _fill(self) -> None:
        """Give jobs to free workers as long as there are both."""
        while self.queue and self.executor.slots() > 0 and not self.interrupted:
            job = self.queue.popleft()
            if self.claims.acquire(job.slide_id):
                self._begin(job)
            else:
                self.put_off.setdefault(job.slide_id, (job, self._signature(job.slide_id)))

    def _begin(self, job: Job) -> None:
        self.in_hand[job.slide_id] = job
        self.executor.start(job)
        self.report.emit(SlideStarted(stage=self.stage, slide_id=job.slide_id))

    def _collect(self, timeout_s: float) -> None:
        ended = self.executor.wait(timeout_s)
        again: list[Finished] = []
        for finished in ended:
            job = self.in_hand.pop(finished.slide_id)
            if finished.requeue:
                self._begin(job)
            elif finished.record["outcome"] == "failed" and self._may_try_again(job):
                self.claims.release(job.slide_id)
                self.queue.append(job)
            else:
                self.in_hand[finished.slide_id] = job
                again.append(finished)
        for finished in again:
            job = self.in_hand.pop(finished.slide_id)
            # The worker gets its next slide first, and works while this one is written down.
            self._fill()
            self._finish(job, _as_status(self.stage, finished))

    def _finish(self, job: Job, status: Status) -> None:
        try:
            status = self._keep(status)
        finally:
            self.claims.release(job.slide_id)
        self._tell(job, status)

    def _keep(self, status: Status) -> Status:
        """Write the status, unless all that it says is that an earlier one still holds."""
        artifacts.step("status")
        if status.outcome == "skipped":
            before = self._status_before(status.slide_id)
            if (
                before is not None
                and before.outcome != "failed"
                and before.fingerprint == status.fingerprint
                and before.content_hash == status.content_hash
            ):
                return status
        write_status(self.status_dir, status)
        artifacts.step("status-written")
        return status

    def _tell(self, job: Job, status: Status) -> None:
        self.tally.add(job, status)
        self.report.emit(
            SlideFinished(
                stage=self.stage,
                slide_id=job.slide_id,
                outcome=status.outcome,
                seconds=status.seconds,
                progress=self._progress(),
                facts=status.facts,
                warnings=status.warnings,
                error_class=status.error_class,
                message=status.message,
            )
        )

    def _may_try_again(self, job: Job) -> bool:
        tries = self.tries[job.slide_id] = self.tries.get(job.slide_id, 0) + 1
        return tries <= self.options.retries and not self.interrupted

    # --- slides that other processes work on --------------------------------------------------

    def _look_again(self) -> bool:
        """Take up slides that were put off and are free now; return whether there were any."""
        any_free = False
        for slide_id, (job, signature) in list(self.put_off.items()):
            if self.executor.slots() == 0:
                break
            if not self.claims.acquire(slide_id):
                continue
            any_free = True
            del self.put_off[slide_id]
            theirs = self._status_before(slide_id)
            changed = self._signature(slide_id) != signature
            if changed and theirs is not None and theirs.outcome == "failed":
                # The other process tried while we were running; trying again would fail again.
                self.claims.release(slide_id)
                self._tell(job, theirs)
            else:
                self._begin(job)
        return any_free

    def _signature(self, slide_id: str) -> object:
        try:
            found = status_path(self.status_dir, self.stage, slide_id).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _status_before(self, slide_id: str) -> Status | None:
        try:
            return read_status(self.status_dir, self.stage, slide_id)
        except SchemaError:
            return None  # damaged, so of no use; it is about to be written anew

    # --- telling ------------------------------------------------------------------------------

    def _progress(self) -> Progress:
        tally = self.tally
        seconds = time.monotonic() - self.started_s
        return Progress(
            finished=len(tally.outcomes),
            total=len(self.jobs),
            failed=len(tally.failures),
            tiles=tally.tiles_made,
            seconds=seconds,
            tiles_per_s=tally.tiles_made / seconds if seconds > 0 else 0.0,
            left_s=estimate_left_s(
                seconds,
                made_weight=tally.made_weight,
                found_weight=tally.found_weight,
                left_weight=self.total_weight - tally.made_weight - tally.found_weight,
            ),
        )

    def closing_report(self) -> RunReport:
        tally = self.tally
        return RunReport(
            stage=self.stage,
            total=len(self.jobs),
            counts={outcome: tally.count(outcome) for outcome in OUTCOMES},
            elsewhere=len(self.put_off),
            failures=tuple(sorted(tally.failures, key=lambda failure: failure.slide_id)),
            seconds=time.monotonic() - self.started_s,
            tiles=tally.tiles,
            warnings=tuple(sorted(tally.warnings)),
            interrupted=self.interrupted,
        )


def _as_status(stage: str, finished: Finished) -> Status:
    record: Record = finished.record
    return Status(
        slide_id=finished.slide_id,
        stage=stage,
        outcome=record["outcome"],
        seconds=round(finished.seconds, 3),
        host=finished.host,
        fingerprint=record.get("fingerprint", ""),
        content_hash=record.get("content_hash", ""),
        facts=record.get("facts", {}),
        warnings=tuple(record.get("warnings", ())),
        error_class=record.get("error_class", ""),
        message=record.get("message", ""),
        traceback=record.get("traceback", ""),
    )


def _make_executor(
    work: Work,
    options: RunOptions,
    jobs: int,
    on_message: Callable[[str, bytes], None] | None,
) -> Executor:
    pickled_work, module = pickle.dumps(work), _module_of(work)
    if options.executor == "local":
        from bagscope.cohort.executors.local import LocalExecutor

        return LocalExecutor(
            pickled_work,
            module=module,
            workers=max(1, min(options.workers or 1, jobs)),
            timeout_s=options.timeout_s,
            memory_limit_mib=options.memory_limit_mib,
            preload=options.preload,
            on_message=on_message,
        )
    from bagscope.cohort.executors.dask import DaskExecutor

    return DaskExecutor(pickled_work, module=module, address=options.executor, options=options)


def _module_of(work: Work) -> str:
    while isinstance(work, partial):
        work = work.func
    return str(getattr(work, "__module__", type(work).__module__))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{folder}: the status folder could not be made ({error.strerror or error}); "
            "check the study folder's permissions and free space"
        ) from error


def _sweep(folders: Sequence[Path]) -> None:
    for folder in folders:
        if folder.is_dir():
            artifacts.sweep_temporaries(folder, recursive=False)


class _StopSwitch:
    """Ctrl-C and SIGTERM, where we are the thread that signals come to.

    They stop the run from the moment it is connected. Pressed earlier, they stop it then; pressed
    later, while workers are being ended and claims given back, they change nothing.
    """

    def __init__(self) -> None:
        self._stop: Callable[[], None] | None = None
        self._pressed = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._press)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, previous in self._before.items():
            signal.signal(number, previous)

    def connect(self, stop: Callable[[], None]) -> None:
        self._stop = stop
        if self._pressed:
            stop()

    def disconnect(self) -> None:
        self._stop = None

    def _press(self, number: int, frame: FrameType | None) -> None:
        self._pressed = True
        if self._stop is not None:
            self._stop()
