from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner

from bagscope.cli.app import app
from bagscope.errors import BagscopeError, ConfigError, FingerprintMismatch
from tests.stained import build_stained_svs


@dataclass
class Ran:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def bagscope() -> Callable[..., Ran]:
    """Run the command line in this process, as `main` would."""
    return runner_of(app)


def runner_of(app: Typer) -> Callable[..., Ran]:
    """Return what runs an app with the exit codes and messages of `main`."""

    def run(*arguments: object) -> Ran:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if isinstance(result.exception, BagscopeError):
            usage = isinstance(result.exception, ConfigError | FingerprintMismatch)
            return Ran(2 if usage else 1, result.stdout, f"{result.stderr}{result.exception}")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def slides_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three small scans, not to be changed."""
    folder = tmp_path_factory.mktemp("slides")
    for index, name in enumerate(("a", "b", "c")):
        build_stained_svs(folder / f"{name}.svs", mpp=1.0, downsamples=(1, 4), seed=index)
    return folder


@pytest.fixture
def slides(slides_once: Path, tmp_path: Path) -> Path:
    """Return a fresh folder of three small scans at 1 µm per pixel."""
    return Path(shutil.copytree(slides_once, tmp_path / "slides"))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def leftovers(folder: Path) -> list[Path]:
    """Return temporaries and claims below a folder."""
    return [*folder.rglob("*.tmp"), *folder.rglob("*.claim")]
