"""What a tiling is asked to be: the spec, its name on disk, and nothing heavy to import."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from bagscope.specs import Spec

NUMERICS = 1
"""Raised by hand, with a changelog line, when the same spec would give other tiles or numbers."""

MPP_RANGE = (0.08, 25.0)
"""Believable micrometres per pixel; outside lie unset dpi tags and tenfold errors."""

Mpp = Annotated[float, Field(ge=MPP_RANGE[0], le=MPP_RANGE[1])]
Fraction = Annotated[float, Field(ge=0, le=1)]


class RoiSpec(Spec):
    """Which annotation classes tiles must lie in, and which they must not touch.

    `include` None means every class that is not excluded; an empty tuple is refused.
    """

    include: tuple[str, ...] | None = Field(
        default=None,
        min_length=1,
        description="annotation classes to tile inside of; all when not given",
    )
    exclude: tuple[str, ...] = Field(default=(), description="annotation classes to keep away from")


class TilingSpec(Spec):
    """How slides are cut into tiles. Everything here stands in the tile file's fingerprint."""

    mpp: Mpp = Field(default=0.5, description="micrometres per tile pixel")
    tile_px: int = Field(default=256, ge=16, le=8192, description="tile edge in pixels")
    overlap_px: int = Field(default=0, ge=0, description="pixels that neighbouring tiles share")
    coarser_mpp: tuple[Mpp, ...] = Field(
        default=(),
        description="further resolutions, whole multiples of mpp, tiled in alignment with it",
    )
    min_tissue: Fraction = Field(default=0.25, description="least tissue fraction of a tile")
    max_pen: Fraction = Field(default=0.05, description="most of a tile that may be pen ink")
    max_fold: Fraction = Field(default=0.5, description="most of a tile that may be a dark fold")
    min_sharpness: Fraction = Field(
        default=0.15, description="least sharpness; 0 keeps blurred tiles"
    )
    max_unreadable: Fraction = Field(
        default=0.01, description="share of tiles that may be unreadable before the slide fails"
    )
    max_tiles: int | None = Field(
        default=None, ge=1, description="keep at most so many tiles, spread over the tissue"
    )
    seed: int = Field(default=0, ge=0, description="of the choice that max_tiles makes")
    downscale: str = Field(
        default="area",
        pattern="^(area|dct)$",
        description="how coarser pixels are made: area or dct",
    )
    allow_upsampling: bool = Field(
        default=False, description="enlarge slides scanned coarser than mpp"
    )
    allow_estimated_mpp: bool = Field(
        default=False, description="infer the pixel size from the objective where nothing states it"
    )
    roi: RoiSpec = Field(
        default=RoiSpec(), description="annotation classes to tile inside of and to keep away from"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.overlap_px >= self.tile_px:
            raise ValueError(
                f"overlap_px is {self.overlap_px}, but must be smaller than tile_px {self.tile_px}"
            )
        for coarse, fine in zip(self.coarser_mpp, (self.mpp, *self.coarser_mpp), strict=False):
            ratio = coarse / fine
            if ratio < 1.5 or abs(ratio - round(ratio)) > 1e-6 * ratio:
                raise ValueError(
                    f"coarser_mpp {coarse:g} is {ratio:.4g} times {fine:g}; "
                    "it must be a whole multiple, from fine to coarse"
                )
        return self


def tiling_name(spec: TilingSpec, mpp: float | None = None) -> str:
    """Return the folder name of a tiling, or of one of its coarser resolutions `mpp`.

    `0.50mpp_256px`, `0.50mpp_256px_32overlap`, `2.00mpp_256px_over_0.50mpp`.
    """
    coarse = mpp is not None and mpp != spec.mpp
    name = f"{_mpp_text(mpp if mpp is not None else spec.mpp)}mpp_{spec.tile_px}px"
    if spec.overlap_px:
        name += f"_{spec.overlap_px}overlap"
    return f"{name}_over_{_mpp_text(spec.mpp)}mpp" if coarse else name


def _mpp_text(mpp: float) -> str:
    short = f"{mpp:.2f}"
    return short if float(short) == mpp else repr(mpp)
