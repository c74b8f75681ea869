"""The extraction engine: readers, encoders and files of a whole cohort in one pipeline.

Readers (processes of their own) decode tiles into shared memory; this thread lays them out in
batches, which run across slide boundaries, and encodes; another one stores the vectors. The cohort
runner sees an executor like any other: slides go in, outcomes come out.

A slide ends in one of four ways. Its vectors are stored (done); they were there (skipped); reading
or encoding failed; or its reader died, hung or grew too large, upon which it is read once more from
the start, and fails if that happens again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bagscope import artifacts
from bagscope.cohort.executors.local import LocalExecutor
from bagscope.cohort.executors.protocol import Finished, Record, failed
from bagscope.cohort.jobs import Job
from bagscope.errors import (
    BagscopeError,
    EncoderUnavailable,
    SlideError,
    WorkerDied,
    WorkerOutOfMemory,
    WorkerTimeout,
    first_line,
    in_one_line,
)
from bagscope.features.batches import Batcher, Encoded
from bagscope.features.feature_file import (
    FeatureWriter,
    Float16Overflow,
    StoredDtype,
    read_feature_file,
)
from bagscope.features.feed import ChunkRead, FeedBroke, FeedEvent, ReadingEnded, SlideFeed, Woken
from bagscope.features.reader import (
    ReadTask,
    refuse_too_many_unreadable,
    require_tiled_slide,
)
from bagscope.features.sink import FeatureSink, Stored
from bagscope.features.targets import Target, find_made, open_writer, slide_record
from bagscope.features.timing import Ledger, Phase, Timing
from bagscope.wsi.tile_file import TileFile, read_tile_file

_READER_DEATHS = frozenset(kind.__name__ for kind in (WorkerDied, WorkerTimeout, WorkerOutOfMemory))
_DEATHS_ALLOWED = 1
_WAITING_SLIDES = 64
"""Slides, besides those being read, that may hold files open until their last batch is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractTask:
    """What the engine needs to know of one slide: the payload of its job.

    `not_tiled` says why there is no tile file, where there is none.
    """

    slide_path: Path
    tile_path: Path
    mpp: float | None = None
    scene: int | None = None
    backend: str | None = None
    not_tiled: str = ""


@dataclass(eq=False)
class _Output:
    """One file that is being made."""

    target: Target
    writer: FeatureWriter
    owed: int
    is_finishing: bool = False
    is_stored: bool = False


@dataclass(eq=False)
class _Slide:
    """A slide in hand, from its start to its end; a second attempt is another one."""

    job: Job
    tiles: TileFile
    outputs: list[_Output]
    float32_of: frozenset[Target]
    deaths: int
    begin_s: float = field(default_factory=time.monotonic)
    readable: NDArray[np.bool_] = field(default_factory=lambda: np.ones(0, np.bool_))
    problems: list[str] = field(default_factory=list)
    failure: Record | None = None
    overflowed: frozenset[Target] = frozenset()
    is_read: bool = False
    is_replaced: bool = False

    @property
    def is_lost(self) -> bool:
        return self.failure is not None or bool(self.overflowed) or self.is_replaced


_Owner = tuple[_Slide, _Output]


