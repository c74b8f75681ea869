from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import planted
import psutil
import pytest

from bagscope import artifacts
from bagscope.cohort import runner
from bagscope.cohort.progress import RunFinished, RunStarted, RunWaiting, SlideFinished
from bagscope.cohort.runner import Job, RunOptions, run_cohort
from bagscope.cohort.status import read_statuses
from bagscope.errors import ArtifactError, ConfigError


def leftovers(folder: Path) -> list[str]:
    """Claims and temporaries, whoever made them."""
    return sorted(
        p.name for p in folder.rglob("*") if ".claim" in p.name or p.name.endswith(".tmp")
    )


def test_every_bad_end_fails_its_own_slide_and_no_other(run, tmp_path, listener):
    bad = {
        "raises": ("raise", "SpacingError", "no pixel size; pass --mpp"),
        "surprises": ("surprise", "ZeroDivisionError", "division by zero"),
        "hangs": ("hang", "WorkerTimeout", "longer than the 6 s"),
        "aborts": ("abort", "WorkerDied", "SIGABRT"),
        "segfaults": ("segfault", "WorkerDied", "SIGSEGV"),
        "is-killed": ("kill", "WorkerDied", "SIGKILL"),
        "exits": ("exit", "WorkerDied", "SystemExit 3"),
        "exits-hard": ("hard-exit", "WorkerDied", "exit code 0"),
        "swells": (("swell", 800), "WorkerOutOfMemory", "more than the 250 MiB"),
        "child-swells": (("swell-child", 400), "WorkerOutOfMemory", "more than the 250 MiB"),
        "wants-memory": ("memory-error", "WorkerOutOfMemory", "memory ran out"),
        "returns-a-lock": ("not-json", "TypeError", "lock is not JSON"),
        "returns-seven": ("not-a-result", "TypeError", "int, not a StageResult"),
    }
    payloads = {}
    for name, (payload, _, _) in bad.items():
        payloads[name] = payload
        payloads[f"good-beside-{name}"] = "ok"
    report = run(payloads, timeout_s=6, memory_limit_mib=250)

    assert report.exit_code == 1
    assert report.counts == {"done": len(bad), "skipped": 0, "failed": len(bad)}
    statuses = read_statuses(tmp_path / "status", "plant")
    assert statuses.keys() == payloads.keys()
    for name, (_, error_class, part) in bad.items():
        status = statuses[name]
        assert (status.outcome, status.error_class) == ("failed", error_class), status
        assert part in status.message
        assert "\n" not in status.message
        assert statuses[f"good-beside-{name}"].outcome == "done"
    assert "ZeroDivisionError" in statuses["surprises"].traceback
    assert statuses["raises"].traceback == ""
    assert {f.slide_id for f in report.failures} == bad.keys()
    assert 5.9 < statuses["hangs"].seconds < 9
    assert leftovers(tmp_path) == []
    assert not [c for c in psutil.Process().children(recursive=True) if "swell" in c.name()]


def test_workers_are_kept_and_only_dead_ones_replaced(run, tmp_path):
    run({f"s{i}": "ok" for i in range(20)}, workers=2)
    pids = {s.facts["pid"] for s in read_statuses(tmp_path / "status", "plant").values()}
    assert len(pids) <= 2
    assert os.getpid() not in pids


def test_a_worker_that_stays_large_is_replaced(run, tmp_path):
    def pids(limit_mib: float) -> set[int]:
        run({"a": "ok", "b": "ok"}, workers=1, memory_limit_mib=limit_mib)
        statuses = read_statuses(tmp_path / "status", "plant")
        return {statuses["a"].facts["pid"], statuses["b"].facts["pid"]}

    run({"rss": "ok"}, work=planted.tell_memory, workers=1)
    held_mib = read_statuses(tmp_path / "status", "plant")["rss"].facts["rss_mib"]
    assert len(pids(10 * held_mib)) == 1
    assert len(pids(1.5 * held_mib)) == 2


def test_events_and_totals(run, listener):
    report = run({"a": "ok", "b": "warn", "c": "raise"}, workers=1)
    started = listener.of(RunStarted)[0]
    assert (started.total, started.workers) == (3, 1)
    finished = listener.of(SlideFinished)
    assert [e.progress.finished for e in finished] == [1, 2, 3]
    assert finished[-1].progress.tiles == 20
    assert finished[-1].progress.failed == 1
    assert finished[-1].progress.left_s == 0
    assert report.tiles == 20
    assert report.warnings == (("b", "pale"),)
    assert report.remaining == 0
    assert listener.of(RunFinished)[0].report == report


