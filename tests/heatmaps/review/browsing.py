"""A headless Chromium for tests: one for all, and pages that report whatever went wrong in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-color-profile=srgb",
)  # fmt: skip


def find_chromium() -> str | None:
    """Return the browser to drive: $BAGSCOPE_CHROMIUM, or the first known name on the path."""
    named = os.environ.get("BAGSCOPE_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Any]:
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium: none of {', '.join(NAMES)} on the path, no $BAGSCOPE_CHROMIUM")
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def watched_page(
    browser: Any, folder: Path, allowed: str = "nothing", **options: Any
) -> Iterator[Any]:
    """Open a page; when it closes, nothing (but `allowed`) may have failed or left the folder."""
    options.setdefault("viewport", {"width": 1366, "height": 768})
    context = browser.new_context(**options)
    page = context.new_page()
    faults: list[str] = []
    asked: list[str] = []
    page.on("console", lambda said: faults.append(f"{said.type}: {said.text}"))
    page.on("pageerror", lambda error: faults.append(f"uncaught: {error}"))
    page.on("request", lambda request: asked.append(request.url))
    yield page
    context.close()
    # Spelt out: pytest shows values of its test files alone.
    wrong = [fault for fault in faults if allowed not in fault]
    assert not wrong, f"the page said {wrong}"
    outside = [url for url in asked if not _is_inside(url, folder)]
    assert not outside, f"the page asked for {outside}"


def _is_inside(url: str, folder: Path) -> bool:
    parts = urlsplit(url)
    if parts.scheme in ("data", "blob"):
        return True
    return parts.scheme == "file" and Path(unquote(parts.path)).is_relative_to(folder)


def wait_until(page: Any, question: str) -> None:
    """Wait for an expression; Playwright's own way needs `eval`, which the page forbids."""
    for _ in range(1200):
        if page.evaluate(question):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never true: {question}")


def settled(page: Any, selector: str = "#viewport") -> NDArray[np.uint8]:
    """Return the pixels (H, W, 3) of an element once they no longer change."""
    element = page.locator(selector)
    before = b""
    for _ in range(120):
        now = element.screenshot(caret="initial", animations="allow")
        if now == before:
            encoded = np.frombuffer(now, np.uint8)
            return np.ascontiguousarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])
        before = now
        page.wait_for_timeout(60)
    raise AssertionError("the picture never came to rest")
