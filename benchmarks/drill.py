"""Kill a cohort run at random moments, resume it, compare with a run that nobody disturbed.

    python benchmarks/drill.py --kills 200

Each kill is a SIGKILL to the whole process group, at a moment drawn evenly from the length of an
undisturbed run. A study is killed one to three times, then resumed to its end. After every kill, a
file under its final name must be the undisturbed run's, byte for byte; after the resumed run all of
them must be, and no claim and no temporary may be left. Status files tell times and who did what,
so of them the outcome, fingerprint, content hash and facts are compared.

The command is `bagscope tile` on a small synthetic cohort, or with `--stage extract` the extraction
of two encoders in one pass, tiles first; `--command` takes any other, in which {study} stands for
the study folder and {slides} for the folder of slides with its cohort.csv.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import recording

_COMMON = "{study} --slides {slides}/cohort.csv --mpp 0.5 --workers 2"
COMMANDS = {
    "tile": f"{{python}} -m bagscope tile {_COMMON}",
    "extract": f"{{python}} -m bagscope extract {_COMMON} --device cpu --compile off "
    "--encoder color-texture,efficientnet-lite0",
}
SLIDES = 16
SLIDE_PX = 1536
RESULTS = {"tile": "drill.md", "extract": "drill_extract.md"}
STATUS_FIELDS = ("fingerprint", "content_hash", "facts", "error_class")


@dataclass
class Findings:
    """What the kills met, and what was wrong afterwards."""

    kills: int = 0
    came_too_late: int = 0
    resumes: int = 0
    met: Counter[str] = field(default_factory=Counter)
    moments: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=COMMANDS, default="tile")
    parser.add_argument("--command", help="instead of the stage's own")
    parser.add_argument("--result", type=Path, help="where the findings go")
    arguments = parser.parse_args()
    arguments.command = arguments.command or COMMANDS[arguments.stage]
    arguments.result = arguments.result or Path(__file__).with_name(RESULTS[arguments.stage])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = make_slides(folder / "slides", arguments.seed)
        findings, length_s, files = drill(folder, slides, arguments)
    text = as_markdown(findings, length_s, files, arguments)
    print(text)
    arguments.result.write_text(text, encoding="utf-8")
    return int(bool(findings.faults))


def make_slides(folder: Path, seed: int) -> Path:
    from bagscope.wsi.synthetic import write_cohort

    write_cohort(folder, slides=SLIDES, positives=3, size_px=SLIDE_PX, seed=seed, workers=1)
    return folder


def drill(folder: Path, slides: Path, arguments: argparse.Namespace) -> tuple[Findings, float, int]:
    """Return what was found, the length of an undisturbed run in seconds, and its files."""
    chance = random.Random(arguments.seed)
    expected, lengths_s = {}, []
    for i in range(3):  # the first one also warms the disk's cache
        study = folder / f"undisturbed{i}" / "study"
        began_s = time.perf_counter()
        require_success(study, slides, arguments)
        lengths_s.append(time.perf_counter() - began_s)
        found = contents(study)
        if expected and found != expected:
            raise SystemExit(f"two undisturbed runs differ: {differences(expected, found)}")
        expected = found
    length_s = statistics.median(lengths_s)
    findings = Findings()
    while findings.kills < arguments.kills:
        study = folder / "disturbed" / "study"
        shutil.rmtree(study.parent, ignore_errors=True)
        for _ in range(min(chance.randint(1, 3), arguments.kills - findings.kills)):
            moment_s = chance.random() * length_s
            if kill_at(moment_s, study, slides, arguments):
                findings.kills += 1
                findings.moments.append(moment_s / length_s)
            else:
                findings.came_too_late += 1
            look_at_the_dead(study, expected, findings)
        require_success(study, slides, arguments)
        findings.resumes += 1
        for fault in differences(expected, contents(study)):
            findings.faults.append(f"after resume {findings.resumes}: {fault}")
        if findings.resumes % 10 == 0:
            print(f"{findings.kills} kills, {len(findings.faults)} faults", flush=True)
    return findings, length_s, len(expected)


def command_of(study: Path, slides: Path, arguments: argparse.Namespace) -> list[str]:
    return [
        part.format(study=study, slides=slides, python=sys.executable)
        for part in shlex.split(arguments.command)
    ]


def require_success(study: Path, slides: Path, arguments: argparse.Namespace) -> None:
    study.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command_of(study, slides, arguments),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        start_new_session=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")


def kill_at(moment_s: float, study: Path, slides: Path, arguments: argparse.Namespace) -> bool:
    """Start the command and kill its process group; return whether it was still running."""
    study.parent.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        command_of(study, slides, arguments),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(timeout=moment_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    return False


def look_at_the_dead(study: Path, expected: dict[str, str], findings: Findings) -> None:
    """Note what the kill left behind; whatever looks done must be what it should be."""
    found = contents(study)
    temporaries = [name for name in found if name.endswith(".tmp")]
    claims = [name for name in found if name.endswith(".claim")]
    findings.met["with a claim held"] += bool(claims)
    findings.met["with a file half written, or not yet renamed"] += bool(temporaries)
    made = [n for n in found if n.endswith(".h5")]
    all_made = sum(name.endswith(".h5") for name in expected)
    findings.met["with some slides made and some not"] += 0 < len(made) < all_made
    for name in found.keys() - set(temporaries) - set(claims):
        # The closing sheet lists all slides and is made again whenever that changes.
        is_tilings_sheet = name.endswith("contact_sheet.html")
        inside = any(part.endswith(".tmp") for part in Path(name).parts)
        if not inside and not is_tilings_sheet and found[name] != expected.get(name):
            findings.faults.append(f"after kill {findings.kills}: {name} looks done and is not")


def contents(study: Path) -> dict[str, str]:
    """Return the hash of each file of the study by its relative path."""
    return {
        path.relative_to(study).as_posix(): hash_of(path, study)
        for path in sorted(study.rglob("*"))
        if path.is_file()
    }


def hash_of(path: Path, study: Path) -> str:
    content = path.read_bytes()
    is_status = path.relative_to(study).parts[0] == "status" and path.suffix == ".json"
    if is_status and not path.name.startswith("."):
        record = json.loads(content)
        kept = {name: record[name] for name in STATUS_FIELDS}
        kept["good"] = record["outcome"] in ("done", "skipped")
        content = json.dumps(kept, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    faults = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    faults += [f"{name} is left over" for name in sorted(found.keys() - expected.keys())]
    both = sorted(expected.keys() & found.keys())
    return faults + [f"{name} differs" for name in both if expected[name] != found[name]]


def as_markdown(
    findings: Findings, length_s: float, files: int, arguments: argparse.Namespace
) -> str:
    """Return the findings as a page that names no machine and no folder."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    shown = arguments.command.replace("{python}", "python")
    early, late = min(findings.moments, default=0), max(findings.moments, default=0)
    lines = [
        "# Kill drill",
        "",
        f"`python benchmarks/drill.py --stage {arguments.stage} --kills {arguments.kills} "
        f"--seed {arguments.seed}`, {date}, commit {recording.commit()}, {recording.device()}.",
        "",
        f"Command: `{shown}` on {SLIDES} synthetic slides of {SLIDE_PX} × {SLIDE_PX} px; an "
        f"undisturbed run takes {length_s:.1f} s and leaves {files} files.",
        "",
        "| | |",
        "|---|---:|",
        f"| runs killed (SIGKILL to the whole process group) | {findings.kills} |",
        f"| moments, as part of an undisturbed run | {early:.2f} to {late:.2f} |",
        *(f"| {what} | {count} |" for what, count in findings.met.items()),
        f"| runs that ended before their kill | {findings.came_too_late} |",
        f"| runs resumed to the end and compared | {findings.resumes} |",
        "| **faults** (a file that differs, is missing or left over) | "
        f"**{len(findings.faults)}** |",
        "",
        *(f"- {fault}" for fault in findings.faults[:20]),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
