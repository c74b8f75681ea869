"""Aggregators are found by name, ours and foreign ones; what is wrong is said in a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bagscope.errors import ConfigError
from bagscope.mil.aggregators import registry
from bagscope.mil.aggregators.abmil import ABMIL, ABMILOptions
from bagscope.mil.aggregators.registry import (
    BUILT_IN,
    aggregator_entry,
    aggregator_names,
    build_aggregator,
    register,
)


def test_names_are_sorted_and_files() -> None:
    folder = Path(registry.__file__).parent
    assert list(BUILT_IN) == sorted(BUILT_IN)
    assert all((folder / f"{name}.py").exists() for name in BUILT_IN)
    assert aggregator_names() == tuple(sorted(aggregator_names()))


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_entry_tells_what_it_is(name: str) -> None:
    entry = aggregator_entry(name)
    assert entry.name == name
    assert entry.summary
    assert entry.reference
    assert entry.is_order_free == (
        name not in ("comel", "dtfd", "mambamil", "rrt", "transmil", "vit")
    )
    assert not entry.mixes_bags


def test_names_are_listed_without_importing_their_modules() -> None:
    script = (
        "import sys\n"
        "from bagscope.mil.aggregators.registry import aggregator_names\n"
        "assert 'acmil' in aggregator_names()\n"
        "assert 'bagscope.mil.aggregators.acmil' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no aggregator 'clam' \(did you mean 'clam_sb'"):
        build_aggregator("clam", 8, 2)


def test_unknown_and_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"abmil: unknown option 'gatd' .did you mean 'gated'"):
        build_aggregator("abmil", 8, 2, {"gatd": True})
    with pytest.raises(ConfigError, match=r"dropout is 1\.0: input should be less than 1"):
        build_aggregator("abmil", 8, 2, {"dropout": 1.0})


def test_a_spec_stands_for_its_options() -> None:
    model = build_aggregator("abmil", 8, 2, ABMILOptions(hidden=4, gated=True))
    assert isinstance(model, ABMIL)
    assert model.classifier.in_features == 4
    assert model.attention.u is not None


def test_the_machine_is_looked_at_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(registry, "avoid_broken_units", lambda: asked.append(True))
    build_aggregator("mean", 8, 2)
    assert asked == [True]


def test_one_name_is_taken_once() -> None:
    register("abmil", ABMILOptions, summary="", reference="")(ABMIL)
    with pytest.raises(ValueError, match="'abmil' is registered twice; choose another name"):

        @register("abmil", ABMILOptions, summary="another", reference="")
        class Another(ABMIL):
            pass


def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Install a package with an aggregator called "theirs"; module is its only file's text."""
    (folder / "their_package.py").write_text(module)
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bagscope.aggregators]\ntheirs = their_package\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "their_package", raising=False)


def test_a_package_that_fails_to_load_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path, monkeypatch, "raise RuntimeError('no licence')")
    assert "theirs" in aggregator_names()
    message = r"'theirs': their_package can't be loaded \(no licence\); correct or remove"
    with pytest.raises(ConfigError, match=message):
        aggregator_entry("theirs")


def test_a_package_that_registers_something_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign(tmp_path, monkeypatch, "x = 1")
    with pytest.raises(ConfigError, match="'theirs': its package registers no such name"):
        aggregator_entry("theirs")
