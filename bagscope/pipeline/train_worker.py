"""What a worker does for a member: trains it on what it is given, or predicts its test fold."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bagscope import artifacts
from bagscope.arithmetic import compute_on
from bagscope.artifacts import Json
from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import StageResult
from bagscope.errors import ArtifactError
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import Case, slides_of
from bagscope.mil.member import FACTS_NAME, WEIGHTS_NAME, load_member, read_facts, save_member
from bagscope.mil.ood import reference_of
from bagscope.mil.prediction_table import predictions_csv
from bagscope.mil.sources import CaseBag, Rows, StoreSource
from bagscope.mil.training.finishing import finish
from bagscope.mil.training.history import Epoch
from bagscope.mil.training.monitoring import METRICS
from bagscope.mil.training.state import PREPARATION_NAME, STATE_NAME
from bagscope.mil.training.trainer import Trained, Trainer
from bagscope.pipeline.train import NUMERICS, PREDICTIONS_NAME

if TYPE_CHECKING:
    from bagscope.pipeline.train import MemberTask, TestTask

TESTED_NAME = "tested.json"
"""Beside a member's test predictions: what they were made of, and their hash."""
_SIGN_OF_LIFE_S = 10.0
# Bags are read in a thread of their own, and a channel takes one message at a time.
_CHANNEL = threading.Lock()


def train_task(name: str, task: MemberTask) -> StageResult:
    """Train a member, or find it trained; goes on where a killed training stopped.

    Raises:
        FingerprintMismatch: it was trained with other options or data.
    """
    compute_on(task.threads)
    store = store_of(task.location, (*task.train, *task.inner))
    train = _ToldSource(store, task.train)
    inner: StoreSource | None = _ToldSource(store, task.inner) if task.inner else None
    fields = member_fields(task, fingerprints_in(store))
    fingerprint = artifacts.fingerprint(fields)
    made = None if task.overwrite else read_facts(task.folder)
    if made is not None:
        artifacts.require_same(
            made["fields"],
            fields,
            what=str(task.folder),
            remedy="choose another --name, or train anew with --overwrite",
        )
        load_member(task.folder)  # refuses what is damaged
        _forget_state(task.folder)  # killed just before it could
        return StageResult(
            outcome="skipped", fingerprint=fingerprint, content_hash=made["weights_sha256"]
        )
    if task.overwrite:
        _forget(task.folder, fingerprint)
    began_s, told = time.monotonic(), 0

    def tell(epoch: Epoch) -> None:
        nonlocal told
        _tell(task, epoch, began_s, trainer.history[told:])
        told = len(trainer.history)

    trainer = Trainer(
        task.recipe,
        task.targets,
        train,
        inner,
        seed=task.seed,
        device=task.device,
        folder=task.folder,
        fingerprint=fingerprint,
        stop_after=task.stop_after,
        plateau=task.plateau,
        on_epoch=tell,
        on_preparing=lambda epoch: _tell(task, epoch, began_s, [], before="before it: "),
    )
    trained = trainer.run()
    if task.out_of_fold:
        trained, inner = _with_out_of_fold(trained, task)
    member = finish(trained, task.recipe, inner, seed=task.seed, fields=fields)
    usual = reference_of(train, trained.statistics)
    digest = save_member(dataclasses.replace(member, ood=usual), task.folder)
    artifacts.step("member-written")
    _forget_state(task.folder)
    last = trained.history[trained.epoch - 1]
    return StageResult(
        outcome="done",
        fingerprint=fingerprint,
        content_hash=digest,
        facts={
            "tiles": sum(epoch.tiles for epoch in trained.history),
            "epochs": len(trained.history),
            "epoch": trained.epoch,
            "validation_loss": _number(last.validation_loss),
            "metric": _number(last.metric),
            "waited": sum(e.waited_s for e in trained.history)
            / max(1e-9, sum(e.seconds for e in trained.history)),
        },
    )


