from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bagscope import artifacts
from bagscope.cohort import claims as claims_module
from bagscope.cohort.claims import ClaimBook
from bagscope.cohort.process import is_running, is_visible, this_process
from bagscope.errors import ArtifactError


def write_claim(path: Path, *, age_s: float = 0.0, token: str = "ab" * 8, **changes) -> None:
    path.write_text(json.dumps({**this_process().as_json(), "token": token, **changes}))
    past = time.time() - age_s
    os.utime(path, (past, past))


def dead_pid() -> int:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    return gone.pid


def test_a_claim_is_held_once_and_says_by_whom(tmp_path):
    with ClaimBook(tmp_path, stage="tile") as one, ClaimBook(tmp_path, stage="tile") as two:
        assert one.acquire("a")
        assert not two.acquire("a")
        assert not one.acquire("a")
        record = json.loads((tmp_path / "a.claim").read_text())
        assert record["pid"] == os.getpid()
        assert record["stage"] == "tile"
        one.release("a")
        assert two.acquire("a")
    assert list(tmp_path.iterdir()) == []


def test_claims_are_given_back_on_an_exception(tmp_path):
    with pytest.raises(KeyboardInterrupt), ClaimBook(tmp_path, stage="t") as book:
        book.acquire("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "age_s", "free"),
    [
        ({}, 10_000, False),  # this very process is alive, however old its heartbeat
        ({"pid": "dead"}, 0, True),
        ({"started": 1.0}, 0, True),  # the id was used again
        ({"host": "elsewhere", "pid": 1}, 0, False),
        ({"host": "elsewhere", "pid": 1}, 400, True),
        ({"boot": "another", "pid": "dead"}, 0, False),
        ({"boot": "another", "pid": "dead"}, 400, True),
        ({"namespace": "pid:[1]", "pid": "dead"}, 0, False),
        ({"namespace": "pid:[1]", "pid": "dead"}, 400, True),
    ],
)
def test_who_counts_as_gone(tmp_path, changes, age_s, free):
    if changes.get("pid") == "dead":
        changes = {**changes, "pid": dead_pid()}
    write_claim(tmp_path / "a.claim", age_s=age_s, **changes)
    with ClaimBook(tmp_path, stage="t", stale_s=300) as book:
        assert book.acquire("a") is free
    assert [p.name for p in tmp_path.iterdir()] == ([] if free else ["a.claim"])


@pytest.mark.parametrize("content", [b"", b"{", b'{"token": "../x"}', b"[1]", b"\xff"])
def test_a_claim_of_nobody_is_taken_over_when_stale(tmp_path, content):
    path = tmp_path / "a.claim"
    path.write_bytes(content)
    with ClaimBook(tmp_path, stage="t", stale_s=300) as book:
        assert not book.acquire("a")
        past = time.time() - 400
        os.utime(path, (past, past))
        assert book.acquire("a")
    assert list(tmp_path.iterdir()) == []


def test_a_zombie_holds_nothing(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 10
    while artifacts.is_alive(child.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        os.kill(child.pid, 0)  # still there, for nobody has waited for it
        write_claim(tmp_path / "a.claim", pid=child.pid)
        with ClaimBook(tmp_path, stage="t") as book:
            assert book.acquire("a")
    finally:
        child.wait()


def test_a_held_claim_is_renewed(tmp_path):
    with ClaimBook(tmp_path, stage="t", stale_s=0.5) as book:
        book.acquire("a")
        os.utime(tmp_path / "a.claim", (1, 1))
        deadline = time.monotonic() + 5
        while (tmp_path / "a.claim").stat().st_mtime < time.time() - 5:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_claim_that_was_taken_over_is_left_to_its_new_holder(tmp_path):
    with ClaimBook(tmp_path, stage="t", stale_s=0.4) as book:
        book.acquire("a")
        write_claim(tmp_path / "a.claim", token="cd" * 8)
        time.sleep(0.2)  # a heartbeat notices
        book.release("a")
        assert json.loads((tmp_path / "a.claim").read_text())["token"] == "cd" * 8


def test_a_take_over_that_died_half_way_is_finished_by_the_next(tmp_path):
    """Its owner held the right to touch the abandoned claim, and was killed."""
    write_claim(tmp_path / "a.claim", pid=dead_pid(), token="ab" * 8)
    write_claim(tmp_path / f".{'ab' * 8}.claim", pid=dead_pid(), token="cd" * 8, touches="a.claim")
    with ClaimBook(tmp_path, stage="t") as book:
        assert book.acquire("a")
        assert [p.name for p in tmp_path.iterdir()] == ["a.claim"]
    assert list(tmp_path.iterdir()) == []


def test_rights_to_claims_that_are_gone_are_swept_and_others_kept(tmp_path):
    write_claim(tmp_path / f".{'ab' * 8}.claim", pid=dead_pid(), token="cd" * 8, touches="a.claim")
    write_claim(tmp_path / "b.claim", token="ef" * 8)
    write_claim(tmp_path / f".{'ef' * 8}.claim", token="01" * 8, touches="b.claim")
    with ClaimBook(tmp_path, stage="t") as book:
        book.sweep()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".{'ef' * 8}.claim", "b.claim"]


def test_without_hard_links_a_claim_is_exclusive_too(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claims_module.os, "link", refuse)
    with ClaimBook(tmp_path, stage="t") as one, ClaimBook(tmp_path, stage="t") as two:
        assert one.acquire("a")
        assert not two.acquire("a")
    write_claim(tmp_path / "a.claim", pid=dead_pid())
    with ClaimBook(tmp_path, stage="t") as book:
        assert book.acquire("a")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        ClaimBook(tmp_path / "file", stage="t") as book,
        pytest.raises(ArtifactError, match=r"a\.claim: the claim could not be written"),
    ):
        book.acquire("a")