class ExtractExecutor:
    """Carries out extraction jobs; see the module's text.

    Args:
        targets: the encoders, all on tiles of one size.
        feed: makes the readers, given who takes their events.
        readers: slides read at a time.
        read_task: makes a reader's task of a slide's.
        overwrite: replace files that were made differently.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        feed: Callable[[Callable[[FeedEvent], None]], SlideFeed],
        *,
        readers: int,
        read_task: Callable[[ExtractTask], ReadTask],
        overwrite: bool = False,
    ) -> None:
        self._targets = list(targets)
        self._readers = readers
        self._read_task = read_task
        self._overwrite = overwrite
        self._inbox: SimpleQueue[FeedEvent | Stored] = SimpleQueue()
        self._feed = feed(self._inbox.put)
        self._sink = FeatureSink(self._inbox.put)
        self._batchers: dict[object, Batcher[_Owner]] = {}
        self._slides: dict[str, _Slide] = {}
        self._reading: set[str] = set()
        self._ended: list[Finished] = []
        self._ledger = Ledger()

    # --- the executor's side ------------------------------------------------------------------

    def size(self) -> int:
        """Return how many slides are read at a time."""
        return self._readers

    def slots(self) -> int:
        """Return how many more slides can be started now."""
        waiting = len(self._slides) - len(self._reading)
        if waiting >= _WAITING_SLIDES:
            return 0
        return max(0, self._readers - len(self._reading) - len(self._ended))

    def start(self, job: Job) -> None:
        """Begin a slide, or find that nothing is left to do."""
        self._try_to_begin(job, float32_of=frozenset(), deaths=0)

    def wait(self, timeout_s: float) -> list[Finished]:
        """Read, encode and store until a slide ends, a reader is free or `timeout_s` is over."""
        deadline_s = time.monotonic() + timeout_s
        while not self._ended:
            event = self._next_event(deadline_s)
            if event is None or isinstance(event, Woken):
                break
            self._handle(event)
            if isinstance(event, ReadingEnded):
                break  # the next slide is to be read while this one's last batch fills up
        ended, self._ended = self._ended, []
        return ended

    def wake(self) -> None:
        """Make a running `wait` return at once."""
        self._inbox.put(Woken())

    def close(self) -> None:
        """Stop the readers and remove unfinished files."""
        self._feed.close()
        for slide in self._slides.values():
            self._discard(slide)
        self._sink.close()

    def timing(self) -> Timing:
        """Return where the time went so far."""
        return self._ledger.timing()

    # --- events -------------------------------------------------------------------------------

    def _next_event(self, deadline_s: float) -> FeedEvent | Stored | None:
        """Return what happened next; encodes part-filled batches when nothing else can happen."""
        try:
            return self._inbox.get_nowait()
        except Empty:
            pass
        if not self._reading and not all(batcher.is_idle for batcher in self._batchers.values()):
            for batcher in list(self._batchers.values()):
                self._run_dry(batcher)
        phase: Phase = "waiting" if self._reading else "writing"
        with self._ledger.spending(phase):
            try:
                return self._inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except Empty:
                return None

    def _handle(self, event: FeedEvent | Stored) -> None:
        if isinstance(event, ChunkRead):
            self._take_chunk(event)
        elif isinstance(event, ReadingEnded):
            self._reading.discard(event.finished.slide_id)
            slide = self._slides[event.finished.slide_id]
            slide.is_read = True
            self._after_reading(slide, event.finished)
        elif isinstance(event, Stored):
            slide, output = event.key
            self._after_storing(slide, output, event.error)
        elif isinstance(event, FeedBroke):
            raise event.error

    # --- one slide ----------------------------------------------------------------------------

    def _try_to_begin(self, job: Job, *, float32_of: frozenset[Target], deaths: int) -> None:
        try:
            self._begin(job, float32_of=float32_of, deaths=deaths)
        except Exception as error:  # whatever a damaged file makes of it, it is this slide's end
            self._end(job, _failure(error), 0.0)

    def _begin(self, job: Job, *, float32_of: frozenset[Target], deaths: int) -> None:
        task: ExtractTask = job.payload
        if task.not_tiled:
            raise SlideError(task.not_tiled)
        tiles = read_tile_file(task.tile_path)
        made = {
            target: find_made(job.slide_id, target, tiles, overwrite=self._overwrite)
            for target in self._targets
        }
        wanted = [target for target, file in made.items() if file is None]
        if not wanted:
            if task.slide_path.exists():  # features outlive slides that were moved away
                require_tiled_slide(tiles, job.slide_id, self._read_task(task))
            files = [file for file in made.values() if file is not None]
            self._end(job, slide_record(files, len(tiles), outcome="skipped"), 0.0)
            return
        slide = _Slide(job, tiles, [], float32_of, deaths)
        slide.readable = np.ones(len(tiles), np.bool_)
        try:
            for target in wanted:
                stored_dtype: StoredDtype = (
                    "float32" if target in float32_of else target.stored_dtype
                )
                writer = open_writer(job.slide_id, tiles, target, stored_dtype)
                slide.outputs.append(_Output(target, writer, owed=len(tiles)))
        except BaseException:
            self._discard(slide)
            raise
        self._slides[job.slide_id] = slide
        self._reading.add(job.slide_id)
        self._feed.start(Job(slide_id=job.slide_id, payload=self._read_task(task)))

    def _take_chunk(self, event: ChunkRead) -> None:
        chunk, slide = event.chunk, self._slides[event.slide_id]
        self._ledger.add_reader(wall_s=chunk.wall_s, working_s=chunk.working_s)
        if chunk.unreadable:
            slide.readable[chunk.start + np.array(chunk.unreadable)] = False
            for output in slide.outputs:
                output.owed -= len(chunk.unreadable)
        slide.problems += chunk.problems
        tiles = self._feed.tiles(chunk)
        for begin, end in _runs(slide.readable[chunk.start : chunk.start + chunk.count]):
            for output in slide.outputs:
                self._add(slide, output, chunk.start + begin, tiles[begin:end])
        self._feed.release(chunk)

    def _add(self, slide: _Slide, output: _Output, start: int, tiles: NDArray[np.uint8]) -> None:
        """Put tiles into batches of an output's encoder, and encode those that fill up."""
        batcher = self._batcher(output)
        while len(tiles) and not slide.is_lost:
            with self._ledger.spending("transfer"):
                count = batcher.add((slide, output), start, tiles)
            start, tiles = start + count, tiles[count:]
            if batcher.is_full:
                self._encode(batcher)

    def _batcher(self, output: _Output) -> Batcher[_Owner]:
        """Return what fills batches for an output: shared by all slides if they may share one."""
        session = output.target.session
        key = session if session.crosses_slides else output
        if key not in self._batchers:
            self._batchers[key] = Batcher(session)
        return self._batchers[key]

    def _run_dry(self, batcher: Batcher[_Owner]) -> None:
        """Encode what waits, though the batch is not full."""
        if not batcher.is_idle:
            self._encode(batcher)
            self._take(batcher.flush())

    def _encode(self, batcher: Batcher[_Owner]) -> None:
        session = batcher.session
        try:
            with self._ledger.spending("encoding"):
                encoded = list(batcher.run())
        except RuntimeError as error:
            raise EncoderUnavailable(
                f"encoder {session.spec.name}: failed on {session.execution.device} "
                f"({first_line(error)}); what is stored stays, give the same command again to go on"
            ) from error
        self._take(encoded)

    def _take(self, encoded: Any) -> None:
        """Have vectors stored, and end files that have all of theirs."""
        part: Encoded[_Owner]
        for part in encoded:
            slide, output = part.owner
            self._ledger.tiles += len(part.vectors)
            if slide.is_lost:
                continue
            bad = np.flatnonzero(~np.isfinite(part.vectors).all(axis=1))
            if len(bad):
                x_l0, y_l0 = slide.tiles.coords_l0[part.start + int(bad[0])].tolist()
                self._lose(
                    slide,
                    failed(
                        SlideError.__name__,
                        f"{slide.job.slide_id}: encoder {output.target.session.spec.name} gave "
                        f"NaN or infinity for the tile at x={x_l0}, y={y_l0} (and "
                        f"{len(bad) - 1} more of its batch); try --precision float32",
                    ),
                )
                continue
            with self._ledger.spending("writing"):
                self._sink.write((slide, output), output.writer, part.start, part.vectors)
            output.owed -= len(part.vectors)
            self._finish_if_complete(slide, output)

    def _finish_if_complete(self, slide: _Slide, output: _Output) -> None:
        is_complete = slide.is_read and not output.owed and not slide.is_lost
        if is_complete and not output.is_finishing:
            output.is_finishing = True
            self._sink.finish((slide, output), output.writer, slide.readable)

    def _after_reading(self, slide: _Slide, finished: Finished) -> None:
        record = finished.record
        if record["outcome"] == "failed" and not slide.is_lost:
            may_retry = record["error_class"] in _READER_DEATHS and slide.deaths < _DEATHS_ALLOWED
            self._discard(slide)
            if may_retry:
                self._again(slide, deaths=slide.deaths + 1)
            else:
                slide.failure = record
                self._conclude(slide)
            return
        if slide.is_lost:
            self._conclude(slide)
            return
        try:
            unreadable = int(np.count_nonzero(~slide.readable))
            refuse_too_many_unreadable(slide.tiles, unreadable, slide.problems)
        except SlideError as error:
            self._lose(slide, failed(type(error).__name__, str(error)))
            return
        for output in slide.outputs:
            if not output.target.session.crosses_slides:
                self._run_dry(self._batcher(output))
                self._batchers.pop(output, None)
            self._finish_if_complete(slide, output)

    def _after_storing(self, slide: _Slide, output: _Output, error: BaseException | None) -> None:
        if slide.is_lost or self._slides.get(slide.job.slide_id) is not slide:
            return
        if isinstance(error, Float16Overflow):
            slide.overflowed = frozenset({output.target})
            self._stop(slide)
        elif error is not None:
            self._lose(slide, _failure(error))
        else:
            output.is_stored = True
            if all(output.is_stored for output in slide.outputs):
                self._conclude(slide)

    def _lose(self, slide: _Slide, record: Record) -> None:
        slide.failure = record
        self._stop(slide)

    def _stop(self, slide: _Slide) -> None:
        """Give a lost slide up: at once, or when its reader has ended."""
        self._discard(slide)
        if slide.is_read:
            self._conclude(slide)
        else:
            self._feed.stop(slide.job.slide_id)

    def _conclude(self, slide: _Slide) -> None:
        """Say how a slide ended that is read and either stored or lost."""
        if slide.overflowed:
            self._again(slide, deaths=slide.deaths)
            return
        del self._slides[slide.job.slide_id]
        try:
            record = slide.failure or self._done(slide)
        except BagscopeError as error:  # somebody touched the files that were just made
            record = _failure(error)
        self._end(slide.job, record, time.monotonic() - slide.begin_s)

    def _done(self, slide: _Slide) -> Record:
        found = [read_feature_file(target.path(slide.job.slide_id)) for target in self._targets]
        return slide_record(found, len(slide.tiles), outcome="done", problems=slide.problems)

    def _again(self, slide: _Slide, *, deaths: int) -> None:
        """Read a slide anew from its start; what of it still waits in batches is of no use."""
        slide.is_replaced = True
        del self._slides[slide.job.slide_id]
        float32_of = slide.float32_of | slide.overflowed
        self._try_to_begin(slide.job, float32_of=float32_of, deaths=deaths)

    def _discard(self, slide: _Slide) -> None:
        for output in slide.outputs:
            self._batchers.pop(output, None)
            if not output.is_stored:
                self._sink.discard(output.writer)

    def _end(self, job: Job, record: Record, seconds: float) -> None:
        self._ended.append(
            Finished(
                slide_id=job.slide_id,
                record=record,
                seconds=seconds,
                host=artifacts.host_name(),
            )
        )


def _failure(error: BaseException) -> Record:
    return failed(type(error).__name__, in_one_line(error))


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return (begin, end) of every run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


def make_feed(
    ring: Any,
    *,
    readers: int,
    timeout_s: float | None,
    memory_limit_mib: float | None,
    preload: Sequence[str],
) -> Callable[[Callable[[FeedEvent], None]], SlideFeed]:
    """Return what makes the readers of a run on this machine."""
    import pickle

    from bagscope.features import reader

    def make(post: Callable[[FeedEvent], None]) -> SlideFeed:
        def pool(on_message: Callable[[str, bytes], None]) -> LocalExecutor:
            return LocalExecutor(
                pickle.dumps(reader.read_slide),
                module=reader.__name__,
                workers=readers,
                timeout_s=timeout_s,
                memory_limit_mib=memory_limit_mib,
                preload=preload,
                on_message=on_message,
            )

        return SlideFeed(pool, ring, post)

    return make
