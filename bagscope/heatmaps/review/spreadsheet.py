"""Cells that a spreadsheet would take for formulas, written so that it does not.

A quotation mark in front makes a spreadsheet show the text as it is. It is put before marks that
stand there already too, so that what is read back is what was written.
"""

from __future__ import annotations

import re

_DANGEROUS = re.compile(r"'*[=+\-@\t\r]")
_GUARDED = re.compile(r"'+[=+\-@\t\r]")


def guarded(text: str) -> str:
    """Return a cell that no spreadsheet computes."""
    return f"'{text}" if _DANGEROUS.match(text) else text


def unguarded(cell: str) -> str:
    """Return what `guarded` was given."""
    return cell[1:] if _GUARDED.match(cell) else cell
