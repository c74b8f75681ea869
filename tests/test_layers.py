"""The architecture, held by a test: who imports whom, what starts light, what is public."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import bagscope

PACKAGE = Path(bagscope.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
# A room may import from rooms before it, and from itself.
ROOMS = (
    "errors", "wording", "arithmetic", "kernels", "artifacts", "specs", "cohort", "wsi", "features",
    "mil", "heatmaps",
)  # fmt: skip
TOP = (*ROOMS, "pipeline", "cli")
HEAVY = ("torch", "scipy", "cv2", "pandas", "numpy", "h5py")
VERBS = (
    "init", "scan", "tile", "extract", "encoders", "convert", "verify", "run", "demo", "doctor",
    "splits", "train", "tune", "evaluate", "compare", "predict", "heatmap",
    "explain", "review", "view", "convert-weights",
)  # fmt: skip


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path.name}: relative import"
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "bagscope" and len(parts) > 1:
                rooms.add(parts[1])
    return rooms - {"__version__"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_flow_one_way(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__", "testing"):
        return
    assert room in TOP, f"{room} has no place in the order of rooms"
    later = set(TOP[TOP.index(room) + 1 :])
    assert not imported_rooms(path) & later


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_kernels_are_for_models_and_know_nothing_else(path: Path) -> None:
    room = room_of(path)
    if room == "kernels":
        assert imported_rooms(path) <= {"kernels", "arithmetic"}
    elif room != "mil" and path.name != "doctor.py":
        assert "kernels" not in imported_rooms(path)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_module_grows_beyond_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


def test_the_package_itself_imports_nothing() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from bagscope.cli.app import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        f"sys.stderr.write(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    assert "Usage" in ran.stdout


@pytest.mark.parametrize(
    "room", [p.parent.name for p in MODULES if p.name == "__init__.py" and p.parent != PACKAGE]
)
def test_public_names_are_sorted_and_there(room: str) -> None:
    (path,) = (p for p in MODULES if p.name == "__init__.py" and p.parent.name == room)
    name = ".".join(("bagscope", *path.parent.relative_to(PACKAGE).parts))
    module = importlib.import_module(name)
    public = list(getattr(module, "__all__", []))
    assert public == sorted(public)
    for attribute in public:
        assert getattr(module, attribute) is not None
