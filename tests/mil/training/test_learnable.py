"""What is refused before any member is started."""

from __future__ import annotations

import pytest

from bagscope.errors import ConfigError
from bagscope.mil.cases import Case, CaseTable
from bagscope.mil.recipe import TrainSpec
from bagscope.mil.splits.plan import Split, SplitPlan, SplitSpec
from bagscope.mil.targets import TargetSpec
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.train_data import require_learnable
from tests.mil.made_bags import DIMENSION, TARGET, made_recipe, made_source

SURVIVAL = TargetSpec(column="os", task="survival", time="months", event="dead")
CASES = tuple(
    Case(
        case_id=name,
        patient_id=name,
        slide_ids=(name,),
        targets={"os": (float(months), 1.0)},
    )
    for months, name in enumerate("abcdef", start=1)
)
TABLE = CaseTable(cases=CASES, targets=(SURVIVAL,), per="slide")


def plan_of(val: tuple[str, ...]) -> SplitPlan:
    return SplitPlan(
        splits=(Split(train=("a", "b", "c", "d"), val=val, test=("f",)),),
        spec=SplitSpec(),
        patient_of={case.case_id: case.patient_id for case in CASES},
    )


def test_cox_asks_for_steps_of_several_bags() -> None:
    cox = {"objective": {"survival": "cox"}}
    with pytest.raises(ConfigError, match=r"os: Cox's loss .*bags_per_step is 1"):
        require_learnable(
            made_recipe(**cox, bags={"bags_per_step": 1}), TABLE, plan_of(("e",)), DIMENSION
        )
    require_learnable(
        made_recipe(**cox, bags={"bags_per_step": 2}), TABLE, plan_of(("e",)), DIMENSION
    )
    alone = made_recipe(objective={"bins": 2}, bags={"bags_per_step": 1})
    require_learnable(alone, TABLE, plan_of(("e",)), DIMENSION)


def test_without_an_inner_part_it_is_said_what_is_not_heeded() -> None:
    discrete = {"objective": {"bins": 2}}
    watched = made_recipe(**discrete, training={"patience": 3, "checkpoint": "best"})
    assert require_learnable(watched, TABLE, plan_of(("e",)), DIMENSION) == ()
    (note,) = require_learnable(watched, TABLE, plan_of(()), DIMENSION)
    assert "r0_f0: no inner validation part" in note
    assert "patience, checkpoint: best of the recipe is not heeded" in note
    plain = made_recipe(**discrete, training={"patience": None, "checkpoint": "last"})
    assert require_learnable(plain, TABLE, plan_of(()), DIMENSION) == ()


def test_a_plateau_that_nothing_shows_is_refused() -> None:
    recipe = made_recipe(objective={"bins": 2}, optimiser={"schedule": "plateau"})
    require_learnable(recipe, TABLE, plan_of(("e",)), DIMENSION)
    with pytest.raises(ConfigError, match=r"r0_f0: no inner validation part, .* plateau"):
        require_learnable(recipe, TABLE, plan_of(()), DIMENSION)
    recipe = made_recipe(optimiser={"schedule": "plateau"})
    with pytest.raises(ConfigError, match="plateau, which watches the inner validation part"):
        Trainer(recipe, [TARGET], made_source(4), None, seed=0)
    # The final model: how long is known from members that had such a part.
    Trainer(recipe, [TARGET], made_source(4), None, seed=0, stop_after=2)


@pytest.mark.parametrize(
    ("name", "options"), [("transmil", {"ppeg": "lattice"}), ("rrt", {"places": "lattice"})]
)
@pytest.mark.parametrize("regime", ["full", "mixup"])
def test_a_lattice_that_there_is_not_is_refused_before_training(
    name: str, options: dict[str, str], regime: str
) -> None:
    recipe = TrainSpec.model_validate(
        {
            "aggregator": {"name": name, "options": {"hidden": 16, "heads": 2, **options}},
            "regime": {"name": regime},
            "bags": {"bags_per_step": 2},
        }
    )
    with pytest.raises(ConfigError, match=r"places on (the|one) lattice"):
        Trainer(recipe, [TARGET], made_source(6), None, seed=0)


CLASSES = CaseTable(
    cases=tuple(
        Case(case_id=name, patient_id=name, slide_ids=(name,), targets={"label": (place % 2,)})
        for place, name in enumerate("abcdef")
    ),
    targets=(TARGET,),
    per="slide",
)


@pytest.mark.parametrize(
    ("name", "objective", "told"),
    [
        ("abmil", {"terms": {"far": 0.1}}, r"gives a weight to far, .* \(there are: bag\)"),
        ("mean", {"entropy": {"weight": 0.1}}, "entropy"),
    ],
)
def test_a_term_that_there_is_not_is_refused_before_training(
    name: str, objective: dict[str, object], told: str
) -> None:
    recipe = TrainSpec.model_validate({"aggregator": {"name": name}, "objective": objective})
    with pytest.raises(ConfigError, match=told):
        require_learnable(recipe, CLASSES, plan_of(("e",)), DIMENSION)


def test_a_term_that_the_targets_leave_no_meaning_to_is_refused_before_training() -> None:
    clam = {"aggregator": {"name": "clam_sb"}}
    terms = {"bag": 0.7, "instance": 0.3}
    recipe = TrainSpec.model_validate({**clam, "objective": {"terms": terms}})
    require_learnable(recipe, CLASSES, plan_of(("e",)), DIMENSION)
    recipe = TrainSpec.model_validate({**clam, "objective": {"bins": 2, "terms": terms}})
    with pytest.raises(ConfigError, match="gives a weight to instance"):
        require_learnable(recipe, TABLE, plan_of(("e",)), DIMENSION)


def test_a_draw_by_class_asks_for_classes() -> None:
    recipe = made_recipe(bags={"balanced": True}, objective={"bins": 2})
    with pytest.raises(ConfigError, match=r"balanced draws by class.*os, survival\); leave it out"):
        require_learnable(recipe, TABLE, plan_of(("e",)), DIMENSION)
    recipe = made_recipe(bags={"balanced": True})
    require_learnable(recipe, CLASSES, plan_of(("e",)), DIMENSION)


@pytest.mark.parametrize("regime", ["mixup", "pseudo_bags", "packmil", "mhim", "two_stage"])
def test_a_step_is_tried_within_every_regime(regime: str) -> None:
    recipe = made_recipe(regime={"name": regime}, bags={"bags_per_step": 2})
    require_learnable(recipe, CLASSES, plan_of(("e",)), DIMENSION)
    wrong = made_recipe(
        regime={"name": regime}, bags={"bags_per_step": 2}, objective={"terms": {"no": 1.0}}
    )
    with pytest.raises(ConfigError, match="gives a weight to no,"):
        require_learnable(wrong, CLASSES, plan_of(("e",)), DIMENSION)
