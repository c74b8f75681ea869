"""Micrometres per pixel: where a slide states it, what is believed, and what is refused.

Sources, in this order: an override by the user, OpenSlide's normalised properties, the vendor's
own keys, OME metadata, the TIFF resolution with a unit. The objective power says how a slide was
looked at and not how finely it was sampled, so it serves only on request and is marked estimated.

A pixel size outside 0.08-25 µm is not a microscope's: the range stops millimetres taken for
micrometres, tenfold slips, and the 72 or 96 dpi that image writers leave behind. The pixel
density of PNG and JPEG files is never looked at; it is about printing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bagscope.errors import SpacingError
from bagscope.wsi.slide import SlideInfo, Spacing

MPP_MIN = 0.08
MPP_MAX = 25.0
ANISOTROPY_TOLERANCE = 0.01
CONFLICT_TOLERANCE = 0.02
UM_X_OBJECTIVE = 10.0
"""Micrometres per pixel times objective power, as most scanners sample: 0.25 at 40, 0.5 at 20."""
_OBJECTIVE_CONFLICT = 1.8

_UM_PER_UNIT: Mapping[str, float] = {
    "m": 1e6,
    "cm": 1e4,
    "centimeter": 1e4,
    "centimetre": 1e4,
    "mm": 1e3,
    "millimeter": 1e3,
    "millimetre": 1e3,
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micron": 1.0,
    "micrometer": 1.0,
    "micrometre": 1.0,
    "nm": 1e-3,
    "nanometer": 1e-3,
    "nanometre": 1e-3,
    "inch": 25400.0,
    "in": 25400.0,
    "meter": 1e6,
    "metre": 1e6,
}

_Pair = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class SpacingFinding:
    """What was found: a spacing, or a sentence saying why there is none, and warnings."""

    spacing: Spacing | None
    problem: str = ""
    warnings: tuple[str, ...] = ()


def find_spacing(
    properties: Mapping[str, str],
    *,
    override_mpp: float | None = None,
    allow_estimated: bool = False,
) -> SpacingFinding:
    """Decide on a slide's pixel size from its properties.

    Args:
        properties: as OpenSlide names them; backends of other formats use the same names, and
            `ome.PhysicalSizeX`, `ome.PhysicalSizeXUnit` and their Y counterparts.
        override_mpp: micrometres per level-0 pixel, stated by the user.
        allow_estimated: derive the size from the objective power where nothing states it.

    Raises:
        SpacingError: the override is no believable pixel size.
    """
    if override_mpp is not None and not _is_believable(override_mpp):
        raise SpacingError(
            f"mpp {override_mpp:g} is not a believable pixel size ({MPP_MIN:g} to {MPP_MAX:g} µm); "
            "give micrometres per level-0 pixel, e.g. 0.25"
        )
    stated: list[tuple[str, _Pair]] = []
    rejected: list[str] = []
    for source, read in _SOURCES:
        pair = read(properties)
        if pair is None:
            continue
        if _is_believable(pair[0]) and _is_believable(pair[1]):
            stated.append((source, pair))
        else:
            rejected.append(
                f"{source} gives {pair[0]:.4g} µm per pixel, "
                f"outside {MPP_MIN:g} to {MPP_MAX:g}; it was ignored"
            )
    objective = objective_power(properties)
    if override_mpp is not None:
        chosen = Spacing(mpp_x=override_mpp, mpp_y=override_mpp, source="override")
    elif stated:
        source, (mpp_x, mpp_y) = stated[0]
        chosen = Spacing(mpp_x=mpp_x, mpp_y=mpp_y, source=source)
    elif allow_estimated and objective is not None and _is_believable(UM_X_OBJECTIVE / objective):
        mpp = UM_X_OBJECTIVE / objective
        chosen = Spacing(mpp_x=mpp, mpp_y=mpp, source="objective-power", estimated=True)
    else:
        return SpacingFinding(spacing=None, problem=_refusal(rejected, objective))
    return SpacingFinding(spacing=chosen, warnings=(*_doubts(chosen, stated, objective), *rejected))


def require_spacing(info: SlideInfo) -> Spacing:
    """Return a slide's spacing.

    Raises:
        SpacingError: it states none that can be believed; says where was looked.
    """
    if info.spacing is None:
        raise SpacingError(f"{info.path.name}: {info.spacing_problem}")
    return info.spacing


def objective_power(properties: Mapping[str, str]) -> float | None:
    """Return the objective's nominal power, where the slide states one."""
    for key in ("openslide.objective-power", "aperio.AppMag", "ome.NominalMagnification"):
        power = _number(properties.get(key))
        if power is not None and power > 0:
            return power
    return None


def um_per_unit(unit: str) -> float | None:
    """Return the micrometres in a unit of length, or None where the unit is unknown."""
    return _UM_PER_UNIT.get(unit.strip().lower()) if unit.strip() != "Mm" else None


# --- one reader per source ------------------------------------------------------------------


