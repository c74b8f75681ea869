"""What goes into a cohort run and what comes out: jobs, options, results, the closing report."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bagscope.artifacts import Json, portable_name_problem
from bagscope.cohort.claims import DEFAULT_STALE_S
from bagscope.cohort.status import Outcome
from bagscope.errors import ConfigError

_SHARD = re.compile(r"(\d+)/(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One slide to work on.

    Attributes:
        slide_id: portable file name, unique ignoring case.
        payload: whatever the stage needs; it is pickled.
        weight: how long the slide takes compared with others (file size, tiles); the heaviest
            are started first, so that the run does not end with all but one worker idle.
    """

    slide_id: str
    payload: Any = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StageResult:
    """What a stage returns for a slide.

    Attributes:
        outcome: "done", or "skipped" where the artefact was there with the same fingerprint.
        fingerprint: of the artefact's inputs and settings.
        content_hash: of its content, where the stage has one.
        facts: counts and measures, JSON; "tiles" is summed in progress and totals.
        warnings: sentences for the user.
    """

    outcome: Literal["done", "skipped"]
    fingerprint: str
    content_hash: str = ""
    facts: Mapping[str, Json] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a cohort is run.

    Attributes:
        workers: slides worked on at a time; None means one, and on a cluster all that it offers.
        timeout_s: a slide that takes longer is failed and its worker killed.
        memory_limit_mib: resident memory, in MiB, that a worker and its children may hold.
        shard: (i, n) works only on the i-th (from 1) of n parts of the slides.
        executor: "local", or the address of a Dask scheduler.
        retries: how often a failed slide is tried again before it counts as failed.
        stale_claim_s: a claim of another host that was not renewed for so long is taken over.
        wait_for_others: wait for slides that other processes work on; otherwise they are
            reported as elsewhere.
        preload: modules that workers have imported before they start, so that starting one
            takes milliseconds.
        noun: what a job is, for people.
        sweep: folders that the stage writes into, not looked into recursively: temporaries of
            dead processes are removed from them before and after the run.
    """

    workers: int | None = None
    timeout_s: float | None = None
    memory_limit_mib: float | None = None
    shard: tuple[int, int] | None = None
    executor: str = "local"
    retries: int = 0
    stale_claim_s: float = DEFAULT_STALE_S
    wait_for_others: bool = True
    preload: tuple[str, ...] = ()
    sweep: tuple[Path, ...] = ()
    noun: str = "slide"

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; it must be 1 or more")
        for name in ("timeout_s", "memory_limit_mib", "stale_claim_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}; it must be 0 or more")
        if self.shard is not None:
            _check_shard(*self.shard)


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One slide that failed."""

    slide_id: str
    error_class: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """How a cohort run ended.

    Attributes:
        stage: name of the stage.
        total: slides of this run (of its shard).
        counts: slides by outcome.
        elsewhere: slides left to another process that works on them.
        failures: in order of slide id.
        seconds: wall-clock time.
        tiles: sum of the fact "tiles".
        warnings: (slide id, sentence) in order of slide id.
        interrupted: stopped by Ctrl-C or SIGTERM.
    """

    stage: str
    total: int
    counts: Mapping[Outcome, int]
    elsewhere: int = 0
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0
    tiles: int = 0
    warnings: tuple[tuple[str, str], ...] = ()
    interrupted: bool = False

    @property
    def remaining(self) -> int:
        """Return how many slides this run did not come to."""
        return self.total - sum(self.counts.values()) - self.elsewhere

    @property
    def exit_code(self) -> int:
        """Return 0 where all went well, 1 where some slides failed, 130 where interrupted."""
        if self.interrupted:
            return 130
        return 1 if self.failures else 0


def parse_shard(text: str) -> tuple[int, int]:
    """Read "2/8" as (2, 8).

    Raises:
        ConfigError: not of that form, or i is not within 1 ... n.
    """
    match = _SHARD.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--shard is {text!r}; write it as i/n, for instance 2/8")
    index, count = int(match[1]), int(match[2])
    _check_shard(index, count)
    return index, count


def select_shard(jobs: Sequence[Job], shard: tuple[int, int] | None) -> list[Job]:
    """Return the jobs of one shard, in the given order.

    Slides are ranked by the hash of their id and dealt out in turn. So the shards' sizes differ
    by one at most, and a slide's shard does not depend on the order of the table's rows.
    """
    if shard is None:
        return list(jobs)
    index, count = shard
    ranked = sorted(jobs, key=lambda job: hashlib.sha256(job.slide_id.encode()).digest())
    chosen = {job.slide_id for job in ranked[index - 1 :: count]}
    return [job for job in jobs if job.slide_id in chosen]


def check_slide_ids(slide_ids: Sequence[str]) -> None:
    """Refuse ids that can't be file names, or that a file system may not tell apart.

    Raises:
        ConfigError: names the id.
    """
    seen: dict[str, str] = {}
    for slide_id in slide_ids:
        if problem := portable_name_problem(slide_id):
            raise ConfigError(f"slide id {slide_id!r} {problem}; give it another id")
        folded = slide_id.casefold()
        if folded in seen:
            raise ConfigError(
                f"slide ids {seen[folded]!r} and {slide_id!r} are the same file name on some "
                "systems; give one of them another id"
            )
        seen[folded] = slide_id


def _check_shard(index: int, count: int) -> None:
    if count < 1 or not 1 <= index <= count:
        raise ConfigError(f"shard is {index}/{count}; the first number counts from 1 to the second")