def test_identity_of_this_process():
    me = this_process()
    assert is_visible(me)
    assert is_running(me)
    assert type(me).from_json(json.loads(json.dumps(me.as_json()))) == me
    assert type(me).from_json({"host": "x"}) is None


# --- stress -----------------------------------------------------------------------------------
# Whoever holds a claim adds a file to a folder, makes sure that it is alone there, and takes it
# away again. Some die while they hold it, at chosen points of a take-over too.


def compete(folder: str, seed: int, rounds: int, names: int, deadly: bool) -> None:
    chance = random.Random(seed)
    holders = Path(folder, "holders")

    def jitter(name: str) -> None:
        if name == "abandoned":
            time.sleep(chance.random() * 0.012)
        if name == "takeover":
            time.sleep(chance.random() * 0.002)
            if deadly and chance.random() < 0.2:
                os._exit(9)

    artifacts.observe_step = jitter
    book = ClaimBook(Path(folder, "claims"), stage="t")
    for _ in range(rounds):
        name = f"s{chance.randrange(names)}"
        if not book.acquire(name):
            continue
        mine = holders / f"{name}~{os.getpid()}"
        mine.touch()
        time.sleep(chance.random() * 0.008)
        others = [p for p in holders.glob(f"{name}~*") if p != mine and _is_live_holder(p)]
        if others:
            with Path(folder, "violations").open("a") as violations:
                violations.write(f"{mine.name} {others}\n")
        if deadly and chance.random() < 0.3:
            os._exit(9)
        mine.unlink()
        book.release(name)
    book.release_all()


def _is_live_holder(path: Path) -> bool:
    return artifacts.is_alive(int(path.name.partition("~")[2]))


def run_competition(folder: Path, *, processes: int, rounds: int, deadly: bool) -> int:
    """Run competitors, replacing the dead, and return how many ran."""
    for name in ("claims", "holders"):
        (folder / name).mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bagscope.cohort.claims", "planted"])
    seeds = iter(range(10_000))
    running: list[multiprocessing.process.BaseProcess] = []
    started = finished = 0
    while finished < processes:
        while len(running) < 6:
            process = context.Process(
                target=compete, args=(str(folder), next(seeds), rounds, 2, deadly)
            )
            process.start()
            started += 1
            running.append(process)
        for process in list(running):
            process.join(0.005)
            if process.exitcode is not None:
                assert process.exitcode in (0, 9)
                running.remove(process)
                finished += 1
    for process in running:
        process.join()
    return started


@pytest.mark.parametrize("deadly", [False, True])
def test_no_two_processes_ever_hold_a_claim(tmp_path, deadly):
    run_competition(tmp_path, processes=50 if deadly else 8, rounds=40, deadly=deadly)
    violations = tmp_path / "violations"
    assert not violations.exists(), violations.read_text()
    # Nothing is stuck: the next process gets every claim, and leaves nothing behind.
    with ClaimBook(tmp_path / "claims", stage="t") as book:
        assert all(book.acquire(f"s{i}") for i in range(2))
        book.sweep()
    artifacts.sweep_temporaries(tmp_path / "claims")
    assert list((tmp_path / "claims").iterdir()) == []
