"""Arithmetic is chosen by trying; here the trials' results are made up."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bagscope.arithmetic import TRIED_VARIABLE, avoid_broken_units
from bagscope.errors import ConfigError
from bagscope.features import precision
from bagscope.features.precision import choose_precision, cpu_policy

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VARIABLE = "ONEDNN_MAX_CPU_ISA"


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have everything found out anew, and forgotten again."""
    caches = (precision.cpu_policy, avoid_broken_units)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv(TRIED_VARIABLE, "")  # so that it is put back
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with matrix units of a kind, whose trial ends as one likes."""
    made = SimpleNamespace(flags="avx512f amx_bf16 amx_tile", code=0, trials=0)
    plain = Path.read_text

    def read_text(path: Path, *arguments: object, **options: object) -> str:
        if str(path) == "/proc/cpuinfo":
            return f"flags\t\t: fpu {made.flags} sse\n"
        return plain(path, *arguments, **options)  # type: ignore[arg-type]

    def run(*_: object, **__: object) -> SimpleNamespace:
        made.trials += 1
        return SimpleNamespace(returncode=made.code)

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(subprocess, "run", run)
    return made


@pytest.mark.parametrize("code", [-4, 1])
def test_matrix_units_that_crash_are_left_alone(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import os

    machine.code = code
    avoid_broken_units()
    assert "AMX" not in os.environ[VARIABLE]
    avoid_broken_units()
    assert machine.trials == 1, "tried once in a process"
    monkeypatch.delenv(VARIABLE)


def test_matrix_units_that_work_are_used(machine: SimpleNamespace) -> None:
    import os

    avoid_broken_units()
    assert machine.trials == 1
    assert VARIABLE not in os.environ
    avoid_broken_units.cache_clear()  # as in a process that this one starts
    avoid_broken_units()
    assert machine.trials == 1


def test_nothing_is_tried_where_nothing_is_suspect(machine: SimpleNamespace) -> None:
    machine.flags = "avx2"
    machine.code = -4
    avoid_broken_units()
    assert machine.trials == 0


def test_the_users_own_choice_stands(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    machine.code = -4
    monkeypatch.setenv(VARIABLE, "AVX2")
    avoid_broken_units()
    assert os.environ[VARIABLE] == "AVX2"
    assert machine.trials == 0


@pytest.mark.parametrize(
    ("gain", "error", "used"),
    [(3.0, 0.004, True), (1.0, 0.004, False), (0.1, 0.004, False), (3.0, 0.5, False)],
)
def test_bfloat16_must_be_faster_and_right(
    machine: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    gain: float,
    error: float,
    used: bool,
) -> None:
    monkeypatch.setattr(precision, "_bfloat16_gain", lambda: (gain, error))
    assert cpu_policy().bfloat16 is used
    assert f"{gain:.2g} times" in cpu_policy().note
    expected = "bfloat16" if used else "float32"
    assert choose_precision("bfloat16", CPU) == expected
    assert choose_precision("float16", CPU) == expected
    assert choose_precision("float32", CPU) == "float32"


def test_the_user_goes_before_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_bfloat16_gain", lambda: (0.5, 0.004))
    for device in (CPU, CUDA):
        assert choose_precision("bfloat16", device, asked="float32") == "float32"
        assert choose_precision("float32", device, asked="bfloat16") == "bfloat16"
    assert choose_precision("float32", CUDA, asked="float16") == "float16"
    with pytest.raises(ConfigError, match="float16 runs hundreds of times slower on a CPU"):
        choose_precision("float32", CPU, asked="float16")


def test_a_gpu_does_what_it_is_asked_for() -> None:
    for wanted in ("float32", "bfloat16", "float16"):
        assert choose_precision(wanted, CUDA) == wanted


def test_the_trial_itself_gives_numbers_one_can_believe() -> None:
    begin = time.perf_counter()
    gain, error = precision._bfloat16_gain()
    assert 0 < gain < 100
    assert 0 < error < 0.02
    assert time.perf_counter() - begin < 60
