"""The end of a training run: out-of-fold scores of every slide, and the bundle of its models."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bagscope import artifacts
from bagscope.cohort.jobs import Job, RunOptions, RunReport, StageResult
from bagscope.cohort.progress import Reporter
from bagscope.cohort.runner import run_cohort
from bagscope.errors import ConfigError
from bagscope.mil.cases import Case, Per, slides_of
from bagscope.pipeline.study import Study, available_cores

if TYPE_CHECKING:
    from bagscope.mil.bundle import MemberPlace
    from bagscope.pipeline.predict_worker import MemberFolder
    from bagscope.pipeline.train import PlannedRun

SCORE_STAGE = "scores"
SCORES_NAME = "scores"


def score_out_of_fold(
    study: Study, planned: PlannedRun, options: RunOptions, report: Reporter
) -> RunReport:
    """Write `scores/<slide_id>.h5` of every case, by the members that it was a test case of."""
    from bagscope.pipeline.predict_worker import ScoreTask

    folder = planned.folder / SCORES_NAME
    tasks = planned.tests
    members = member_folders({name: task.folder for name, task in tasks.items()})
    others = _others(planned)
    asked: dict[str, list[str]] = {}
    for name, task in tasks.items():
        for case in task.cases:
            asked.setdefault(case.case_id, []).append(name)
    cases = {case.case_id: (case, task) for task in tasks.values() for case in task.cases}
    jobs = [
        Job(
            # Of a patient, who may have no name for a file, the first slide stands for all.
            slide_id=case.slide_ids[0],
            payload=ScoreTask(
                case=case,
                members=tuple(members[name] for name in asked[case_id]),
                others=tuple(
                    members[other]
                    for name in asked[case_id]
                    for other in others[name][case_id]
                    if len(asked[case_id]) == 1
                ),
                location=task.location,
                out=folder,
                device=task.device,
                threads=scoring_threads(options, len(cases)),
                # They follow from the run's members, whose own files say what is out of date.
                overwrite=True,
            ),
        )
        for case_id, (case, task) in cases.items()
    ]
    return run_cohort(
        jobs,
        score_one,
        stage=f"{SCORE_STAGE}/{planned.folder.name}",
        status_dir=study.status_folder,
        options=dataclasses.replace(options, sweep=(folder,), noun="case", shard=None),
        report=report,
    )


def _others(planned: PlannedRun) -> dict[str, dict[str, list[str]]]:
    """Return, by member and case, the members of the other folds that saw the case in training.

    They are of the member's own repeat and seed: as many as there are folds at most.
    """
    saw = {
        name: {case.case_id for case in (*task.train, *task.inner)}
        for name, task in planned.members.items()
    }
    draws: dict[tuple[int, int], list[str]] = {}
    for name, task in planned.tests.items():
        draws.setdefault((task.repeat, task.seed), []).append(name)
    return {
        name: {
            case.case_id: [
                other for other in draws[task.repeat, task.seed] if case.case_id in saw[other]
            ]
            for case in task.cases
        }
        for name, task in planned.tests.items()
    }


def score_one(job: Job) -> StageResult:
    """Ask members about one case, in a worker."""
    from bagscope.pipeline.predict_worker import score_one

    return score_one(job)


def scoring_threads(options: RunOptions, cases: int) -> int:
    """Return how many threads a worker computes with."""
    return max(1, available_cores() // max(1, min(options.workers or 1, cases)))


def member_folders(folders: Mapping[str, Path]) -> dict[str, MemberFolder]:
    """Return members by name, with what tells them from others."""
    from bagscope.mil.member import FACTS_NAME
    from bagscope.pipeline.predict_worker import MemberFolder

    return {
        name: MemberFolder(
            name=name, folder=folder, sha256=artifacts.sha256_of_file(folder / FACTS_NAME)
        )
        for name, folder in folders.items()
    }


def scoring_bundle(place: Path, study: Study | None, model: Path | None = None) -> Path:
    """Return the bundle whose members made the scores of a run or a prediction.

    Args:
        place: the run or the prediction.
        study: that it lies in; None where it lies in none.
        model: the bundle, or a run that has one; found beside the scores if None.

    Raises:
        ConfigError: no bundle there.
    """
    from bagscope.mil.bundle import find_bundle

    if model is not None:
        return find_bundle(model)
    runs = () if study is None else (study.folder / "runs" / place.resolve().parent.name,)
    for candidate in (place, *runs):
        with contextlib.suppress(ConfigError):
            return find_bundle(candidate)
    raise ConfigError(
        f"{place}: has no model beside it, nor has its study a run of that name; name the model "
        "with --model"
    )


def bundle_run(planned: PlannedRun, final: Path | None) -> Path:
    """Write the bundle of a complete run, if there is none yet or of others; return its path."""
    from bagscope.mil.bundle import BUNDLE_NAME, MemberPlace

    first = next(iter(planned.members.values()))
    path = planned.folder / BUNDLE_NAME
    bundle_members(
        path,
        run=planned.folder.name,
        per=first.recipe.bags.per,
        location=first.location,
        learnt_from=[
            case for task in planned.members.values() for case in (*task.train, *task.inner)
        ],
        members=[
            (
                MemberPlace(name=name, repeat=task.repeat, fold=task.fold, seed=task.seed),
                task.folder,
            )
            for name, task in planned.tests.items()
        ],
        final=final,
    )
    return path


def bundle_members(
    path: Path,
    *,
    run: str,
    per: Per,
    location: str,
    learnt_from: Iterable[Case],
    members: Sequence[tuple[MemberPlace, Path]],
    final: Path | None = None,
) -> None:
    """Write a bundle of members, with the origin of the features that they learnt from."""
    from bagscope.features.store import FeatureStore
    from bagscope.mil.bundle import write_bundle
    from bagscope.mil.feature_origin import origin_of

    store = FeatureStore.open(location, only=slides_of(learnt_from))
    origin = origin_of(store.record(slide_id) for slide_id in store.slide_ids)
    write_bundle(path, run=run, per=per, origin=origin, members=members, final=final)
