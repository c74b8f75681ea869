"""A counter for checks that go through many files: it moves in a terminal, a line in a log."""

from __future__ import annotations

import sys

import typer


class StepCounter:
    """Say how far a verb is: at once in a terminal, per tenth of a long way in a log."""

    def __init__(self, verb: str, *, silent: bool) -> None:
        self._verb = verb
        self._silent = silent
        self._tenth = 0

    def advance(self, done: int, total: int) -> None:
        """Take note that `done` of `total` are done."""
        if self._silent:
            return
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            typer.echo(f"\r{self._verb}: {done:,} of {total:,}{end}", err=True, nl=False)
        elif total >= 100 and done * 10 // total > self._tenth:
            self._tenth = done * 10 // total
            typer.echo(f"{self._verb}: {done:,} of {total:,}", err=True)