def _from_keys(key_x: str, key_y: str) -> Callable[[Mapping[str, str]], _Pair | None]:
    def read(properties: Mapping[str, str]) -> _Pair | None:
        mpp_x, mpp_y = _number(properties.get(key_x)), _number(properties.get(key_y))
        return _pair(mpp_x, mpp_y)

    return read


def _from_philips(properties: Mapping[str, str]) -> _Pair | None:
    """Read DICOM's row and column spacing in millimetres, e.g. '"0.000226891" "0.000226907"'."""
    numbers = re.findall(r"[\d.eE+-]+", properties.get("philips.DICOM_PIXEL_SPACING", ""))
    if len(numbers) != 2:
        return None
    row_mm, column_mm = _number(numbers[0]), _number(numbers[1])
    if row_mm is None or column_mm is None:
        return None
    return column_mm * 1e3, row_mm * 1e3


def _from_resolution(prefix: str) -> Callable[[Mapping[str, str]], _Pair | None]:
    """Return a reader of pixels per unit; without a unit the number says nothing."""

    def read(properties: Mapping[str, str]) -> _Pair | None:
        unit_um = um_per_unit(properties.get(f"{prefix}.ResolutionUnit", ""))
        per_x = _number(properties.get(f"{prefix}.XResolution"))
        per_y = _number(properties.get(f"{prefix}.YResolution"))
        # A resolution of one pixel per unit is what writers put where they know nothing.
        if unit_um is None or any(per is not None and per <= 1 for per in (per_x, per_y)):
            return None
        return _pair(per_x and unit_um / per_x, per_y and unit_um / per_y)

    return read


def _from_ome(properties: Mapping[str, str]) -> _Pair | None:
    def axis(name: str) -> float | None:
        size = _number(properties.get(f"ome.PhysicalSize{name}"))
        # The OME model defaults to micrometres where the unit is left out.
        unit_um = um_per_unit(properties.get(f"ome.PhysicalSize{name}Unit", "µm"))
        return None if size is None or unit_um is None else size * unit_um

    return _pair(axis("X"), axis("Y"))


_MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL"
_SOURCES: tuple[tuple[str, Callable[[Mapping[str, str]], _Pair | None]], ...] = (
    ("openslide.mpp-x", _from_keys("openslide.mpp-x", "openslide.mpp-y")),
    ("aperio.MPP", _from_keys("aperio.MPP", "aperio.MPP")),
    (f"{_MIRAX}_X", _from_keys(f"{_MIRAX}_X", f"{_MIRAX}_Y")),
    ("ventana.ScanRes", _from_keys("ventana.ScanRes", "ventana.ScanRes")),
    ("philips.DICOM_PIXEL_SPACING", _from_philips),
    ("hamamatsu.XResolution", _from_resolution("hamamatsu")),
    ("ome.PhysicalSizeX", _from_ome),
    ("tiff.XResolution", _from_resolution("tiff")),
)


# --- doubts and refusals --------------------------------------------------------------------


def _doubts(chosen: Spacing, stated: list[tuple[str, _Pair]], objective: float | None) -> list[str]:
    doubts = []
    if abs(chosen.mpp_x - chosen.mpp_y) > ANISOTROPY_TOLERANCE * min(chosen.mpp_x, chosen.mpp_y):
        doubts.append(
            f"pixels are not square: {chosen.mpp_x:.4g} × {chosen.mpp_y:.4g} µm; "
            f"their mean {chosen.mpp:.4g} is used"
        )
    for source, (mpp_x, mpp_y) in stated:
        mpp = (mpp_x + mpp_y) / 2
        if abs(mpp - chosen.mpp) > CONFLICT_TOLERANCE * chosen.mpp:
            doubts.append(
                f"{source} gives {mpp:.4g} µm per pixel, but {chosen.source} gives "
                f"{chosen.mpp:.4g}, which is used"
            )
    if objective is not None and not chosen.estimated:
        nominal = UM_X_OBJECTIVE / objective
        if max(nominal / chosen.mpp, chosen.mpp / nominal) > _OBJECTIVE_CONFLICT:
            doubts.append(
                f"{chosen.mpp:.4g} µm per pixel ({chosen.source}) is unusual for an objective "
                f"of {objective:g}×, which mostly samples {nominal:.4g}"
            )
    return doubts


def _refusal(rejected: list[str], objective: float | None) -> str:
    looked_at = ", ".join(source for source, _ in _SOURCES)
    reasons = f"; {'; '.join(rejected)}" if rejected else ""
    remedy = "pass --mpp, or add an mpp column"
    if objective is not None:
        remedy += (
            f" (the objective of {objective:g}× suggests {UM_X_OBJECTIVE / objective:g}; "
            "--allow-estimated-mpp accepts that)"
        )
    return f"no pixel size (looked at {looked_at}{reasons}); {remedy}"


def _pair(x: float | None, y: float | None) -> _Pair | None:
    """Return both axes; where only one is stated, pixels are taken to be square."""
    if x is None and y is None:
        return None
    return (x if x is not None else y, y if y is not None else x)  # type: ignore[return-value]


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = float(text.strip().replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_believable(mpp: float) -> bool:
    return MPP_MIN <= mpp <= MPP_MAX
