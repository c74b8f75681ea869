"""What a training run starts from: features, labelled cases and splits of a study."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from bagscope.errors import ArtifactError, CohortError, ConfigError, SchemaError
from bagscope.features.store import FeatureStore
from bagscope.mil.cases import CaseTable, Per, cases_of
from bagscope.mil.objectives.objective import build_objective
from bagscope.mil.objectives.spec import EntropySpec
from bagscope.mil.places import require_places
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.regimes.registry import build_model, refuse_impossible
from bagscope.mil.sources import BagSource
from bagscope.mil.splits.checking import examine_splits
from bagscope.mil.splits.files import read_splits, was_edited, write_splits
from bagscope.mil.splits.making import make_splits
from bagscope.mil.splits.plan import SplitPlan, SplitSpec
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trial import require_step
from bagscope.pipeline.splits import splits_path
from bagscope.pipeline.study import Study
from bagscope.wording import listed
from bagscope.wsi.tiling import tiling_name


def find_features(study: Study, features: str | None, encoder: str | None) -> str:
    """Return where the features of a study lie.

    Args:
        study: an opened study.
        features: a folder or URL given by the user, which wins.
        encoder: which of the study's encoders, where it has several.

    Raises:
        ArtifactError: there are none.
        ConfigError: several encoders and none of them named, or an unknown one.
    """
    if features is not None:
        if encoder is not None:
            raise ConfigError(
                "--features names a folder, so --encoder has no meaning; leave it out"
            )
        return features
    folder = study.features_folder(tiling_name(study.spec.tiling))
    found = study.extracted_encoders()
    if not found:
        raise ArtifactError(
            f"{folder}: no features yet; run bagscope extract {study.folder} first, or name a "
            "folder with --features"
        )
    if encoder is not None:
        if encoder not in found:
            raise ConfigError(f"no features of encoder {encoder!r} (there are: {listed(found)})")
        return str(folder / encoder)
    if len(found) > 1:
        raise ConfigError(f"features of {listed(found)}; name one with --encoder")
    return str(folder / found[0])


def labelled_cases(
    study: Study,
    targets: Sequence[TargetSpec],
    *,
    per: Per,
    location: str,
    skip_missing: bool = False,
) -> CaseTable:
    """Gather the labelled cases of a study that have features.

    Raises:
        CohortError: labels that are none, contradict each other or are not there at all; cases
            without a tile.
        ConfigError: features of several encoders.
        ArtifactError: no features there.
    """
    store = FeatureStore.open(location)
    table = cases_of(
        study.cohort(),
        targets,
        per=per,
        available=store.slide_ids,
        skip_missing=skip_missing,
    )
    return _with_tiles(table, store, skip_missing=skip_missing)


def require_learnable(
    recipe: TrainSpec,
    table: CaseTable,
    plan: SplitPlan,
    dimension: int,
    source: BagSource | None = None,
) -> tuple[str, ...]:
    """Refuse what no member could be trained with, before any is started; return notes.

    Args:
        recipe: of the members.
        table: the cases and their labels.
        plan: the splits.
        dimension: of the features.
        source: of the cases, to see whether tiles have the places that a model goes by.

    Raises:
        ConfigError: an aggregator or options of it that there are not, or that teach nothing; a
            weight for a term that the loss does not have; a plateau to wait for where no inner
            validation part shows it.
        CohortError: a training side whose labels nothing can be learnt from; names the split.
    """
    objective = build_objective(table.targets, recipe.objective)
    objective.require_step_of(recipe.bags.bags_per_step)
    refuse_impossible(recipe, table.targets)
    with torch.random.fork_rng(devices=[]):
        model = build_model(recipe, dimension, objective.outputs)
    if source is not None:
        require_places(model, recipe, source)
    for number, split in enumerate(plan.splits):
        cases = table.chosen(split.train)
        labels = {
            target.name: np.array([case.targets[target.name] for case in cases], np.float64)
            for target in table.targets
        }
        try:
            fitted = objective.fit(labels)
        except CohortError as error:
            raise CohortError(f"split {split.name}: {error}") from error
        # Weights are what may find no term; what a first step loads takes seconds.
        if number == 0 and (recipe.objective.terms or recipe.objective.entropy != EntropySpec()):
            with torch.random.fork_rng(devices=[]):
                require_step(model, fitted, labels, dimension)
    blind = [split.name for split in plan.splits if not split.val]
    return _without_inner_part(recipe, blind) if blind else ()


def _without_inner_part(recipe: TrainSpec, splits: Sequence[str]) -> tuple[str, ...]:
    """Return a note of what these splits give no meaning to."""
    where = f"split {listed(splits)}: no inner validation part"
    if recipe.optimiser.schedule == "plateau":
        raise ConfigError(
            f"{where}, which optimiser.schedule: plateau watches; choose cosine or constant, or "
            "make splits with a val_share above 0"
        )
    training = recipe.training
    idle = {
        "patience": training.patience is not None,
        "checkpoint: best": training.checkpoint == "best",
        "monitor: metric": training.monitor == "metric",
    }
    unheeded = [name for name, is_set in idle.items() if is_set]
    if not unheeded:
        return ()
    kept = "their mean is" if training.checkpoint == "averaged" else "the last weights are"
    return (
        f"{where}, so {', '.join(unheeded)} of the recipe is not heeded there: all epochs are "
        f"trained and {kept} kept",
    )


def split_plan(
    study: Study, table: CaseTable, *, name: str, spec: SplitSpec, dry_run: bool = False
) -> tuple[SplitPlan, tuple[str, ...]]:
    """Return a study's splits, made and written where there are none yet, and notes about them.

    Raises:
        ConfigError: the splits do not fit the cases, or are unsound.
    """
    path = splits_path(study, name)
    notes: list[str] = []
    if not path.exists():
        plan = make_splits(table, spec)
        if dry_run:
            notes.append(f"splits/{name}.csv would be made ({spec.method})")
        else:
            write_splits(plan, path)
            notes.append(
                f"made splits/{name}.csv ({spec.method}); edit or replace it before training"
            )
    else:
        plan = read_splits(path)
        if was_edited(plan, path):
            notes.append(f"splits/{name}.csv was edited since it was made")
    if plan.per is not None and plan.per != table.per:
        raise ConfigError(
            f"{path}: splits cases per {plan.per}, and the run is per {table.per}; make other "
            "splits, or set bags.per"
        )
    known = {case.case_id for case in table.cases}
    gone = sorted(set(plan.case_ids) - known)
    if gone:
        notes.append(f"in the splits, but without features or label: {listed(gone)} ({len(gone)})")
        plan = plan.restricted_to(known)
    # Where cases are gone, so are their labels: said already, and no change of the others.
    found = examine_splits(dataclasses.replace(plan, labels="") if gone else plan, table)
    if found.faults:
        raise ConfigError(
            f"{path}: {'; '.join(found.faults[:10])}; correct it, or make it anew with bagscope "
            "splits make --overwrite"
        )
    # A plan that was made just now carries the table's notes and what was found.
    said = {*table.notes, *found.notes}
    notes += [note for note in plan.notes if note not in said]
    return plan, (*notes, *found.notes)


def _with_tiles(table: CaseTable, store: FeatureStore, *, skip_missing: bool) -> CaseTable:
    """Return the table without cases that have no tile, which are refused unless asked for."""
    try:
        counts = {s: store.record(s).shape[0] for case in table.cases for s in case.slide_ids}
    except SchemaError as error:  # a folder of several encoders
        raise ConfigError(str(error)) from error
    empty = [case.case_id for case in table.cases if not any(counts[s] for s in case.slide_ids)]
    if not empty:
        return table
    if not skip_missing or len(empty) == len(table.cases):
        raise CohortError(
            f"{len(empty)} of {len(table.cases)} cases have features of no tile ({listed(empty)}); "
            "tile them with a lower min_tissue, or pass --skip-missing to leave them out"
        )
    return dataclasses.replace(
        table,
        cases=tuple(case for case in table.cases if case.case_id not in empty),
        left_out={**table.left_out, **dict.fromkeys(empty, "has no tile")},
        notes=(*table.notes, f"left out, has no tile: {listed(empty)} ({len(empty)})"),
    )
