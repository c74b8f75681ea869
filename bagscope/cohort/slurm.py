"""The array script with which Slurm runs a cohort in shards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bagscope.errors import ConfigError

_OPTION_NAME = re.compile(r"[a-z][a-z-]*")
_OWN_OPTIONS = ("array", "cpus-per-task", "job-name", "mem", "output", "requeue", "signal", "time")


@dataclass(frozen=True, kw_only=True, slots=True)
class SlurmSpec:
    """What a task of the array asks of the scheduler.

    Attributes:
        shards: tasks of the array.
        cpus: per task; the command gets as many workers.
        memory_mib: per task; None for the partition's default.
        time_limit: as Slurm writes it, "12:00:00" or "2-00"; None for the partition's default.
        job_name: shown by squeue.
        logs: folder for the logs; made by the script, relative to where it is submitted.
        at_most: tasks that run at a time; None for no limit.
        options: further sbatch options by long name, for instance {"partition": "cpu"}; an empty
            value gives a flag.
        setup: shell lines to run first, for instance "module load python".
    """

    shards: int
    cpus: int = 4
    memory_mib: int | None = None
    time_limit: str | None = None
    job_name: str = "bagscope"
    logs: str = "slurm-logs"
    at_most: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    setup: Sequence[str] = ()


def sbatch_script(command: Sequence[str], spec: SlurmSpec) -> str:
    """Return a script for `sbatch` that runs `command` once per shard.

    `--shard i/n` and `--workers` are added to the command. A task that is killed, preempted or
    requeued just runs again: what was made is found, and claims of the dead are taken over. Slurm
    makes no folder for logs, so the script does, and sends its output there itself.

    Args:
        command: for instance ["bagscope", "run", "study.yaml"].
        spec: what to ask for.

    Raises:
        ConfigError: numbers below 1, or text that would break out of its line.
    """
    _check(command, spec)
    array = f"1-{spec.shards}" + (f"%{spec.at_most}" if spec.at_most else "")
    asked = {
        "job-name": spec.job_name,
        "array": array,
        "cpus-per-task": str(spec.cpus),
        "mem": "" if spec.memory_mib is None else f"{spec.memory_mib}M",
        "time": spec.time_limit or "",
        "output": "/dev/null",
    }
    lines = ["#!/bin/bash"]
    lines += [f"#SBATCH --{name}={_value(value)}" for name, value in asked.items() if value]
    # Half a minute to give claims back before SIGKILL, on another host nobody knows who is dead.
    # "B:" is the shell of the script, and by its last line that is the command itself.
    lines += ["#SBATCH --requeue", "#SBATCH --signal=B:TERM@30"]
    for name, value in spec.options.items():
        lines.append(f"#SBATCH --{name}" + (f"={_value(value)}" if value else ""))
    logs = shlex.quote(spec.logs)
    lines += [
        "",
        "set -euo pipefail",
        f"mkdir -p -- {logs}",
        f'exec >>{logs}/"${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}.log" 2>&1',
        *spec.setup,
        f"exec {shlex.join(command)} \\",
        f'    --shard "${{SLURM_ARRAY_TASK_ID}}/{spec.shards}" --workers {spec.cpus}',
    ]
    return "\n".join(lines) + "\n"


def _check(command: Sequence[str], spec: SlurmSpec) -> None:
    if not command:
        raise ConfigError("the Slurm script has no command to run; give one")
    for name in ("shards", "cpus", "memory_mib", "at_most"):
        number = getattr(spec, name)
        if number is not None and number < 1:
            raise ConfigError(f"the Slurm script's {name} is {number}; it must be 1 or more")
    for option in spec.options:
        if not _OPTION_NAME.fullmatch(option) or option in _OWN_OPTIONS:
            raise ConfigError(
                f"the Slurm option {option!r} is set by bagscope, or is no option's long name; "
                "give names such as partition"
            )
    texts = (spec.job_name, spec.logs, spec.time_limit or "", *spec.options.values())
    for text in texts:
        if "\n" in text or "\r" in text or '"' in text:
            raise ConfigError(f"{text!r} can't stand in a Slurm script; leave out quotes and lines")


def _value(text: str) -> str:
    return f'"{text}"' if re.search(r"\s", text) else text
