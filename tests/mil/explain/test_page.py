"""The code in docs/explain.md runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[3] / "docs/explain.md"


def test_the_page_s_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, PAGE.name, "exec"), names)
    assert len(names["signed"]) == len(names["gradients"]) == 60  # type: ignore[arg-type]
    assert "Attention does not drive this prediction" in capsys.readouterr().out
