from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from bagscope.cohort.slurm import SlurmSpec, sbatch_script
from bagscope.errors import ConfigError


def test_the_script_runs_its_shard_with_every_argument_intact(tmp_path):
    """Run it as a task of the array would be, with a command that writes down its arguments."""
    told = tmp_path / "told"
    code = f"import sys; open({str(told)!r}, 'w').write(repr(sys.argv[1:])); print('said')"
    awkward = ["a b", "it's", "$HOME", "*", "--x=1;2", 'say "so"', "ä"]
    script = sbatch_script(
        [sys.executable, "-c", code, *awkward],
        SlurmSpec(shards=8, cpus=3, logs="my logs", setup=["export GREETING=hello"]),
    )
    path = tmp_path / "job.sh"
    path.write_text(script)
    environment = {**os.environ, "SLURM_ARRAY_JOB_ID": "42", "SLURM_ARRAY_TASK_ID": "5"}
    subprocess.run(["bash", str(path)], cwd=tmp_path, env=environment, check=True, timeout=30)
    assert eval(told.read_text()) == [*awkward, "--shard", "5/8", "--workers", "3"]
    assert (tmp_path / "my logs" / "42_5.log").read_text() == "said\n"


def test_what_is_asked_of_the_scheduler():
    spec = SlurmSpec(
        shards=8,
        cpus=4,
        memory_mib=16000,
        time_limit="2-00",
        at_most=3,
        options={"partition": "cpu", "comment": "two words", "exclusive": ""},
    )
    lines = sbatch_script(["bagscope", "run"], spec).splitlines()
    assert lines[0] == "#!/bin/bash"
    for line in (
        "#SBATCH --array=1-8%3",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=16000M",
        "#SBATCH --time=2-00",
        "#SBATCH --requeue",
        "#SBATCH --partition=cpu",
        '#SBATCH --comment="two words"',
        "#SBATCH --exclusive",
    ):
        assert line in lines
    directives = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives == list(range(1, len(directives) + 1)), "Slurm stops at the first command"
    assert shlex.split(" ".join(lines[-2:]).replace("\\", ""))[:3] == ["exec", "bagscope", "run"]


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ([], {}),
        (["x"], {"shards": 0}),
        (["x"], {"cpus": 0}),
        (["x"], {"options": {"array": "1-2"}}),
        (["x"], {"options": {"-p": "cpu"}}),
        (["x"], {"options": {"partition": "a\n#SBATCH --x"}}),
        (["x"], {"job_name": 'a"b'}),
    ],
)
def test_what_would_break_the_script_is_refused(command, wrong):
    with pytest.raises(ConfigError):
        sbatch_script(command, SlurmSpec(**{"shards": 2, **wrong}))
