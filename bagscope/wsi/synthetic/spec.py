"""What a synthetic slide is asked to be, and what is known of it afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bagscope.wsi.synthetic.jpeg_tiles import Subsampling

Stain = Literal["he", "dab"]
Background = Literal["white", "grey", "black"]
PenColour = Literal["red", "green", "blue", "black"]

MAX_TUMOR_FRACTION = 0.6


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticSpec:
    """A synthetic slide, down to its last byte: equal specs make equal files.

    The layout is drawn in micrometres, so that one seed and one physical size scanned at another
    `mpp` show the same field.

    Attributes:
        width_px, height_px: of level 0.
        mpp: micrometres per level-0 pixel.
        objective: objective power that the file states, or None.
        seed: of everything drawn.
        tissue_fraction: part of the slide that is tissue.
        tumor_fraction: part of the tissue area that is tumour.
        variety: how far slides differ in their shares of fat, glands and lymphocytes; 1 as slides
            of one organ, 3 at most.
        site: whose stain and scanner; 0 and 1 are fixed, further ones are drawn from the number.
        stain: haematoxylin with eosin, or with DAB.
        background: of the glass; "black" leaves white glass around the tissue, as scanners do that
            scan only where they found something.
        subsampling: chroma storage of the JPEG tiles.
        quality: libjpeg quality, 1 to 100.
        tile_px: edge of the stored tiles, a multiple of 16.
        downsamples: of the levels, 1 first, each a whole multiple of the one before.
        bigtiff: write a BigTIFF even where a classic TIFF would do.
        pen: colours of the marker strokes to draw.
        blur: how many out-of-focus regions.
        folds: how many tissue folds.
        bubbles: how many air bubbles.
        state_mpp: whether the file states its pixel size.
        label_and_macro: whether the file carries these two associated images.
        missing_tiles: how many level-0 tiles have a byte count of zero.
        corrupt_tiles: how many level-0 tiles hold garbage.
        truncated: keep only this part of the file's bytes, or None.

    Raises:
        ValueError: a value that no slide can have.
    """

    width_px: int = 8000
    height_px: int = 8000
    mpp: float = 0.25
    objective: float | None = 40
    seed: int = 0
    tissue_fraction: float = 0.4
    tumor_fraction: float = 0.0
    variety: float = 1.0
    site: int = 0
    stain: Stain = "he"
    background: Background = "white"
    subsampling: Subsampling = "4:2:2"
    quality: int = 80
    tile_px: int = 256
    downsamples: tuple[int, ...] = (1, 4, 16)
    bigtiff: bool = False
    pen: tuple[PenColour, ...] = ()
    blur: int = 0
    folds: int = 0
    bubbles: int = 0
    state_mpp: bool = True
    label_and_macro: bool = True
    missing_tiles: int = 0
    corrupt_tiles: int = 0
    truncated: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that no slide can have."""
        if min(self.width_px, self.height_px) < 256:
            raise ValueError(
                f"a slide of {self.width_px} × {self.height_px} px is too small; use at least 256"
            )
        if not 0.08 <= self.mpp <= 2:
            raise ValueError(f"mpp is {self.mpp}; synthetic tissue is drawn at 0.08 to 2 µm")
        if not 0 <= self.tumor_fraction <= MAX_TUMOR_FRACTION:
            raise ValueError(
                f"tumor_fraction is {self.tumor_fraction}; use 0 to {MAX_TUMOR_FRACTION}"
            )
        if not 0.02 <= self.tissue_fraction <= 0.8:
            raise ValueError(f"tissue_fraction is {self.tissue_fraction}; use 0.02 to 0.8")
        if not 1 <= self.variety <= 3:
            raise ValueError(f"variety is {self.variety}; use 1 to 3")
        if self.truncated is not None and not 0 <= self.truncated < 1:
            raise ValueError(f"truncated is {self.truncated}; use a part of the file, 0 to 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticTruth:
    """What is known of a synthetic slide.

    Attributes:
        slide: the SVS.
        mask: grey PNG beside it: `TISSUE_GREY` for tissue, `TUMOR_GREY` for tumour, 0 elsewhere.
            Tissue is what lies inside the fragments' outlines: fat cells and gland lumens too.
        mask_downsample: level-0 pixels per mask pixel.
        mask_mpp: micrometres per mask pixel.
        geojson: outlines of the tumour regions in level-0 pixels, as QuPath reads them.
        tissue_area_um2, tumor_area_um2: by the mask.
    """

    slide: Path
    mask: Path
    mask_downsample: int
    mask_mpp: float
    geojson: Path
    tissue_area_um2: float
    tumor_area_um2: float

    @property
    def tumor_fraction(self) -> float:
        """Return the part of the tissue area that is tumour."""
        return self.tumor_area_um2 / self.tissue_area_um2 if self.tissue_area_um2 else 0.0


TISSUE_GREY = 128
TUMOR_GREY = 255