def test_the_heaviest_slide_is_started_first(tmp_path, listener):
    jobs = [Job(slide_id=f"s{i}", payload="ok", weight=w) for i, w in enumerate([1, 5, 3, 5])]
    options = RunOptions(workers=1)
    run_cohort(
        jobs, planted.behave, stage="p", status_dir=tmp_path, options=options, report=listener
    )
    assert [e.slide_id for e in listener.of(SlideFinished)] == ["s1", "s3", "s2", "s0"]


def test_resumed_slides_are_skipped_and_keep_their_status(run, tmp_path, listener):
    work = partial(planted.make_file, folder=tmp_path)
    slides = {f"s{i}": None for i in range(4)}
    assert run(slides, work=work).counts["done"] == 4
    path = tmp_path / "status" / "plant" / "s0.json"
    before = path.read_bytes()
    (tmp_path / "s3.bin").unlink()
    report = run(slides, work=work)
    assert report.counts == {"done": 1, "skipped": 3, "failed": 0}
    assert report.exit_code == 0
    after = json.loads(path.read_text())
    assert after["outcome"] in ("done", "skipped")
    assert json.loads(before)["fingerprint"] == after["fingerprint"]


def test_retries_end_with_the_first_success(run, tmp_path):
    payloads = {"frail": ("die-once", str(tmp_path / "marker")), "bad": "abort", "good": "ok"}
    report = run(payloads, retries=1)
    assert [f.slide_id for f in report.failures] == ["bad"]
    (tmp_path / "marker").unlink()
    report = run(payloads, retries=0)
    assert [f.slide_id for f in report.failures] == ["bad", "frail"]


def test_job_that_cannot_be_pickled_fails_alone(run):
    report = run({"bad": lambda: None, "good": "ok"})
    assert [f.slide_id for f in report.failures] == ["bad"]
    assert "can't be sent to a worker" in report.failures[0].message


