"""What a slide is: its facts, its levels, and the protocol that every backend keeps to.

Frames:
    _l0   pixels of level 0 (full resolution), origin at level 0's top-left corner
    _lv   pixels of one stored level, origin at that level's top-left corner
    _px   a length in pixels of whatever the sentence says (a tile's own pixels for `tile_px`)
    _um   micrometres
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bagscope.wsi.geometry import ReadPlan

Rgb = tuple[int, int, int]
WHITE: Rgb = (255, 255, 255)

Downscale = Literal["area", "dct"]
"""How pixels coarser than a stored level are made: exact area mean, or DCT-scaled JPEG decoding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One stored resolution; `downsample` is relative to level 0 and seldom a whole number."""

    width_px: int
    height_px: int
    downsample: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RectL0:
    """A rectangle in level-0 pixels."""

    x_l0: int
    y_l0: int
    width_l0: int
    height_l0: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Spacing:
    """Micrometres per level-0 pixel, and where the number was found.

    `source` names the property ("openslide.mpp-x", "override", "objective-power", ...);
    `estimated` is true when the number was inferred from the objective power and not measured.
    """

    mpp_x: float
    mpp_y: float
    source: str
    estimated: bool = False

    @property
    def mpp(self) -> float:
        """Return the mean of both axes, the one number that geometry works with."""
        return (self.mpp_x + self.mpp_y) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class SlideInfo:
    """What is known of a slide without reading a pixel.

    `spacing` is None where the slide states no believable pixel size; `spacing_problem` then says
    why in words. `warnings` are sentences for the user (anisotropic pixels, conflicting sizes).
    `bounds_l0` is the scanned area inside level 0 (the whole of it for most formats).
    `background` is what transparent pixels become.
    """

    path: Path
    format: str
    backend: str
    width_l0: int
    height_l0: int
    levels: tuple[Level, ...]
    bounds_l0: RectL0
    spacing: Spacing | None
    spacing_problem: str = ""
    warnings: tuple[str, ...] = ()
    objective: float | None = None
    background: Rgb = WHITE
    associated: tuple[str, ...] = ()
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TileBatch:
    """Tiles as pixels.

    Attributes:
        images: (N, tile_px, tile_px, 3) uint8 RGB. Rows that could not be read hold the
            background colour and are not to be used.
        readable: (N,) bool.
        problems: one sentence per distinct cause, naming the first tile that met it.
    """

    images: NDArray[np.uint8]
    readable: NDArray[np.bool_]
    problems: tuple[str, ...] = ()


class Slide(Protocol):
    """An open slide. Safe to use from several threads; never to be carried over a fork."""

    @property
    def info(self) -> SlideInfo:
        """Return the facts."""
        ...

    def read_level(
        self, level: int, x_lv: int, y_lv: int, width_px: int, height_px: int
    ) -> NDArray[np.uint8]:
        """Read a rectangle of one stored level: (height_px, width_px, 3) uint8 RGB.

        Transparent pixels, and those outside the level, are the slide's background.

        Raises:
            ReadError: pixels could not be decoded. The slide stays usable.
        """
        ...

    def read_tiles(
        self,
        corners_l0: NDArray[np.int32],
        plan: ReadPlan,
        *,
        downscale: Downscale = "area",
        threads: int = 1,
        out: NDArray[np.uint8] | None = None,
    ) -> TileBatch:
        """Read square tiles whose top-left corners are `corners_l0` (N, 2) as (x, y).

        A tile that can't be read is marked, not raised. `out` (N, tile_px, tile_px, 3) is filled
        in place where given. Fastest when corners are ordered by (y, x).
        """
        ...

    def read_associated(self, name: str) -> NDArray[np.uint8]:
        """Read an associated image as (H, W, 3) uint8 RGB; `label` and `macro` are refused."""
        ...

    def close(self) -> None:
        """Release file handles; closing twice is fine."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