def test_task(name: str, task: TestTask) -> StageResult:
    """Predict the test fold of a finished member, or find it predicted."""
    compute_on(task.threads)
    store = store_of(task.location, task.cases)
    source = _ToldSource(store, task.cases)
    path = task.folder / PREDICTIONS_NAME
    fields = tested_fields(task, fingerprints_in(store))
    is_made = _is_tested(task.folder, fields)
    if not is_made:
        member = load_member(task.folder)
        found = member.infer(source, task.device)
        text = predictions_csv(
            member, task.cases, found.logits, repeat=task.repeat, fold=task.fold, seed=task.seed
        )
        artifacts.write_text(path, text)
        artifacts.step("fold-predicted")
        made = {"fields": fields, "predictions_sha256": artifacts.sha256_of_file(path)}
        artifacts.write_json(task.folder / TESTED_NAME, made)
    return StageResult(
        outcome="skipped" if is_made else "done",
        fingerprint=artifacts.fingerprint(fields),
        facts={"tiles": int(source.lengths.sum()), "cases": len(task.cases)},
    )


def tested_fields(task: TestTask, fingerprint_of: Callable[[str], str]) -> dict[str, Json]:
    """Return what the table of a test fold depends on, labels and sites included."""
    return {
        "stage": "test",
        "numerics": NUMERICS,
        "member": artifacts.sha256_of_file(task.folder / FACTS_NAME),
        "cases": artifacts.fingerprint(described(task.cases, fingerprint_of)),
        "sites": artifacts.fingerprint({case.case_id: case.site for case in task.cases}),
        "repeat": task.repeat,
        "fold": task.fold,
        "seed": task.seed,
    }


def _is_tested(folder: Path, fields: Mapping[str, Json]) -> bool:
    """Return whether a member's table is there, unchanged, and of just these cases."""
    try:
        made = artifacts.read_json(folder / TESTED_NAME)
        return bool(
            made["fields"] == fields
            and made["predictions_sha256"] == artifacts.sha256_of_file(folder / PREDICTIONS_NAME)
        )
    except (ArtifactError, OSError, LookupError, TypeError):
        return False  # missing or damaged: the fold is predicted again


def store_of(location: str, cases: Sequence[Case]) -> FeatureStore:
    """Return a store that knows the slides of cases and of no other."""
    return FeatureStore.open(location, only=slides_of(cases))


def source_of(location: str, cases: Sequence[Case]) -> StoreSource:
    """Return a source of cases whose store knows of no other slide."""
    return StoreSource(store_of(location, cases), cases)


def member_fields(task: MemberTask, fingerprint_of: Callable[[str], str]) -> dict[str, Json]:
    """Return what a member's numbers depend on.

    Args:
        task: of the member.
        fingerprint_of: of a slide's features.
    """
    fields: dict[str, Json] = {
        "stage": "train",
        "numerics": NUMERICS,
        "recipe": task.recipe.model_dump(mode="json"),
        "targets": [target.model_dump(mode="json") for target in task.targets],
        "seed": task.seed,
        "train": artifacts.fingerprint(described(task.train, fingerprint_of)),
        "inner": artifacts.fingerprint(described(task.inner, fingerprint_of)),
    }
    if task.stop_after is not None:
        fields["stop_after"] = task.stop_after
    if task.plateau:
        fields["plateau"] = list(task.plateau)
    if task.out_of_fold:
        fields["calibrated_by"] = {
            test.folder.name: artifacts.sha256_of_file(test.folder / FACTS_NAME)
            for test in task.out_of_fold
        }
    return fields


