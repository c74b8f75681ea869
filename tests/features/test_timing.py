"""What a run was bound by: accounts kept by hand, and runs slowed down in one place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bagscope.features import timing as timing_module
from bagscope.features.timing import Ledger, Timing
from tests.features.engine_parts import SmallStudy, Tiny, make_study, run_engine, session_of
from tests.features.planted_readers import read_crunching, read_throttled


def timing_of(**seconds: float) -> Timing:
    values = dict.fromkeys(
        ("reading_s", "decoding_s", "transfer_s", "encoding_s", "writing_s", "other_s"), 0.0
    )
    return Timing(**{**values, "total_s": 10.0, "tiles": 5, **seconds})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("longest", "sentence"),
    [
        ("reading_s", "bound by: reading (disk or network) (93%)"),
        ("decoding_s", "bound by: decoding (93%)"),
        ("transfer_s", "bound by: transfer (93%)"),
        ("encoding_s", "bound by: encoder (93%)"),
        ("writing_s", "bound by: writing (93%)"),
    ],
)
def test_the_sentence_names_the_longest(longest: str, sentence: str) -> None:
    timing = timing_of(**{longest: 9.3})
    assert timing.sentence == sentence
    assert next(iter(timing.seconds().items())) == (longest.removesuffix("_s"), 9.3)
    assert list(timing.seconds().values()) == sorted(timing.seconds().values(), reverse=True)


def test_nothing_encoded_is_bound_by_nothing() -> None:
    assert timing_of(tiles=0, reading_s=9.0).sentence == "nothing was encoded"


def test_the_accounts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(timing_module.time, "perf_counter", lambda: now[0])
    ledger = Ledger()
    for phase, seconds in (("waiting", 4.0), ("encoding", 2.0), ("writing", 1.0)):
        with ledger.spending(phase):  # type: ignore[arg-type]
            now[0] += seconds
    with pytest.raises(ZeroDivisionError), ledger.spending("transfer"):
        now[0] += 0.5
        raise ZeroDivisionError
    now[0] += 2.5
    # Readers were at work for a quarter of their time, and waited for bytes otherwise.
    ledger.add_reader(wall_s=6.0, working_s=1.0)
    ledger.add_reader(wall_s=2.0, working_s=1.0)
    ledger.tiles = 3
    timing = ledger.timing()
    assert timing.total_s == pytest.approx(10.0)
    assert timing.reading_s == pytest.approx(3.0)
    assert timing.decoding_s == pytest.approx(1.0)
    assert timing.encoding_s == pytest.approx(2.0)
    assert timing.transfer_s == pytest.approx(0.5)
    assert timing.writing_s == pytest.approx(1.0)
    assert timing.other_s == pytest.approx(2.5)
    assert sum(timing.seconds().values()) + timing.other_s == pytest.approx(timing.total_s)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> SmallStudy:
    return make_study(tmp_path_factory.mktemp("study"), {"a": 40, "b": 30})


def test_a_throttled_reader_is_named(study: SmallStudy, tmp_path: Path) -> None:
    ran = run_engine(study, session_of(Tiny()), tmp_path, work=read_throttled)
    assert re.fullmatch(r"bound by: reading \(disk or network\) \(\d+%\)", ran.timing.sentence)
    # 14 chunks, each delayed by 0.15 s.
    assert ran.timing.reading_s > 1.5


@pytest.mark.slow
def test_a_costly_codec_is_named(study: SmallStudy, tmp_path: Path) -> None:
    ran = run_engine(study, session_of(Tiny()), tmp_path, work=read_crunching)
    timing = ran.timing
    assert re.fullmatch(r"bound by: decoding \(\d+%\)", timing.sentence)
    assert timing.decoding_s > 1.5


@pytest.mark.slow
def test_standing_in_line_for_a_core_is_no_waiting_for_bytes(
    study: SmallStudy, tmp_path: Path
) -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this system does not tell how long a thread stood in line")
    code = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    crowd = [
        subprocess.Popen([sys.executable, "-c", code]) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        ran = run_engine(study, session_of(Tiny()), tmp_path, work=read_crunching)
    finally:
        for process in crowd:
            process.kill()
            process.wait()
    assert ran.timing.sentence.startswith("bound by: decoding (")


def test_a_slow_network_is_named(study: SmallStudy, tmp_path: Path) -> None:
    class Slow(Tiny):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            time.sleep(0.3)
            return super().forward(images)

    ran = run_engine(study, session_of(Slow()), tmp_path, readers=2)
    assert ran.timing.sentence.startswith("bound by: encoder (")
    assert ran.timing.encoding_s > 0.3 * 9
    assert ran.timing.tiles == 70


def test_every_second_is_accounted_for(study: SmallStudy, tmp_path: Path) -> None:
    begin_s = time.perf_counter()
    timing = run_engine(study, session_of(Tiny()), tmp_path).timing
    assert 0 < timing.total_s < time.perf_counter() - begin_s
    counted_s = sum(timing.seconds().values()) + timing.other_s
    assert counted_s == pytest.approx(timing.total_s)
