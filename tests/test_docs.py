"""The docs hold: links lead somewhere, verbs and options exist, files and functions are as stated.

That commands and examples run is held by `test_docs_run.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from typer.main import get_command

from bagscope.cli.app import app
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.history import Epoch, metrics_csv
from bagscope.pipeline.compare import CompareRequest, compare_runs
from bagscope.pipeline.evaluate import EvaluateRequest, evaluate_run
from bagscope.wsi.tile_file import read_tile_file
from tests.cli.conftest import Ran, bagscope, slides, slides_once
from tests.docs_pages import PAGES, ROOT, commands_of
from tests.pipeline.made_runs import Says, made_cohort, made_run

__all__ = ["bagscope", "slides", "slides_once"]

COMMAND: Any = get_command(app)
VERBS = set(COMMAND.commands)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_verbs_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"`make ([a-z-]+)`", text):
        assert re.search(rf"^{verb}:", makefile, re.MULTILINE), f"make {verb}"
    for _, verb, *_ in [
        *commands_of(page),
        *map(shlex.split, re.findall(r"`(bagscope [a-z].*?)`", text)),
    ]:
        assert verb in VERBS, f"bagscope {verb}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_options_that_pages_name_exist(page: Path) -> None:
    quoted = re.findall(r"`bagscope ([a-z][^`…]*)`", page.read_text(encoding="utf-8"))
    commands = [arguments for _, *arguments in commands_of(page)]
    for arguments in [*commands, *(shlex.split(text) for text in quoted)]:
        known = options_of(arguments)
        named = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert named <= known, arguments


def options_of(arguments: list[str]) -> set[str]:
    """Return the options of the verb that a command names."""
    command = COMMAND
    for word in arguments:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
    return {"--help"}.union(*([*p.opts, *p.secondary_opts] for p in command.params))


def test_api_states_what_the_code_says() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)\((.*)\)` \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 60
    for name, arguments, sentence in rows:
        found = named(f"bagscope.{name}")
        assert f"{name}({arguments})" == f"{name}({arguments_of(found)})"
        assert sentence == (inspect.getdoc(found) or "").splitlines()[0], name


def named(path: str) -> Any:
    """Return what a dotted name leads to: a function, or one of a class."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            found: Any = importlib.import_module(".".join(parts[:length]))
            for part in parts[length:]:
                found = getattr(found, part)
            return found
    raise AssertionError(path)


def arguments_of(function: Any) -> str:
    """Return the arguments that have no default, and "…" for the others."""
    given = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    words = []
    for one in given:
        if one.kind is one.VAR_POSITIONAL:
            words.append(f"*{one.name}")
        elif one.default is one.empty and one.kind is not one.VAR_KEYWORD:
            if one.kind is one.KEYWORD_ONLY and "*" not in words:
                words.append("*")
            words.append(one.name)
    wanted = sum(not word.startswith("*") for word in words)
    stars = sum(one.kind is one.VAR_POSITIONAL for one in given)
    return ", ".join([*words, *(["…"] if len(given) > wanted + stars else [])])


def test_formats_lists_every_dataset_and_attribute(
    bagscope: Callable[..., Ran], slides: Path, tmp_path: Path
) -> None:
    study = tmp_path / "study"
    bagscope("tile", study, "--slides", slides, "--mpp", 1, "--coarser-mpp", 2)
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    path = study / "tilings/1.00mpp_256px/a.h5"
    with h5py.File(path) as file:
        names = {*file, *file.attrs, *file["coords"].attrs}
    assert {name for name in names if f"`{name}`" not in page} == set()
    assert len(read_tile_file(path)) > 0


def test_formats_lists_what_evaluation_writes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    bags = [random.normal(size=(3, 2)) for _ in range(30)]
    labels = {"label": ["no", "yes"] * 15, "site": ["x", "y", "z"] * 10}
    study = made_cohort(tmp_path, bags, labels)
    target = TargetSpec(column="label", classes=("no", "yes"))
    runs = tuple(made_run(*study, target, says, name=name) for name, says in SAYS.items())
    features = str(study[1])
    evaluate_run(EvaluateRequest(run=runs[0], by=("site",), features=features, resamples=100))
    compare_runs(CompareRequest(runs=runs, out=tmp_path / "compared", resamples=100))
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    for path in (*runs[0].glob("*.json"), tmp_path / "compared/comparison.json"):
        keys = keys_of(json.loads(path.read_text(encoding="utf-8")))
        assert {key for key in keys if f"`{key}`" not in page} == set(), path.name
    for path in (runs[0] / "baselines.csv", study[0] / "splits/default.csv"):
        head = path.read_text(encoding="utf-8").splitlines()[0].split(",")
        head = [re.sub(r"^r\d_f\d$", "r<repeat>_f<fold>", name) for name in head]
        assert {name for name in head if f"`{name}`" not in page} == set(), path.name


def test_formats_lists_what_an_epoch_tells() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    losses = {"total": 1.0, "<term>": 1.0}
    facts = dict.fromkeys(("validation_loss", "metric", "lr", "seconds", "waited_s"), 0.0)
    head = metrics_csv([Epoch(number=1, losses=losses, tiles=1, **facts)]).splitlines()[0]
    assert {name for name in head.split(",") if f"`{name}`" not in page} == set()


SAYS: dict[str, Says] = {
    "one": lambda case, _: (0.3, 0.7) if int(case.patient_id[1:]) % 3 else (0.6, 0.4),
    "other": lambda case, _: (0.5, 0.5),
}
# Below these the keys are names: of targets, metrics, folds, columns, slides, packages.
NAMED = {
    "targets", "metrics", "pooled", "mean_over_folds", "folds", "values", "undefined", "seeds",
    "baselines", "baselines_skipped", "skipped", "subgroups", "patients", "patients_with",
    "members", "temperatures", "uncalibrated", "thresholds", "left_out", "versions", "models",
    "first_lines",
}  # fmt: skip


def keys_of(value: Any, above: str = "") -> set[str]:
    """Return the keys of nested JSON that are no names of the study's own, nor of fingerprints."""
    if isinstance(value, list):
        return set().union(*(keys_of(one) for one in value))
    if not isinstance(value, dict) or above == "fields":
        return set()
    own = set() if above in NAMED else set(value)
    return own.union(*(keys_of(one, "" if above in NAMED else key) for key, one in value.items()))