def _with_out_of_fold(trained: Trained, task: MemberTask) -> tuple[Trained, StoreSource]:
    """Return a training without an inner part beside what the members say of their test folds.

    Only targets with classes are calibrated, so only their logits are gathered: of survival, each
    member has time bins of its own.
    """
    rows = []
    for test in task.out_of_fold:
        member = load_member(test.folder)
        found = member.infer(source_of(test.location, test.cases), test.device).logits
        own = np.full((len(found), trained.objective.outputs), np.nan)
        for target in trained.objective.targets:
            if target.task == "classes":
                place = trained.objective.slices[target.name]
                own[:, place] = found[:, member.objective.slices[target.name]]
        rows.append(own)
    cases = [case for test in task.out_of_fold for case in test.cases]
    pooled = dataclasses.replace(trained, inner_logits=np.concatenate(rows))
    return pooled, source_of(task.location, cases)


def fingerprints_in(store: FeatureStore) -> Callable[[str], str]:
    """Return what tells the fingerprint of a slide's features; it remembers them."""
    return cache(lambda slide_id: store.record(slide_id).fingerprint)


def described(cases: Sequence[Case], fingerprint_of: Callable[[str], str]) -> dict[str, Json]:
    """Return all that training sees of cases, as JSON."""
    return {
        case.case_id: {
            "patient": case.patient_id,
            "slides": {slide_id: fingerprint_of(slide_id) for slide_id in case.slide_ids},
            "targets": {name: [str(number) for number in v] for name, v in case.targets.items()},
        }
        for case in cases
    }


class _ToldSource(StoreSource):
    """A source whose reading is a sign of life: an epoch of a large cohort may take hours."""

    _heard_s = -math.inf

    def read(self, index: int, rows: Rows | None = None) -> CaseBag:
        """Return a case's bag, and say so now and then."""
        if time.monotonic() > _ToldSource._heard_s + _SIGN_OF_LIFE_S:
            _ToldSource._heard_s = time.monotonic()
            _say(b"")
        return super().read(index, rows)


def _say(message: bytes) -> None:
    with _CHANNEL:
        worker.tell(message)


def _forget(folder: Path, fingerprint: str) -> None:
    """Remove a member that is to be trained anew, and the state of another training."""
    facts = read_facts(folder)
    states = (folder / STATE_NAME, folder / PREPARATION_NAME / STATE_NAME)
    if facts is None and any(_state_of(state) == fingerprint for state in states):
        return  # this very training, killed before
    for name in (FACTS_NAME, WEIGHTS_NAME, PREDICTIONS_NAME, TESTED_NAME):
        (folder / name).unlink(missing_ok=True)
    _forget_state(folder)


def _forget_state(folder: Path) -> None:
    (folder / STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / PREPARATION_NAME, ignore_errors=True)


def _state_of(path: Path) -> str:
    try:
        return str(torch.load(path, map_location="cpu", weights_only=True)["fingerprint"])
    except Exception:  # missing, or damaged and about to be removed
        return ""


def _tell(
    task: MemberTask, epoch: Epoch, began_s: float, new: Sequence[Epoch], before: str = ""
) -> None:
    seconds = time.monotonic() - began_s
    most = task.stop_after or task.recipe.training.epochs
    rate = epoch.tiles / epoch.seconds if epoch.seconds else 0.0
    metric = METRICS[task.targets[0].task]
    parts = [f"{before}epoch {epoch.number}/{most}", f"loss {epoch.losses['total']:.4f}"]
    if task.inner:
        parts += [f"validation {epoch.validation_loss:.4f}", f"{metric} {epoch.metric:.3f}"]
    left_s = epoch.seconds * (most - epoch.number)
    parts += [f"{rate:,.0f} tiles/s", f"at most {left_s:,.0f} s left"]
    facts = {
        "text": ", ".join(parts),
        "epoch": epoch.number,
        "epochs": most,
        "loss": _number(epoch.losses["total"]),
        "validation_loss": _number(epoch.validation_loss),
        "metric": _number(epoch.metric),
        "tiles_per_s": rate,
        "longest_left_s": left_s,
        "seconds": seconds,
        "history": [one.plain() for one in new],
    }
    _say(json.dumps(facts).encode())


def _number(value: float) -> float | None:
    return value if value == value else None
