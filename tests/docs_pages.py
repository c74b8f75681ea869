"""The pages of the documentation, and what stands in their blocks."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_ENDS = (">", "|", "&&")


def blocks_of(page: Path, language: str) -> list[str]:
    """Return the blocks of a language, in the page's order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """Return the lines that call bagscope, as words, without what a shell does with the output."""
    lines = [line for block in blocks_of(page, "bash") for line in block.splitlines()]
    found = []
    for line in lines:
        if line.startswith("bagscope "):
            words = shlex.split(line, comments=True)
            end = next((place for place, word in enumerate(words) if word in _ENDS), len(words))
            found.append(words[:end])
    return found
