"""What a worker does for a sequence of tasks: learns one after the other, or tests them all.

The first task's member lies in `0_<task>/` of the sequence's folder, a later one's, as it was just
learnt, in `<way>/<number>_<task>/`, and an earlier task's head on the body that the adapters left
in the end in `owlora/left_<number>_<task>/`. `tested.json` holds the matrices.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray

from bagscope import artifacts
from bagscope.arithmetic import compute_on
from bagscope.artifacts import Json
from bagscope.cohort.executors import worker
from bagscope.cohort.jobs import StageResult
from bagscope.errors import ArtifactError, FingerprintMismatch, SchemaError
from bagscope.features.store import FeatureStore
from bagscope.heatmaps.tile_places import places_of
from bagscope.mil.bags import BagOutput, Bags
from bagscope.mil.cases import Case
from bagscope.mil.continual.metrics import accuracy, localisation
from bagscope.mil.continual.sequence import Way, heads_of_recipe, learn_task, with_body_of
from bagscope.mil.explain.annotations import INSIDE, overlap_shares
from bagscope.mil.inference import outputs
from bagscope.mil.member import FACTS_NAME, Member, load_member, read_facts, save_member
from bagscope.mil.ood import reference_of
from bagscope.mil.sources import StoreSource
from bagscope.mil.training.finishing import calibrated, finish
from bagscope.mil.training.history import Epoch
from bagscope.mil.training.optimisation import Weights
from bagscope.mil.training.state import STATE_NAME, read_state
from bagscope.pipeline.continual import LearntTask, SequenceTask, SequenceTest
from bagscope.pipeline.train import NUMERICS
from bagscope.pipeline.train_worker import described, fingerprints_in, store_of
from bagscope.wsi.geojson import read_regions

CARRIED_NAME = "carried.safetensors"
TESTED_NAME = "tested.json"


def train_sequence(name: str, task: SequenceTask) -> StageResult:
    """Learn the tasks of a sequence in every way; goes on where a killed training stopped.

    The first task is learnt once: nothing was there that it could forget.

    Raises:
        FingerprintMismatch: a task was learnt with other options or data.
    """
    compute_on(task.threads)
    own = [case for one in task.tasks for case in (*one.train, *one.inner)]
    store = store_of(task.location, own)
    done = []
    first, is_new = _learn(task, store, 0, "owlora", None, "")
    done.append(is_new)
    digests = [str(_facts(member_folder(task, 0, "owlora"))["weights_sha256"])]
    for way in task.spec.ways:
        before = first[way]
        digest = digests[0]
        for number in range(1, len(task.tasks)):
            carried, is_new = _learn(task, store, number, way, before, digest)
            before = carried[way]
            done.append(is_new)
            digest = str(_facts(member_folder(task, number, way))["weights_sha256"])
            digests.append(digest)
    left = [_leave(task, store, number) for number in range(len(task.tasks) - 1)]
    return StageResult(
        outcome="done" if any((*done, *left)) else "skipped",
        fingerprint=artifacts.fingerprint({"members": digests}),
        facts={"tasks": len(done)},
    )


def member_folder(task: SequenceTask | SequenceTest, number: int, way: Way) -> Path:
    """Return the folder of a task's member; the first task's is of both ways."""
    name = f"{number}_{task.spec.tasks[number].name}"
    return task.folder / name if number == 0 else task.folder / way / name


def left_folder(task: SequenceTask, number: int) -> Path:
    """Return the folder of the adapted member that answers for a task once all are learnt."""
    if number == len(task.tasks) - 1:
        return member_folder(task, number, "owlora")
    return task.folder / "owlora" / f"left_{number}_{task.tasks[number].name}"


def _learn(
    task: SequenceTask,
    store: FeatureStore,
    number: int,
    way: Way,
    before: Weights | None,
    digest: str,
) -> tuple[dict[Way, Weights], bool]:
    """Learn one task, or find it learnt; return what each way goes on with, and whether it is new.

    Args:
        task: the sequence.
        store: of its slides.
        number: of the task.
        way: of learning.
        before: what the task before passed on.
        digest: hash of that task's member; empty for the first one.
    """
    one = task.tasks[number]
    folder = member_folder(task, number, way)
    fields = _fields(task, one, store, number, way, digest)
    made = read_facts(folder)
    if made is not None and not task.overwrite:
        artifacts.require_same(
            made["fields"],
            fields,
            what=str(folder),
            remedy="choose another --name, or train anew with --overwrite",
        )
    if made is not None and not artifacts.differing_fields(made["fields"], fields):
        member = load_member(folder)
        (folder / STATE_NAME).unlink(missing_ok=True)
        carried = safetensors.torch.load_file(folder / CARRIED_NAME)
        return {"owlora": carried, "finetune": dict(member.weights)}, False
    fingerprint = artifacts.fingerprint(fields)
    if task.overwrite:
        _forget_other(folder, fingerprint, task.device)
    train = StoreSource(store, one.train)
    inner = StoreSource(store, one.inner) if one.inner else None

    def tell(epoch: Epoch) -> None:
        text = f"task {number + 1}/{len(task.tasks)} {one.name}, {way}, epoch {epoch.number}"
        text = f"{text}, loss {epoch.losses['total']:.4f}"
        worker.tell(json.dumps({"text": text, "epoch": epoch.number}).encode())

    learnt = learn_task(
        task.recipe,
        one.target,
        train,
        inner,
        way=way,
        number=number,
        before=before,
        rank=task.spec.rank,
        penalty=task.spec.penalty,
        seed=task.seed,
        device=task.device,
        folder=folder,
        fingerprint=fingerprint,
        on_epoch=tell,
    )
    member = finish(learnt.trained, task.recipe, inner, seed=task.seed, fields=fields)
    usual = reference_of(train, learnt.trained.statistics)
    with artifacts.atomic_file(folder / CARRIED_NAME) as temporary:
        kept = {name: value.cpu().contiguous() for name, value in learnt.carried.items()}
        safetensors.torch.save_file(kept, temporary)
    save_member(dataclasses.replace(member, weights=learnt.weights, ood=usual), folder)
    artifacts.step("member-written")
    (folder / STATE_NAME).unlink(missing_ok=True)
    return {"owlora": kept, "finetune": learnt.weights}, True


def _leave(task: SequenceTask, store: FeatureStore, number: int) -> bool:
    """Write what is left of an earlier task at the end, or find it there; return whether it is new.

    The body is another one than the task was learnt with, so it is calibrated anew.
    """
    one, folder = task.tasks[number], left_folder(task, number)
    own_folder = member_folder(task, number, "owlora")
    last_folder = left_folder(task, len(task.tasks) - 1)
    fields: dict[str, Json] = {
        **_facts(own_folder)["fields"],
        "stage": "continual-left",
        "last": str(_facts(last_folder)["weights_sha256"]),
    }
    made = read_facts(folder)
    if made is not None and not artifacts.differing_fields(made["fields"], fields):
        return False
    member = on_body_of(load_member(own_folder), load_member(last_folder))
    member = dataclasses.replace(member, fields=fields)
    inner = StoreSource(store, one.inner) if one.inner else None
    logits = member.infer(inner, task.device).logits if inner else None
    save_member(calibrated(member, inner, logits), folder)
    return True


def on_body_of(own: Member, later: Member) -> Member:
    """Return a task's member on the body that a later task left."""
    heads = heads_of_recipe(own.recipe, own.features, own.objective.outputs)
    return dataclasses.replace(own, weights=with_body_of(own.weights, later.weights, heads))


