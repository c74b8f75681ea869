"""Damage a study's artefacts at random, one bit or one end at a time: `verify` must find each.

    python benchmarks/drill_verify.py --damages 200 [--record]

Tile files, feature files and the files of a model folder are damaged in turn, half of them by a
flipped bit and half by a cut at a random place. After each, the whole study is verified: any fault
must be in what was damaged, and there must be one. Before and after, the study must be sound.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import recording
from safetensors.numpy import save_file

from bagscope.artifacts import atomic_folder, write_json
from bagscope.features.feature_file import FeatureHeader, write_feature_file
from bagscope.pipeline.verify import verify_study
from bagscope.wsi.tile_file import read_tile_file

SLIDES = 4
DIMENSION = 384
TILING = "0.50mpp_256px"
RESULT = Path(__file__).with_name("drill_verify.md")


@dataclass
class Findings:
    """What was done, what was found, and how long verifying took."""

    done: Counter[str] = field(default_factory=Counter)
    found: int = 0
    missed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write drill_verify.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        study = make_study(Path(name), arguments.seed)
        findings = drill(study, arguments.damages, random.Random(arguments.seed))
    text = as_markdown(findings, arguments)
    print(text)
    if arguments.record:
        RESULT.write_text(text, encoding="utf-8")
    return int(bool(findings.missed))


def make_study(folder: Path, seed: int) -> Path:
    """Return a study of tiled slides with random features and a model of random weights."""
    from bagscope.pipeline.study import init_study
    from bagscope.pipeline.tile import tile_cohort
    from bagscope.wsi.synthetic import write_cohort

    write_cohort(folder / "slides", slides=SLIDES, positives=1, size_px=1536, seed=seed, workers=1)
    study, _ = init_study(folder / "study", str(folder / "slides" / "cohort.csv"))
    tile_cohort(study, Quiet())
    chance = np.random.default_rng(seed)
    for path in sorted(study.tiling_folder(TILING).glob("*.h5")):
        tiles = read_tile_file(path)
        header = FeatureHeader(
            slide_id=tiles.slide_id,
            fields={"stage": "extract", "tiles": tiles.attributes["fingerprint"]},
            encoder={"name": "random"},
            weights_sha256="unknown",
            coords_l0=tiles.coords_l0,
            grid=tiles.grid,
            tile=tiles.attributes,
        )
        vectors = chance.normal(size=(len(tiles), DIMENSION)).astype(np.float16)
        write_feature_file(
            study.folder / "features" / TILING / "random" / path.name, header, vectors
        )
    with atomic_folder(study.folder / "runs/first/model.bagscope", {"stage": "train"}) as model:
        save_file({"weight": chance.normal(size=(64, 64))}, model / "model.safetensors")
        write_json(model / "config.json", {"classes": ["no", "yes"]})
    return study.folder


class Quiet:
    """Listens to the run and says nothing."""

    def emit(self, event: object) -> None:
        """Do nothing."""


def drill(study: Path, damages: int, chance: random.Random) -> Findings:
    require_sound(study)
    model = study / "runs/first/model.bagscope"
    kinds = {
        "tile file": sorted((study / "tilings").rglob("*.h5")),
        "feature file": sorted((study / "features").rglob("*.h5")),
        "file of a model": sorted(model.iterdir()),
    }
    findings = Findings()
    for index in range(damages):
        kind = list(kinds)[index % len(kinds)]
        path = chance.choice(kinds[kind])
        whole = path.read_bytes()
        what, content = flip(whole, chance) if index % 2 else cut(whole, chance)
        path.write_bytes(content)
        began_s = time.perf_counter()
        faults = verify_study(study).faults
        findings.seconds.append(time.perf_counter() - began_s)
        path.write_bytes(whole)
        artefact = model if kind == "file of a model" else path
        places = {fault.path for fault in faults}
        findings.done[f"{kind}, {what.split()[0]}"] += 1
        if places and all(artefact in (place, *place.parents) for place in places):
            findings.found += 1
        else:
            listed = json.dumps([str(place.relative_to(study)) for place in places])
            findings.missed.append(f"{path.relative_to(study)}: {what}; faults in {listed}")
    require_sound(study)
    return findings


def flip(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    bit = chance.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return f"flipped bit {bit} of {8 * len(content)}", bytes(changed)


def cut(content: bytes, chance: random.Random) -> tuple[str, bytes]:
    # As often as not close to the end, where the least is missing.
    lost = chance.choice((chance.randint(1, 16), chance.randint(1, len(content))))
    kept = max(0, len(content) - lost)
    return f"cut to {kept} of {len(content)} bytes", content[:kept]


def require_sound(study: Path) -> None:
    if faults := verify_study(study).faults:
        raise SystemExit(f"faults in a study that nobody damaged: {faults}")


def as_markdown(findings: Findings, arguments: argparse.Namespace) -> str:
    """Return the findings as a page that names no machine and no folder."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    lines = [
        "# Damage drill",
        "",
        f"`python benchmarks/drill_verify.py --damages {arguments.damages} --seed {arguments.seed} "
        f"--record`, {date}, commit {recording.commit()}, {recording.device()}.",
        "",
        f"Verifying the study of {SLIDES} slides took {statistics.median(findings.seconds):.2f} s "
        f"in the median, {max(findings.seconds):.1f} s at most (a damaged HDF5 file is looked into "
        "by a process of its own, which is stopped where HDF5 does not come to an end).",
        "",
        "| damage | count |",
        "|---|---:|",
        *(f"| {what} | {count} |" for what, count in sorted(findings.done.items())),
        f"| **found**, and laid to the damaged artefact alone | **{findings.found}** |",
        f"| **missed** | **{len(findings.missed)}** |",
        "",
        *(f"- {missed}" for missed in findings.missed[:20]),
    ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
