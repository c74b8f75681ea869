"""Data as classic scripts: a page opened from a folder may load scripts, but fetch nothing.

All that comes from tables and people stands in one JSON literal of plain ASCII without `<`, `>` and
`&`, so that no text can end the script or be taken for markup on the way.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bagscope.artifacts import Json

if TYPE_CHECKING:
    from numpy.typing import NDArray

_UNSAFE = {ord("<"): "\\u003c", ord(">"): "\\u003e", ord("&"): "\\u0026"}


def script(function: str, data: Mapping[str, Json]) -> bytes:
    """Return a script that calls `bagscope.<function>` with the data; no number is NaN."""
    text = json.dumps(
        _finite(data), ensure_ascii=True, allow_nan=False, separators=(",", ":")
    ).translate(_UNSAFE)
    return f"bagscope.{function}({text});\n".encode("ascii")


def base64_of(array: NDArray[Any], dtype: str) -> str:
    """Return an array's bytes, of a little-endian type such as "<f4", as base64."""
    import numpy as np

    return base64.b64encode(np.ascontiguousarray(array, np.dtype(dtype)).tobytes()).decode("ascii")


def _finite(value: Any) -> Any:
    """Return JSON in which what is no finite number is null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
