"""Data as scripts: what goes in comes out, and no text gets out of its string."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.heatmaps.review.scripts import base64_of, script

HOSTILE = (
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--<script>",
    "]]>",
    "\u2028alert(1)\u2029",
    '"); alert(1); ("',
    "\\u003cscript",
    "&lt;b&gt;",
    "\U0001f600",
    "Größe",
)


def payload(content: bytes, function: str) -> Any:
    text = content.decode("ascii")
    assert text.startswith(f"bagscope.{function}(")
    assert text.endswith(");\n")
    return json.loads(text[len(f"bagscope.{function}(") : -len(");\n")])


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_ends_its_string_or_the_script(text: str) -> None:
    content = script("cohort", {text: [text, {"deep": text}]})
    assert not set(b"<>&\n\r") & set(content[:-1])
    assert payload(content, "cohort") == {text: [text, {"deep": text}]}


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    assert payload(script("slide", {"a": text}), "slide") == {"a": text}


def test_what_is_no_number_is_null() -> None:
    data = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": (True, None, 2)}
    expected = {"a": None, "b": [None, 1.5], "c": {"d": None}, "e": [True, None, 2]}
    assert payload(script("slide", data), "slide") == expected


def test_arrays_keep_their_order_and_type() -> None:
    coords = np.arange(6, dtype=np.int64).reshape(3, 2)[:, ::-1]
    stored = base64.b64decode(base64_of(coords, "<i4"))
    assert np.frombuffer(stored, "<i4").tolist() == [1, 0, 3, 2, 5, 4]
    values = np.array([0.1, np.nan, 3])
    stored = base64.b64decode(base64_of(values, "<f4"))
    np.testing.assert_array_equal(np.frombuffer(stored, "<f4"), values.astype(np.float32))
