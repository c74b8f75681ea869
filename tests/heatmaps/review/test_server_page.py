"""The page as a browser meets it when it is served live: its link, its table, a slide."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from scipy import special

from tests.heatmaps.made_run import made_study, write_scores
from tests.heatmaps.review.browsing import chromium, settled, wait_until


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """The link that a viewer of two slides printed, with its token."""
    run = made_study(tmp_path / "study", ("a", "b#1 ä"))
    rng = np.random.default_rng(0)
    for slide_id in ("a", "b#1 ä"):
        write_scores(run, slide_id, special.log_softmax(rng.normal(0, 2, (12, 1)), axis=0))
    command = [sys.executable, "-m", "bagscope", "view", tmp_path / "study"]
    process = subprocess.Popen(
        [*command, "--json", "--token", "random"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield json.loads(process.stdout.readline())["url"]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)


def test_the_printed_link_opens_a_page_that_asks_nobody_else(url: str) -> None:
    faults: list[str] = []
    asked: dict[str, int] = {}
    with chromium() as browser:
        page: Any = browser.new_context(viewport={"width": 1366, "height": 768}).new_page()
        page.on("console", lambda said: faults.append(f"{said.type}: {said.text}"))
        page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
        page.on("response", lambda answer: asked.update({answer.url: answer.status}))
        page.goto(url)
        page.wait_for_selector("#slides-body tr:not(.spacer)")
        assert urlsplit(page.url).path == "/abmil/"
        assert "token" not in page.url
        page.locator("#slides-body tr:not(.spacer)").nth(1).click()
        wait_until(page, "window.bagscope.isViewReady && bagscope.isViewReady()")
        shown = settled(page)
        stranger = browser.new_context().new_page()
        refused = stranger.goto(page.url)
        assert refused is not None
        assert refused.status == 401
    assert faults == []
    # Tissue was drawn, and not only the ground and the overlay's single colours.
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 5_000
    origin = urlsplit(url).netloc
    assert {urlsplit(one).netloc for one in asked if not one.startswith(("data:", "blob:"))} == {
        origin
    }
    pictures = [one for one in asked if "/picture_files/" in one]
    assert pictures
    assert {status for one, status in asked.items() if one.startswith("http")} <= {200, 307}
