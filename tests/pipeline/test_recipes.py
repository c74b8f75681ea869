from __future__ import annotations

import math
import tomllib
from pathlib import Path

import pytest
import yaml

import bagscope
from bagscope.errors import ConfigError
from bagscope.mil.training.trainer import Trainer
from bagscope.pipeline.recipes import load_recipe, recipe_names
from tests.mil.made_bags import TARGET, made_source

NAMES = (
    "abmil",
    "abmil_gated",
    "acmil",
    "aem",
    "attentive_probe",
    "clam_mb",
    "clam_sb",
    "comel",
    "dsmil",
    "dtfd",
    "hopfield",
    "ilra",
    "ins",
    "mambamil",
    "max",
    "mean",
    "mhim_v1",
    "mhim_v2",
    "mixup",
    "packmil",
    "packmil_brca",
    "packmil_panda",
    "packmil_survival",
    "pseudo_bags",
    "rrt",
    "set_transformer",
    "transmil",
    "two_stage",
    "vit",
    "vit_agent",
    "vit_alibi",
    "vit_flow",
    "vit_inline",
    "vit_lightning",
    "vit_neighbours",
)
PLACED = ("vit_alibi", "vit_neighbours")
"""Those that want tiles with places, which bags of arrays have none of."""
TAILORED = ("packmil_panda", "packmil_survival", "two_stage")
"""Those for one kind of target, or of features, tested with it in tests/mil/regimes."""
ROOT = Path(bagscope.__file__).parent.parent
CONFIGS = ROOT / "configs"


def test_these_are_there_and_each_says_what_it_is() -> None:
    assert recipe_names() == NAMES
    for name in NAMES:
        first = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# ") and len(first) > 20


@pytest.mark.parametrize("name", [name for name in NAMES if name not in (*PLACED, *TAILORED)])
def test_each_learns_from_bags(name: str) -> None:
    found = Trainer(
        load_recipe(name),
        [TARGET],
        made_source(12, seed=1, name="t"),
        made_source(8, seed=2, name="v"),
        seed=0,
        stop_after=1,
    ).run()
    (epoch,) = found.history
    assert all(math.isfinite(loss) for loss in epoch.losses.values())
    assert math.isfinite(epoch.validation_loss) and 0 <= epoch.metric <= 1
    # Whatever a recipe adds to the loss is there, and counts: a term of no weight is a typo.
    added = {
        "acmil": {"semantic", "diversity"},
        "aem": {"entropy"},
        "clam_mb": {"instance"},
        "clam_sb": {"instance"},
        "comel": {"instance"},
        "dtfd": {"semantic"},
        "dsmil": {"semantic"},
        "mhim_v1": {"consistency"},
        "mhim_v2": {"consistency"},
        "ins": {"instance", "contrast", "warm_up"},
        "packmil": {"residual"},
        "packmil_brca": {"residual"},
    }
    assert set(epoch.losses) - {"total", "bag", "bag/label"} == added.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_one_and_is_written_as_it_is_read(name: str) -> None:
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    read = load_recipe(name).model_dump(mode="json")
    for block, options in values.items():
        for option, value in options.items():
            if isinstance(value, dict):
                assert {key: read[block][option][key] for key in value} == value
            else:
                assert read[block][option] == value


def test_a_recipe_is_kept_to_the_published_numbers() -> None:
    clam = load_recipe("clam_sb")
    # 0.7 + 0.3 of the two losses: the recorded originals in tests/mil/parity have them too.
    assert dict(clam.objective.terms) == {"bag": 0.7, "instance": 0.3}
    assert clam.objective == load_recipe("clam_mb").objective
    # Half of either stream.
    assert dict(load_recipe("dsmil").objective.terms) == {"bag": 0.5, "semantic": 0.5}
    # AEM's weight falls from its start to nothing along half a cosine.
    entropy = load_recipe("aem").objective.entropy
    assert entropy.is_on and entropy.end == 0 and entropy.schedule == "cosine"


def test_an_unknown_option_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"abmil\.yaml.*epoch.*did you mean 'epochs'"):
        load_recipe("abmil", {"training": {"epoch": 3}})
    with pytest.raises(ConfigError, match=r"training.*traning|traning.*did you mean 'training'"):
        load_recipe("abmil", {"traning": {"epochs": 3}})
    with pytest.raises(ConfigError, match=r"hiden.*did you mean 'hidden'"):
        load_recipe("abmil", {"aggregator": {"options": {"hiden": 3}}})
    with pytest.raises(ConfigError, match=r"no aggregator 'abmill'.*did you mean 'abmil'"):
        load_recipe("abmil", {"aggregator": {"name": "abmill"}})


def test_another_aggregator_or_regime_keeps_no_options_of_the_first_one() -> None:
    found = load_recipe("packmil", {"aggregator": {"name": "transmil", "options": {"heads": 4}}})
    assert dict(found.aggregator.options) == {"heads": 4}
    assert found.regime == load_recipe("packmil").regime
    found = load_recipe("packmil", {"aggregator": {"name": "abmil", "options": {"hidden": 64}}})
    assert found.aggregator.options["hidden"] == 64
    assert found.aggregator.options["attention"] == 128
    assert dict(load_recipe("packmil", {"regime": {"name": "mixup"}}).regime.options) == {}
    coarse = {"coarse": {"name": "transmil"}}
    options = load_recipe("two_stage", {"regime": {"options": coarse}}).regime.options
    assert options["coarse"] == {"name": "transmil"} and options["tiles"] == 64
    # An optimiser's other options are of any of them.
    found = load_recipe("packmil", {"optimiser": {"name": "sgd"}})
    assert found.optimiser.lr == load_recipe("packmil").optimiser.lr


def test_an_empty_block_takes_a_recipe_s_away() -> None:
    found = load_recipe("packmil", {"objective": {"terms": {}}})
    assert dict(found.objective.terms) == {}
    assert found.optimiser == load_recipe("packmil").optimiser


def test_what_is_wrong_with_a_block_is_one_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("packmil", {"regime": {"options": {"downsampler": "max"}}})
    assert str(caught.value) == (
        "recipe packmil.yaml: regime packmil: a downsampler makes one of r tiles, and r is 1; set "
        "it to 2 or more"
    )
    with pytest.raises(ConfigError, match=r"yaml: bags: first_tiles is 50 and is to grow"):
        load_recipe("abmil", {"bags": {"first_tiles": 50, "sample_tiles": 20}})
    with pytest.raises(ConfigError, match=r"yaml: regime is 'mixup': should be a block of options"):
        load_recipe("abmil", {"regime": "mixup"})


def test_an_unknown_recipe_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'abmi'.*did you mean 'abmil'"):
        load_recipe("abmi")
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(str(tmp_path / "abmil.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds list"):
        load_recipe(str(tmp_path / "list.yaml"))
    (tmp_path / "own.yaml").write_text("training: {epochs: 3}\n", encoding="utf-8")
    assert load_recipe(str(tmp_path / "own.yaml")).training.epochs == 3


def test_the_wheel_carries_them_where_they_are_looked_for() -> None:
    from bagscope.pipeline import recipes

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    in_wheel, in_checkout = recipes._FOLDERS
    assert carried == {in_checkout.name: in_wheel.relative_to(ROOT).as_posix()}
