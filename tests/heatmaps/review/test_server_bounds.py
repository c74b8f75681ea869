"""What the viewer holds, keeps waiting and survives."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import ReadError
from bagscope.heatmaps.review.live import reader
from bagscope.heatmaps.review.live.byte_cache import ByteCache
from bagscope.heatmaps.review.live.reader import SlideAt, ThumbWanted, TileWanted
from bagscope.heatmaps.review.live.readers import ReaderLimits, SlideReaders, TooBusy
from tests.builders import build_svs
from tests.heatmaps.review import planted_readers
from tests.heatmaps.review.asgi import Answer, client_of
from tests.heatmaps.review.served_runs import MadeData, made_viewer

KIB = 1 << 10


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "a.svs"
    build_svs(path, width_px=2048, height_px=2048, downsamples=(1, 4))
    return path


@pytest.fixture
def made_readers() -> Iterator[list[SlideReaders]]:
    made: list[SlideReaders] = []
    yield made
    for readers in made:
        readers.close()


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 40)), max_size=40), st.integers(0, 60))
def test_the_cache_keeps_the_latest_within_its_bytes(
    puts: list[tuple[int, int]], most_bytes: int
) -> None:
    cache = ByteCache(most_bytes)
    kept: OrderedDict[int, int] = OrderedDict()
    for key, length in puts:
        if key % 2 and cache.get(key) is not None:
            kept.move_to_end(key)
        cache.put(key, bytes(length))
        kept.pop(key, None)
        if length <= most_bytes:
            kept[key] = length
        while sum(kept.values()) > most_bytes:
            kept.popitem(last=False)
        assert cache.held_bytes == sum(kept.values()) <= most_bytes
        assert {k for k in range(7) if cache._kept.get(k) is not None} == set(kept)


def test_32_at_once_stay_within_the_cache_and_are_read_once_each(
    slide: Path, made_readers: list[SlideReaders], monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = SlideReaders()
    made_readers.append(readers)
    asked: list[object] = []
    ask = readers.ask
    monkeypatch.setattr(readers, "ask", lambda wanted: asked.append(wanted) or ask(wanted))
    most_kib = 200
    viewer = made_viewer({"a": slide}, readers, cache_mib=most_kib / KIB)
    places = [f"11/{column}_{row}" for row in range(4) for column in range(4)]
    with client_of(viewer.app(token=None)) as client:

        async def all_at_once() -> list[Answer]:
            targets = [f"/abmil/slides/a/picture_files/{place}.jpg" for place in places] * 2
            return list(await asyncio.gather(*(client.asked(target) for target in targets)))

        answers = client.run(all_at_once())
    assert [answer.status for answer in answers] == [200] * 32
    assert [a.body for a in answers[:16]] == [a.body for a in answers[16:]]
    assert len({answer.body for answer in answers}) == 16
    tiles = [wanted for wanted in asked if isinstance(wanted, TileWanted)]
    assert len(tiles) == len(set(tiles)) == 16
    assert 0 < viewer.cache.held_bytes <= most_kib * KIB
    assert sum(len(answer.body) for answer in answers[:16]) > most_kib * KIB


def test_data_are_put_together_once_for_all_who_ask(
    slide: Path, made_readers: list[SlideReaders]
) -> None:
    readers = SlideReaders()
    made_readers.append(readers)
    viewer = made_viewer({"a": slide}, readers)
    data = viewer._runs["abmil"].data
    assert isinstance(data, MadeData)
    with client_of(viewer.app(token=None)) as client:

        async def together() -> list[Answer]:
            targets = ["/abmil/slides/a/slide.js", "/abmil/data/cohort.js"] * 8
            return list(await asyncio.gather(*(client.asked(target) for target in targets)))

        assert {answer.status for answer in client.run(together())} == {200}
    assert sorted(data.asked) == ["a", "cohort"]


def test_who_comes_when_too_many_wait_is_asked_to_come_again(
    slide: Path, made_readers: list[SlideReaders]
) -> None:
    limits = ReaderLimits(workers=1, waiting=2)
    readers = SlideReaders(limits, work=planted_readers.read_slowly)
    made_readers.append(readers)
    viewer = made_viewer({str(n): slide.with_name(str(n)) for n in range(12)}, readers)
    with client_of(viewer.app(token=None)) as client:

        async def all_at_once() -> list[Answer]:
            targets = [f"/abmil/slides/{n}/thumb.jpg" for n in range(12)]
            return list(await asyncio.gather(*(client.asked(target) for target in targets)))

        answers = client.run(all_at_once())
    refused = [answer for answer in answers if answer.status == 503]
    assert len(answers) - len(refused) in (2, 3)
    assert {answer.status for answer in answers} == {200, 503}
    assert {answer.headers["retry-after"] for answer in refused} == {"2"}
    assert refused[0].text.count("\n") == 1


def test_what_nobody_wants_any_more_is_never_read(made_readers: list[SlideReaders]) -> None:
    readers = SlideReaders(ReaderLimits(workers=1), work=planted_readers.read_slowly)
    made_readers.append(readers)
    first, *others = [readers.ask(ThumbWanted(slide=SlideAt(path=Path(n)))) for n in "abcde"]
    started = time.monotonic()
    assert all(other.cancel() for other in others[1:])
    first.result(10)
    others[0].result(10)
    readers.ask(ThumbWanted(slide=SlideAt(path=Path("f")))).result(10)
    # Three slow readings and the start of a worker, not six.
    assert time.monotonic() - started < 6 * planted_readers.SLOW_S + 5


@pytest.mark.parametrize("work", [planted_readers.crash_on_tiles, planted_readers.hang_on_tiles])
def test_a_slide_that_kills_its_reader_is_striped_and_soon_left_alone(
    work: object, slide: Path, made_readers: list[SlideReaders], tmp_path: Path
) -> None:
    sound = tmp_path / "sound.svs"
    build_svs(sound, width_px=256, height_px=256, downsamples=(1,))
    readers = SlideReaders(ReaderLimits(seconds=0.5), work=work)  # type: ignore[arg-type]
    made_readers.append(readers)
    viewer = made_viewer({"bad": slide, "sound": sound}, readers)
    with client_of(viewer.app(token=None)) as client:
        for place in ("11/0_0", "11/1_0", "11/2_0"):
            answer = client.get(f"/abmil/slides/bad/picture_files/{place}.jpg")
            assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
        with pytest.raises(ReadError, match="tried again after 30 s"):
            readers.ask(TileWanted(slide=SlideAt(path=slide), level=11, column=3, row=0))
        started = time.monotonic()
        assert client.get("/abmil/slides/bad/picture_files/11/3_0.jpg").status == 200
        assert time.monotonic() - started < 0.4
        assert client.get("/abmil/slides/sound/thumb.jpg").status == 200


def test_closing_ends_what_hangs_at_once(slide: Path) -> None:
    readers = SlideReaders(work=planted_readers.hang_on_tiles)
    stuck = [
        readers.ask(TileWanted(slide=SlideAt(path=slide), level=0, column=column, row=0))
        for column in range(4)
    ]
    time.sleep(0.3)
    started = time.monotonic()
    readers.close()
    assert time.monotonic() - started < 2
    assert all(one.cancelled() or isinstance(one.exception(), TooBusy) for one in stuck)
    with pytest.raises(TooBusy):
        readers.ask(ThumbWanted(slide=SlideAt(path=slide)))
    assert "bagscope-readers" not in {thread.name for thread in threading.enumerate()}


def test_a_worker_keeps_a_few_slides_open_and_closes_the_others(tmp_path: Path) -> None:
    places = []
    for name in "abcdef":
        build_svs(tmp_path / f"{name}.svs", width_px=64, height_px=64, downsamples=(1,))
        places.append(SlideAt(path=tmp_path / f"{name}.svs"))
    opened = [reader.opened(place) for place in places[: reader.OPEN_SLIDES]]
    assert reader.opened(places[0]) is opened[0]
    reader.opened(places[reader.OPEN_SLIDES])
    assert list(reader._open) == [places[2], places[3], places[0], places[4]]
    with pytest.raises(ReadError):
        opened[1].read_level(0, 0, 0, 8, 8)
    for slide in reader._open.values():
        slide.close()
    reader._open.clear()
