"""The list of a study's runs: the one page of the viewer that the static bundle lacks."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from bagscope.heatmaps.review.live.served import ServedRun

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Runs</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="assets/app.css">
</head>
<body>
<header class="cohort-head">
  <div class="cohort-title"><h1>Runs of this study</h1></div>
</header>
<main class="table-scroll">
  <ul class="run-list">
{items}
  </ul>
</main>
</body>
</html>
"""


def run_list(runs: Iterable[ServedRun]) -> str:
    """Return a page of links to runs."""
    items = "\n".join(
        f'    <li><a href="{quote(run.name)}/">{escape(run.name)}</a> '
        f'<span class="quiet">{escape(run.about)}</span></li>'
        for run in runs
    )
    return _PAGE.format(items=items)