def _fields(
    task: SequenceTask, one: LearntTask, store: FeatureStore, number: int, way: Way, digest: str
) -> dict[str, Json]:
    """Return what a task's member depends on."""
    fingerprint_of = fingerprints_in(store)
    return {
        "stage": "continual",
        "numerics": NUMERICS,
        "recipe": task.recipe.model_dump(mode="json"),
        "targets": [one.target.model_dump(mode="json")],
        "seed": task.seed,
        "number": number,
        "way": way,
        "rank": task.spec.rank,
        "penalty": task.spec.penalty,
        "before": digest,
        "train": artifacts.fingerprint(described(one.train, fingerprint_of)),
        "inner": artifacts.fingerprint(described(one.inner, fingerprint_of)),
    }


def _forget_other(folder: Path, fingerprint: str, device: str) -> None:
    """Remove a member that is learnt anew, and the state of another training than this."""
    (folder / FACTS_NAME).unlink(missing_ok=True)
    state = folder / STATE_NAME
    if not state.exists():
        return
    try:
        read_state(state, fingerprint, torch.device(device))
    except (ArtifactError, FingerprintMismatch):
        state.unlink()


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_facts(folder)
    assert facts is not None, "it was written just now"
    return facts


# --- testing --------------------------------------------------------------------------------