def test_stage_that_cannot_be_imported_fails_with_the_reason(run, tmp_path):
    (tmp_path / "gone_stage.py").write_text("def work(job): ...\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import gone_stage
    finally:
        sys.path.remove(str(tmp_path))
    report = run({"a": "ok"}, work=gone_stage.work)
    assert "could not load the stage" in report.failures[0].message
    assert "gone_stage" in report.failures[0].message


def test_temporaries_of_the_dead_are_swept_and_those_of_the_living_kept(run, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "made").mkdir()
    folders = (tmp_path, tmp_path / "made", tmp_path / "status" / "plant")
    folders[-1].mkdir(parents=True)
    for folder in folders:
        for pid in (gone.pid, os.getppid()):
            (folder / f".a.h5.{artifacts.host_name()}~{pid}~0123abcd.tmp").touch()
    run({"a": "ok"}, sweep=(tmp_path / "made",))
    left = list(tmp_path.rglob("*.tmp"))
    assert len(left) == len(folders)
    assert all(f"~{os.getppid()}~" in path.name for path in left)


def test_no_slides_is_an_empty_run(run):
    report = run({})
    assert (report.total, report.exit_code) == (0, 0)


@pytest.mark.parametrize(
    ("slide_ids", "part"), [(["a", "A"], "same file name"), (["a/b"], "'/'"), (["a", "a"], "same")]
)
def test_ids_that_are_no_file_names_are_refused(tmp_path, listener, slide_ids, part):
    with pytest.raises(ConfigError, match=part):
        run_cohort(
            [Job(slide_id=slide_id) for slide_id in slide_ids],
            planted.behave,
            stage="p",
            status_dir=tmp_path,
            options=RunOptions(),
            report=listener,
        )


# --- several processes ----------------------------------------------------------------------

COMPETITOR = """
import sys
from functools import partial
from pathlib import Path
import planted
from bagscope.cohort.progress import SilentReporter
from bagscope.cohort.runner import Job, RunOptions, run_cohort
study = Path(sys.argv[1])
jobs = [Job(slide_id=f"s{i}") for i in range(int(sys.argv[2]))]
report = run_cohort(jobs, partial(planted.make_file_slowly, folder=study), stage="plant",
                    status_dir=study / "status", options=RunOptions(workers=1),
                    report=SilentReporter())
print(report.counts["done"])
sys.exit(report.exit_code)
"""


def test_processes_that_share_a_study_divide_it_and_all_end_with_everything_made(
    tmp_path, script_environment
):
    count = 24
    command = [sys.executable, "-c", COMPETITOR, str(tmp_path), str(count)]
    rivals = [
        subprocess.Popen(command, env=script_environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    made = []
    for rival in rivals:
        out, _ = rival.communicate(timeout=60)
        assert rival.returncode == 0
        made.append(int(out))
    assert sum(made) == count
    log = (tmp_path / "made.log").read_text().split()
    assert sorted(log) == sorted(f"s{i}" for i in range(count)), "a slide was made twice"
    assert sum(n > 0 for n in made) >= 2, "one process did everything"
    assert leftovers(tmp_path) == []


def test_slides_of_another_process_are_reported_or_waited_for(run, tmp_path, listener):
    folder = tmp_path / "status" / "plant"
    folder.mkdir(parents=True)
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        _claim_for(folder / "theirs.claim", sleeper.pid)
        report = run({"mine": "ok", "theirs": "ok"}, wait_for_others=False)
        assert (report.counts["done"], report.elsewhere, report.remaining) == (1, 1, 0)
        assert (folder / "theirs.claim").exists()
    finally:
        sleeper.kill()
        sleeper.wait()
    report = run({"mine": "ok", "theirs": "ok"})
    assert report.counts["done"] == 2
    assert leftovers(tmp_path) == []


def test_a_failure_of_another_process_is_not_repeated(run, tmp_path, listener):
    """Its claim goes away while we wait, and leaves a status that says failed."""
    folder = tmp_path / "status" / "plant"
    folder.mkdir(parents=True)
    code = (
        "import sys, time, pathlib; sys.stdin.read(); "
        "p = pathlib.Path(sys.argv[1]); (p / 'theirs.json').write_text(sys.argv[2]); "
        "(p / 'theirs.claim').unlink()"
    )
    status = {
        "slide_id": "theirs",
        "stage": "plant",
        "outcome": "failed",
        "seconds": 9.0,
        "host": "there",
        "error_class": "ReadError",
        "message": "theirs: truncated",
    }
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), json.dumps(status)], stdin=subprocess.PIPE
    )
    _claim_for(folder / "theirs.claim", other.pid)

    class LetGo(type(listener)):
        def emit(self, event):
            super().emit(event)
            if isinstance(event, RunWaiting):
                other.stdin.close()

    options = RunOptions(workers=1)
    report = run_cohort(
        [Job(slide_id="theirs", payload="ok")],
        planted.behave,
        stage="plant",
        status_dir=tmp_path / "status",
        options=options,
        report=LetGo(),
    )
    other.wait()
    assert [f.error_class for f in report.failures] == ["ReadError"]


def _claim_for(path: Path, pid: int) -> None:
    from bagscope.cohort.process import _start_time, this_process

    record = {**this_process().as_json(), "pid": pid, "started": _start_time(pid)}
    path.write_text(json.dumps({**record, "stage": "plant", "token": "ab" * 8}))


# --- stopping -------------------------------------------------------------------------------

LONG_RUN = """
import sys
from functools import partial
from pathlib import Path
import planted
from bagscope.cohort.progress import SlideFinished
from bagscope.cohort.runner import Job, RunOptions, run_cohort
study = Path(sys.argv[1])
class Tell:
    def emit(self, event):
        if isinstance(event, SlideFinished):
            print(event.slide_id, flush=True)
jobs = [Job(slide_id=f"s{i:02}", payload="ok" if i < 3 else action)
        for i, action in enumerate([("write-forever", str(study))] * 12)]
report = run_cohort(jobs, planted.behave, stage="plant", status_dir=study / "status",
                    options=RunOptions(workers=2, sweep=(study,)), report=Tell())
print("interrupted", report.interrupted, report.remaining, flush=True)
sys.exit(report.exit_code)
"""


