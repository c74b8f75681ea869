"""A training run's folder: whom it belongs to, and which of its members are the ones asked for."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from bagscope import artifacts
from bagscope.cohort.claims import ClaimBook
from bagscope.cohort.status import stage_folder
from bagscope.errors import ArtifactError
from bagscope.pipeline.train import (
    CONFIG_NAME,
    PREDICTIONS_NAME,
    SPLITS_NAME,
    TEST_STAGE,
    read_config,
)

if TYPE_CHECKING:
    from bagscope.cohort.jobs import RunOptions
    from bagscope.pipeline.study import Study
    from bagscope.pipeline.train import PlannedRun

_END = "end_of_run"
_LOOK_AGAIN_S = 0.5


def claim_run(planned: PlannedRun, *, overwrite: bool) -> None:
    """Write the run's configuration, or refuse to mix two in one folder.

    Raises:
        FingerprintMismatch: a run of other settings is there, and not to be replaced.
    """
    from bagscope.mil.splits.files import write_splits

    path = planned.folder / CONFIG_NAME
    text = yaml.safe_dump(json.loads(json.dumps(planned.config)), sort_keys=False)
    if path.exists():
        if not overwrite:
            artifacts.require_same(
                read_config(planned.folder),
                planned.config,
                what=str(planned.folder),
                remedy="choose another --name, or train anew with --overwrite",
            )
        else:
            _forget(planned, is_other=path.read_text(encoding="utf-8") != text)
    write_splits(planned.plan, planned.folder / SPLITS_NAME, overwrite=True)
    artifacts.write_text(path, text)


def finished_members(planned: PlannedRun) -> list[str]:
    """Return the names of the members that are finished and were made of just what is planned.

    A member of other options, labels or features may lie in the folder: the one that was refused,
    or one that another shard is still to train anew.
    """
    from bagscope.features.store import FeatureStore
    from bagscope.mil.member import read_facts
    from bagscope.pipeline.train_worker import fingerprints_in, member_fields

    location = next(iter(planned.members.values())).location
    fingerprint_of = fingerprints_in(FeatureStore.open(location))  # members share their slides
    found = []
    for name, task in planned.members.items():
        with contextlib.suppress(ArtifactError):  # damaged: no member
            facts = read_facts(task.folder)
            if facts is not None and not artifacts.differing_fields(
                facts["fields"], member_fields(task, fingerprint_of)
            ):
                found.append(name)
    return found


@contextlib.contextmanager
def alone_at_the_end(study: Study, planned: PlannedRun, options: RunOptions) -> Iterator[None]:
    """Wait until no other process gathers and bundles this run: shards may end together."""
    stage = f"{TEST_STAGE}/{planned.folder.name}"
    folder = stage_folder(study.status_folder, stage)
    with ClaimBook(folder, stage=stage, stale_s=options.stale_claim_s) as claims:
        while not claims.acquire(_END):
            time.sleep(_LOOK_AGAIN_S)
        yield


def _forget(planned: PlannedRun, *, is_other: bool) -> None:
    """Remove what is no longer said once members are trained anew.

    Args:
        planned: the run.
        is_other: its configuration changes, so that its final model and surplus folds go too.
    """
    from bagscope.mil.bundle import BUNDLE_NAME
    from bagscope.pipeline.bundle import SCORES_NAME
    from bagscope.pipeline.evaluate import FIGURES_NAME, METRICS_NAME, REPORT_NAME
    from bagscope.pipeline.final import final_folder

    run = planned.folder
    for name in (PREDICTIONS_NAME, METRICS_NAME, REPORT_NAME):
        (run / name).unlink(missing_ok=True)
    folders: list[Path] = [run / name for name in (BUNDLE_NAME, SCORES_NAME, FIGURES_NAME)]
    if is_other:
        surplus = [path for path in run.glob("fold_*") if path.name not in planned.members]
        folders += [*surplus, final_folder(run)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