def test_sequence(name: str, test: SequenceTest) -> StageResult:
    """Ask every task's model about every task learnt by then, or find that done."""
    compute_on(test.threads)
    store = store_of(test.location, [case for cases in test.cases for case in cases])
    fields = _tested_fields(test, store)
    path = test.folder / TESTED_NAME
    if path.exists() and artifacts.read_json(path).get("fields") == fields:
        return StageResult(outcome="skipped", fingerprint=artifacts.fingerprint(fields))
    found = {way: _matrices(test, store, way) for way in test.spec.ways}
    artifacts.write_json(path, {"fields": fields, "ways": found})
    return StageResult(outcome="done", fingerprint=artifacts.fingerprint(fields))


def _matrices(test: SequenceTest, store: FeatureStore, way: Way) -> dict[str, Json]:
    """Return both matrices; A[t][j] is None where there is nothing to say."""
    count = len(test.cases)
    members = [load_member(member_folder(test, number, way)) for number in range(count)]
    right: NDArray[np.float64] = np.full((count, count), np.nan)
    placed = right.copy()
    for later, left_by in enumerate(members):
        for earlier in range(later + 1):
            if not test.cases[earlier]:
                continue
            right[later, earlier], placed[later, earlier] = _ask(
                on_body_of(members[earlier], left_by), test, store, test.cases[earlier]
            )
    return {"accuracy": _plain(right), "tile_auroc": _plain(placed)}


def _ask(
    member: Member, test: SequenceTest, store: FeatureStore, cases: Sequence[Case]
) -> tuple[float, float]:
    """Return the accuracy over cases, and the mean AUROC of their tiles where truth is known."""
    (target,) = member.targets
    classes = np.array([int(case.targets[target.name][0]) for case in cases])
    logits, scores, truth = [], [], []
    place = 0
    said = outputs(
        member.model(test.device),
        StoreSource(store, cases),
        member.recipe.bags,
        device=test.device,
        precision=member.recipe.training.precision,
        scale=member.scale,
    )
    for bags, output in said:
        logits.append(output.logits.double().cpu().numpy())
        for bag in range(len(bags)):
            known = _truth_of(test, store, cases[place])
            if known is not None:
                scores.append(tile_scores(output, bags, bag, int(classes[place])))
                truth.append(known)
            place += 1
    found = member.predictions(np.concatenate(logits))[target.name]
    return accuracy(found, classes), localisation(scores, truth)


def tile_scores(output: BagOutput, bags: Bags, bag: int, label: int) -> NDArray[np.float64]:
    """Return how much each tile of a bag (n,) speaks for a class."""
    start, stop = bags.cu_seqlens[bag : bag + 2].tolist()
    scores = output.scores[start:stop].double().cpu()
    if scores.shape[1] != output.logits.shape[1]:
        return scores.mean(1).numpy()
    if output.score_kind == "instance_logit":
        scores = torch.log_softmax(scores, 1)
    return scores[:, label].numpy()


def _truth_of(test: SequenceTest, store: FeatureStore, case: Case) -> NDArray[np.bool_] | None:
    """Return which tiles of a case (n,) are positive; None where that is not known of a slide."""
    if not all(slide_id in test.truth for slide_id in case.slide_ids):
        return None
    found = []
    for slide_id in case.slide_ids:
        path, record = test.truth[slide_id], store.record(slide_id)
        count = record.shape[0]
        if path.suffix == ".npy":
            own = np.load(path, allow_pickle=False).astype(np.bool_).ravel()
        else:
            places = places_of(record.coords_l0, record.grid, record.attributes, count)
            regions = read_regions(path, bounds_l0=places.area_l0)
            own = overlap_shares(regions, places.coords_l0, places.extent_l0) >= INSIDE
        if len(own) != count:
            raise SchemaError(
                f"{path}: speaks of {len(own)} tiles, and {slide_id} has {count}; make it anew "
                "for these features"
            )
        found.append(own)
    return np.concatenate(found)


def _tested_fields(test: SequenceTest, store: FeatureStore) -> dict[str, Json]:
    fingerprint_of = fingerprints_in(store)
    members = {
        f"{way}/{number}": _facts(member_folder(test, number, way))["fingerprint"]
        for way in test.spec.ways
        for number in range(len(test.cases))
    }
    return {
        "stage": "continual-test",
        "numerics": NUMERICS,
        "members": members,
        "cases": [artifacts.fingerprint(described(c, fingerprint_of)) for c in test.cases],
        "truth": {
            slide_id: artifacts.sha256_of_file(path)
            for slide_id, path in sorted(test.truth.items())
            if any(slide_id in case.slide_ids for cases in test.cases for case in cases)
        },
    }


def _plain(matrix: NDArray[np.float64]) -> list[list[float | None]]:
    return [[None if value != value else float(value) for value in row] for row in matrix]
