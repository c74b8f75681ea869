"""docs/extending.md, followed to the letter: its blocks become files and are used as it says."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bagscope import mil
from bagscope.mil import aggregators
from bagscope.mil.aggregators import registry
from bagscope.mil.aggregators.registry import build_aggregator
from bagscope.mil.bags import Bags
from tests.kernels.packed import assert_close_to_float64, normal

PAGE = Path(__file__).parents[3] / "docs/extending.md"
NAME = "logsumexp"


def blocks() -> dict[str, str]:
    """Return the page's blocks of code by the file name in their first line."""
    found = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(found)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget afterwards what the test registers."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    yield
    for module in ("my_pooling", f"my_pooling.{NAME}", f"{aggregators.__name__}.{NAME}"):
        sys.modules.pop(module, None)


def run(name: str) -> dict[str, object]:
    """Run a block of the page as a module of its own, and its tests if it has any."""
    names: dict[str, object] = {"__name__": name}
    exec(compile(blocks()[name], name, "exec"), names)
    tests = [value for key, value in names.items() if key.startswith("test_")]
    for test in tests:
        test()  # type: ignore[operator]
    assert tests or not name.startswith("test_")
    return names


def test_the_page_has_all_its_files() -> None:
    assert set(blocks()) == {"logsumexp.py", "test_logsumexp.py", "pyproject.toml", "use.py"}


@pytest.mark.usefixtures("clean")
def test_in_a_package_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tomllib.loads(blocks()["pyproject.toml"])["project"]
    install(tmp_path, project)
    monkeypatch.syspath_prepend(tmp_path)
    run("use.py")
    run("test_logsumexp.py")
    model = build_aggregator(NAME, 12, 2, {"sharpness": 3.0})
    assert type(model).__module__ == f"my_pooling.{NAME}"
    says_what_the_page_says(model)


def install(site: Path, project: dict[str, object]) -> None:
    """Lay the package down as an installer does: its files, and what it says of itself."""
    package = site / "my_pooling"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "logsumexp.py").write_text(blocks()["logsumexp.py"])
    info = site / f"my_pooling-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points: dict[str, dict[str, str]] = project["entry-points"]  # type: ignore[assignment]
    lines = [
        line
        for group, names in points.items()
        for line in (f"[{group}]", *(f"{name} = {module}" for name, module in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.mark.usefixtures("clean")
def test_in_bagscope_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Their folder and their line, without touching the checkout: the folder has a second part.
    folder = tmp_path / "bagscope/mil/aggregators"
    folder.mkdir(parents=True)
    (folder / "logsumexp.py").write_text(blocks()["logsumexp.py"])
    ours = Path(mil.__file__).parent / "aggregators"
    for stated in re.findall(r"`(bagscope/mil/aggregators/\w+\.py)`", PAGE.read_text()):
        assert (tmp_path / stated).exists() or (ours / Path(stated).name).exists()
    monkeypatch.setattr(aggregators, "__path__", [*aggregators.__path__, str(folder)])
    monkeypatch.setattr(registry, "BUILT_IN", (*registry.BUILT_IN, NAME))
    assert NAME in registry.aggregator_names()
    run("test_logsumexp.py")
    says_what_the_page_says(build_aggregator(NAME, 12, 2, {"sharpness": 3.0}))


def says_what_the_page_says(model: torch.nn.Module) -> None:
    """Compare with the page's formula, bag by bag, in float64."""
    bags = Bags.of([normal(n, 12, seed=n) for n in (5, 1, 30)])
    found = model(bags)
    for bag, scores in enumerate(found.scores.split((5, 1, 30))):
        r, o = 3.0, scores.double()
        n = torch.tensor(float(len(o)), dtype=torch.float64)
        wanted = ((r * o).exp().sum(0).log() - n.log()) / r
        assert_close_to_float64(found.logits[bag], wanted, atol=1e-6)