def start_long_run(study: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_RUN, str(study)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(3):
        assert process.stdout.readline()
    deadline = time.monotonic() + 10
    while len(list(study.glob(".*.tmp"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def still_running(processes: list[psutil.Process], patience_s: float = 2) -> list[psutil.Process]:
    """Wait for processes to end; those that only wait to be reaped have ended."""
    deadline = time.monotonic() + patience_s
    running = processes
    while running and time.monotonic() < deadline:
        running = [p for p in processes if artifacts.is_alive(p.pid)]
        time.sleep(0.01)
    return running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whole_group", [True, False])
def test_a_signal_stops_the_run_within_two_seconds_and_leaves_nothing(
    tmp_path, script_environment, number, whole_group
):
    process = start_long_run(tmp_path, script_environment)
    workers = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    (os.killpg if whole_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - began < 2
    assert process.returncode == 130
    assert out.split() == ["interrupted", "True", "9"]
    assert err == ""
    assert leftovers(tmp_path) == []
    assert sorted(read_statuses(tmp_path / "status", "plant")) == ["s00", "s01", "s02"]
    assert still_running(workers) == []


def test_workers_of_a_killed_run_end_and_its_claims_are_taken_over(
    run, tmp_path, script_environment
):
    process = start_long_run(tmp_path, script_environment)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 3
    process.kill()
    process.wait()
    process.stdout.close()
    process.stderr.close()
    assert still_running(workers) == []
    assert len([n for n in leftovers(tmp_path) if n.endswith(".claim")]) == 2
    report = run({f"s{i:02}": "ok" for i in range(12)}, sweep=(tmp_path,))
    assert report.counts["done"] == 12
    assert leftovers(tmp_path) == []


# --- nowhere to write -----------------------------------------------------------------------


def test_a_file_where_the_status_folder_should_be_is_one_sentence(run, tmp_path):
    (tmp_path / "status").write_text("")
    with pytest.raises(ArtifactError, match="status folder could not be made") as caught:
        run({"a": "ok"})
    assert "\n" not in str(caught.value)


def test_a_read_only_study_is_one_sentence(tmp_path, script_environment):
    study = tmp_path / "study"
    (study / "status" / "plant").mkdir(parents=True)
    code = (
        "import os, sys\n"
        "sys.path[:0] = os.environ['PYTHONPATH'].split(os.pathsep)\n"
        "import planted\n"
        "from pathlib import Path\n"
        "from bagscope.cohort.executors import local\n"
        "from bagscope.cohort.progress import SilentReporter\n"
        "from bagscope.cohort.runner import Job, RunOptions, run_cohort\n"
        "from bagscope.errors import ArtifactError\n"
        "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    run_cohort([Job(slide_id='a', payload='ok')], planted.behave, stage='plant',\n"
        f"        status_dir=Path({str(study / 'status')!r}), options=RunOptions(),\n"
        "        report=SilentReporter())\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    (study / "status" / "plant").chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=script_environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Permission denied" in done.stdout, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert "check the folder's permissions" in done.stdout


def test_a_full_disk_while_status_is_written_ends_the_run_in_one_sentence(
    run, tmp_path, monkeypatch
):
    def full(path, value):
        with artifacts.atomic_file(path) as temporary:
            temporary.write_bytes(b"{")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifacts, "write_json", full)
    with pytest.raises(ArtifactError, match=r"No space left on device.*free some space"):
        run({f"s{i}": "ok" for i in range(5)})
    assert leftovers(tmp_path) == []
    assert list((tmp_path / "status" / "plant").iterdir()) == []


def test_a_stage_on_a_full_file_system_fails_its_slides_and_leaves_nothing(run, tmp_path):
    """The artefact grows beyond a file-size limit: a real write error, inside the worker."""
    report = run(
        {"large": 50_000, "small": 10},
        work=partial(planted.write_limited, folder=tmp_path / "out"),
        sweep=(tmp_path / "out",),
    )
    assert [f.slide_id for f in report.failures] == ["large"]
    assert "File too large" in report.failures[0].message
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["small.bin"]


# --- lightness ------------------------------------------------------------------------------


def test_the_process_that_runs_a_cohort_imports_nothing_heavy(script_environment):
    code = (
        "import sys, bagscope.cohort.runner, bagscope.cohort.table, "
        "bagscope.cohort.executors.local, bagscope.cohort.slurm\n"
        "heavy = {'numpy', 'pandas', 'torch', 'scipy', 'cv2', 'pyarrow', 'openpyxl', 'distributed'}"
        "\nprint(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=script_environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_options_are_checked():
    for wrong in ({"workers": 0}, {"timeout_s": 0}, {"retries": -1}, {"shard": (0, 3)}):
        with pytest.raises(ConfigError):
            RunOptions(**wrong)


def test_limits_of_this_process_are_untouched(run):
    """A ceiling by RLIMIT_AS would show here and in children; ours is by watching."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    run({"a": "ok"}, memory_limit_mib=500)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert pickle.loads(pickle.dumps(runner.Job(slide_id="a"))) == runner.Job(slide_id="a")
