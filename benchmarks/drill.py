"""Kill a cohort run at random moments, resume it, compare with a run that nobody disturbed.

    python benchmarks/drill.py --kills 200

Each kill is a SIGKILL to the whole process group, at a moment drawn evenly from the length of an
undisturbed run. A study is killed one to three times, then resumed to its end. After every kill, a
file under its final name must be the undisturbed run's, byte for byte; after the resumed run all of
them must be, and no claim and no temporary may be left. Status files tell times and who did what,
so of them the outcome, fingerprint, content hash and facts are compared.

The command is `bagscope tile` on a small synthetic cohort, with `--stage extract` the extraction
of two encoders in one pass, tiles first, and with `--stage train` the training of three folds on
synthetic features; `--command` takes any other, in which {study} stands for the study folder and
{slides} for the folder of slides with its cohort.csv. Of metrics.csv, the columns that tell seconds
are not compared; until a member is finished, its metrics.csv and state.pt are its own.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import io
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
    "train": "{python} -m bagscope train {study} --features {slides}/features --target label "
    "--recipe {slides}/recipe.yaml --workers 2",
}
SLIDES = 16
SLIDE_PX = 1536
BAGS = 60
TILES = 200
RECIPE = """aggregator: {name: abmil, options: {hidden: 32, attention: 16}}
bags: {bags_per_step: 4, sample_tiles: 100}
training: {epochs: 25, patience: null, ema_decay: 0.9}
"""
RESULTS = {"tile": "drill.md", "extract": "drill_extract.md", "train": "drill_train.md"}
STATUS_FIELDS = ("fingerprint", "content_hash", "facts", "error_class")
UNFINISHED = ("metrics.csv", "state.pt")
TIMED_COLUMNS = ("seconds", "waited_s")


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
        make = make_bags if arguments.stage == "train" else make_slides
        slides = make(folder / "slides", arguments.seed)
        findings, length_s, files = drill(folder, slides, arguments)
    text = as_markdown(findings, length_s, files, arguments)
    print(text)
    arguments.result.write_text(text, encoding="utf-8")
    return int(bool(findings.faults))


def make_slides(folder: Path, seed: int) -> Path:
    from bagscope.wsi.synthetic import write_cohort

    write_cohort(folder, slides=SLIDES, positives=3, size_px=SLIDE_PX, seed=seed, workers=1)
    return folder


def make_bags(folder: Path, seed: int) -> Path:
    """Write features of bags of which every second one holds a sign, and a study of them."""
    import numpy as np

    generator = np.random.default_rng(seed)
    bags = generator.normal(size=(BAGS, TILES, 16)).astype(np.float32)
    labels = np.arange(BAGS) % 2
    bags[labels == 1, 0, 0] += 6
    folder.mkdir(parents=True)
    np.savez(
        folder / "bags.npz",
        x=bags.reshape(-1, 16),
        bag=np.repeat(np.arange(BAGS, dtype=np.int32), TILES),
        y=labels,
    )
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    for arguments in (
        ["convert", folder / "bags.npz", folder / "features"],
        ["init", folder / "study", "--slides", folder / "features" / "cohort.csv"],
    ):
        subprocess.run(
            [sys.executable, "-m", "bagscope", *map(str, arguments)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    (folder / "study" / "study.yaml").write_text("splits: {folds: 3}\n", encoding="utf-8")
    return folder


def begin_study(study: Path, slides: Path) -> None:
    """Make the folder that a study goes into, or the study itself where the stage needs one."""
    study.parent.mkdir(parents=True, exist_ok=True)
    if (slides / "study").exists() and not study.exists():
        shutil.copytree(slides / "study", study)


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
    begin_study(study, slides)
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
    begin_study(study, slides)
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
    ending = "member.json" if any(n.endswith("member.json") for n in expected) else ".h5"
    made = [n for n in found if n.endswith(ending)]
    all_made = sum(name.endswith(ending) for name in expected)
    findings.met["with some artefacts made and some not"] += 0 < len(made) < all_made
    for name in found.keys() - set(temporaries) - set(claims):
        # The closing sheet lists all slides and is made again whenever that changes; a member's
        # history grows until there is a member.
        is_unfinished = name.endswith("contact_sheet.html") or name.endswith(UNFINISHED)
        inside = any(part.endswith(".tmp") for part in Path(name).parts)
        if not inside and not is_unfinished and found[name] != expected.get(name):
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
    if path.name == "metrics.csv":
        rows = csv.DictReader(io.StringIO(content.decode()))
        kept_rows = [{k: v for k, v in row.items() if k not in TIMED_COLUMNS} for row in rows]
        content = json.dumps(kept_rows).encode()
    is_status = path.relative_to(study).parts[0] == "status" and path.suffix == ".json"
    if is_status and not path.name.startswith("."):
        record = json.loads(content)
        kept = {name: record[name] for name in STATUS_FIELDS}
        if path.relative_to(study).parts[1] == "train":
            kept.pop("facts")  # among them a share of seconds; of a member found done there is none
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
    material = f"{SLIDES} synthetic slides of {SLIDE_PX} × {SLIDE_PX} px"
    if arguments.stage == "train":
        material = f"{BAGS} bags of {TILES} tiles"
    lines = [
        "# Kill drill",
        "",
        f"`python benchmarks/drill.py --stage {arguments.stage} --kills {arguments.kills} "
        f"--seed {arguments.seed}`, {date}, commit {recording.commit()}, {recording.device()}.",
        "",
        f"Command: `{shown}` on {material}; an undisturbed run takes {length_s:.1f} s "
        f"and leaves {files} files.",
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
