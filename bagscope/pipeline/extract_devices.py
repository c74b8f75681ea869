"""Extraction on several devices of this machine: one process each, the slides dealt by claims.

A process takes the next slide that no other one has claimed, so a fast device does more than a slow
one, and a device that fails leaves its slides to the others. Each works on as many threads as this
process does, whatever their surroundings say, and so makes the bytes that this one would make.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from queue import Empty
from types import FrameType
from typing import Any

from bagscope.cohort.executors.worker import die_with_parent
from bagscope.cohort.jobs import Failure, RunReport
from bagscope.cohort.progress import (
    Event,
    Progress,
    Reporter,
    RunFinished,
    RunStarted,
    SlideFinished,
    estimate_left_s,
)
from bagscope.cohort.status import OUTCOMES, Outcome
from bagscope.errors import WorkerDied, in_one_line
from bagscope.pipeline.extract import ExtractOptions, extract_cohort
from bagscope.pipeline.study import Study

_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a device's process ended: with a report, or with a sentence."""

    device: str
    report: RunReport | None
    problem: str = ""


def extract_on_devices(
    study: Study, devices: Sequence[str], report: Reporter, options: ExtractOptions
) -> RunReport:
    """Extract a study's features on several devices at once.

    Raises:
        WorkerDied: every device's process came to a bad end; says how.
        KeyboardInterrupt: stopped before any of them had begun.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    workers = max(1, study.spec.run.worker_count // len(devices))
    processes: dict[str, Any] = {}
    for device in devices:
        spec = study.spec.model_copy(
            update={
                "features": study.spec.features.model_copy(update={"device": device}),
                "run": study.spec.run.model_copy(update={"workers": workers}),
            }
        )
        part = Study(folder=study.folder, spec=spec)
        key = f"{device}/{len(processes)}"
        processes[key] = context.Process(
            target=_on_device, args=(part, key, options, torch.get_num_threads(), queue)
        )
    merged = _Merged(report)
    with _passing_on_sigterm(processes.values(), merged.stop):
        for process in processes.values():
            process.start()
        _listen(processes, queue, merged)
    for process in processes.values():
        process.join()
    return merged.close()


def _on_device(study: Study, key: str, options: ExtractOptions, threads: int, queue: Any) -> None:
    """Run one device's part, in its process."""
    import torch

    die_with_parent()
    try:
        torch.set_num_threads(threads)
        result = extract_cohort(study, _QueueReporter(queue), options)
    except Exception as error:
        queue.put(_Ended(key, None, in_one_line(error)))
    else:
        queue.put(_Ended(key, result.report))


class _QueueReporter:
    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def emit(self, event: Event) -> None:
        self._queue.put(event)


def _listen(processes: dict[str, Any], queue: Any, merged: _Merged) -> None:
    """Take events until every process has said how it ended, or is gone."""
    running = set(processes)
    while running:
        try:
            message = queue.get(timeout=_LOOK_S)
        except Empty:
            for key in [key for key in running if not processes[key].is_alive()]:
                # It may have spoken between the two looks.
                if queue.empty():
                    running.discard(key)
                    code = processes[key].exitcode
                    merged.end(_Ended(key, None, f"its process ended with exit code {code}"))
            continue
        if isinstance(message, _Ended):
            running.discard(message.device)
            merged.end(message)
        else:
            merged.hear(message)


class _Merged:
    """Many runs over the same slides, told as one."""

    def __init__(self, report: Reporter) -> None:
        self._report = report
        self._begin_s = time.monotonic()
        self._started: RunStarted | None = None

        self._finished: dict[str, SlideFinished] = {}
        self._tiles_made = 0
        self._ends: list[_Ended] = []
        self._is_stopped = False

    def stop(self) -> None:
        """Note that the user ends it: a process that dies of that has not failed."""
        self._is_stopped = True

    def hear(self, event: Event) -> None:
        """Pass an event on, unless another device told the same."""
        if isinstance(event, RunStarted):
            if self._started is None:
                self._report.emit(event)
                self._started, self._begin_s = event, time.monotonic()
        elif isinstance(event, SlideFinished):
            before = self._finished.get(event.slide_id)
            # The devices that did not work on a slide find it made, or failed, at their end.
            if before is None or before.outcome == "skipped" != event.outcome:
                self._finished[event.slide_id] = event
                if event.outcome == "done":
                    self._tiles_made += int(event.facts.get("tiles", 0))
                self._report.emit(replace(event, progress=self._progress()))

    def end(self, ended: _Ended) -> None:
        """Note how a device's process ended."""
        self._ends.append(ended)

    def close(self) -> RunReport:
        """Return what became of the slides.

        Raises:
            WorkerDied: no device's process came to a good end.
            KeyboardInterrupt: it was stopped before any of them had begun.
        """
        reports = [ended.report for ended in self._ends if ended.report is not None]
        problems = tuple(
            (ended.device.rpartition("/")[0], ended.problem)
            for ended in self._ends
            if ended.report is None and not self._is_stopped
        )
        if not reports:
            if self._is_stopped:
                raise KeyboardInterrupt
            listed = "; ".join(f"{device}: {problem}" for device, problem in problems)
            raise WorkerDied(f"no device could do its part ({listed})")
        outcomes = [event.outcome for event in self._finished.values()]
        counts: dict[Outcome, int] = {kind: outcomes.count(kind) for kind in OUTCOMES}
        result = RunReport(
            stage=reports[0].stage,
            total=reports[0].total,
            counts=counts,
            elsewhere=max(0, min(report.elsewhere for report in reports)),
            failures=tuple(
                Failure(
                    slide_id=event.slide_id,
                    error_class=event.error_class,
                    message=event.message,
                )
                for event in sorted(self._finished.values(), key=lambda event: event.slide_id)
                if event.outcome == "failed"
            ),
            seconds=time.monotonic() - self._begin_s,
            tiles=sum(int(event.facts.get("tiles", 0)) for event in self._finished.values()),
            warnings=tuple(
                sorted(
                    [(e.slide_id, text) for e in self._finished.values() for text in e.warnings]
                    + [(device, f"gave up: {problem}") for device, problem in problems]
                )
            ),
            interrupted=self._is_stopped or any(report.interrupted for report in reports),
        )
        self._report.emit(RunFinished(report=result))
        return result

    def _progress(self) -> Progress:
        seconds = time.monotonic() - self._begin_s
        total = self._started.total if self._started else len(self._finished)
        outcomes = [event.outcome for event in self._finished.values()]
        found = outcomes.count("skipped")
        return Progress(
            finished=len(outcomes),
            total=total,
            failed=outcomes.count("failed"),
            tiles=self._tiles_made,
            seconds=seconds,
            tiles_per_s=self._tiles_made / seconds if seconds > 0 else 0.0,
            left_s=estimate_left_s(
                seconds,
                made_weight=len(outcomes) - found,
                found_weight=found,
                left_weight=total - len(outcomes),
            ),
        )


@contextmanager
def _passing_on_sigterm(processes: Any, stop: Callable[[], None]) -> Iterator[None]:
    """Have SIGTERM and Ctrl-C end the devices' processes in good order, and us after them."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop()
        process: BaseProcess
        for process in processes:
            if process.pid is not None and process.is_alive():
                process.terminate()

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
