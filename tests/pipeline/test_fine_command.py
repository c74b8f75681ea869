"""`bagscope heatmap` with a gallery or a finer pass, as a user meets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import Ran, bagscope, files_of
from tests.heatmaps.made_run import made_study, write_scores

__all__ = ["bagscope"]

Command = Callable[..., Ran]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--top", 3), "--top has no meaning without gallery among --formats"),
        (("--apart", 0), "--apart has no meaning without gallery among --formats"),
        (("--fine-parts", 2), "--fine-parts has no meaning without --fine"),
        (("--fine", "0,0,9,9", "--formats", "csv"), "--formats has no meaning with --fine"),
        (("--fine", "0,0,9,9", "--levels", "2"), "--levels has no meaning with --fine"),
        (("--fine", "0,0,9,9", "--show", "disagreement"), "--show has no meaning with --fine"),
        (("--fine", "0,0,9,9"), "there are 2; name it with --slide"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    bagscope: Command, tmp_path: Path, options: tuple[object, ...], told: str
) -> None:
    run = made_study(tmp_path, ("a", "b"))
    for slide_id in "ab":
        write_scores(run, slide_id, np.full((12, 1), -np.log(12)))
    before = files_of(tmp_path)
    ran = bagscope("heatmap", run, *options)
    assert (ran.code, told in ran.err) == (2, True)
    assert files_of(tmp_path) == before


def test_a_gallery_from_the_command_line(bagscope: Command, tmp_path: Path) -> None:
    run = made_study(tmp_path, ("a",))
    write_scores(run, "a", np.log(np.arange(1, 13)[:, None] / 78.0))
    how = ("--formats", "gallery", "--top", 1, "--context", 0.25, "-j", 1)
    assert bagscope("heatmap", run, *how).code == 0
    folder = tmp_path / "heatmaps" / "abmil" / "a" / "ratio" / "gallery"
    assert {path.name for path in folder.iterdir()} == {
        *("gallery.csv", "gallery.png", "top_01.jpg", "bottom_01.jpg"),
    }
    assert (folder / "gallery.csv").read_text().splitlines()[1].startswith("top,1,,11,")
