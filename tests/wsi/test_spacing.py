"""Which pixel size is believed, in which order, and what is said where none is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.errors import SpacingError
from bagscope.wsi.slide import RectL0, SlideInfo
from bagscope.wsi.spacing import MPP_MAX, MPP_MIN, find_spacing, require_spacing, um_per_unit

BY_RANK = [
    ("openslide.mpp-x", {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, 0.25),
    ("aperio.MPP", {"aperio.MPP": "0.26"}, 0.26),
    (
        "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",
        {
            "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.27",
            "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y": "0.27",
        },
        0.27,
    ),
    ("ventana.ScanRes", {"ventana.ScanRes": "0.28"}, 0.28),
    ("philips.DICOM_PIXEL_SPACING", {"philips.DICOM_PIXEL_SPACING": '"0.00029" "0.00029"'}, 0.29),
    (
        "hamamatsu.XResolution",
        {
            "hamamatsu.XResolution": "40000",
            "hamamatsu.YResolution": "40000",
            "hamamatsu.ResolutionUnit": "centimeter",
        },
        0.25,
    ),
    ("ome.PhysicalSizeX", {"ome.PhysicalSizeX": "310", "ome.PhysicalSizeXUnit": "nm"}, 0.31),
    (
        "tiff.XResolution",
        {
            "tiff.XResolution": "50800",
            "tiff.YResolution": "50800",
            "tiff.ResolutionUnit": "inch",
        },
        0.5,
    ),
]


@pytest.mark.parametrize("rank", range(len(BY_RANK)))
def test_sources_come_in_their_order(rank):
    properties = {k: v for _, stated, _ in BY_RANK[rank:] for k, v in stated.items()}
    found = find_spacing(properties).spacing
    source, _, mpp = BY_RANK[rank]
    assert (found.source, found.estimated) == (source, False)
    assert found.mpp == pytest.approx(mpp)


def test_an_override_wins_and_the_conflict_is_said():
    found = find_spacing({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}, override_mpp=0.5)
    assert (found.spacing.mpp, found.spacing.source) == (0.5, "override")
    (warning,) = found.warnings
    assert "0.25" in warning and "0.5" in warning


def test_agreeing_sources_raise_no_warning():
    assert find_spacing({"openslide.mpp-x": "0.25", "aperio.MPP": "0.2501"}).warnings == ()


@pytest.mark.parametrize("mpp", [0, -0.25, 250, float("nan"), float("inf"), 0.0799, 25.1])
def test_an_unbelievable_override_is_refused(mpp):
    with pytest.raises(SpacingError, match=r"not a believable pixel size.*micrometres"):
        find_spacing({}, override_mpp=mpp)


@given(mpp=st.floats(MPP_MIN, MPP_MAX))
def test_every_believable_override_is_taken_as_it_is(mpp):
    assert find_spacing({}, override_mpp=mpp).spacing.mpp_x == mpp


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_no_stated_number_gets_past_the_range(value):
    found = find_spacing({"openslide.mpp-x": repr(value)}).spacing
    assert found is None or MPP_MIN <= found.mpp_x <= MPP_MAX


@pytest.mark.parametrize(("dpi", "um"), [("72", "352.8"), ("96", "264.6")])
def test_a_screen_resolution_is_ignored_and_said(dpi, um):
    properties = {"tiff.XResolution": dpi, "tiff.ResolutionUnit": "inch"}
    found = find_spacing(properties)
    assert found.spacing is None
    assert um in found.problem and "--mpp" in found.problem
    found = find_spacing({**properties, "aperio.MPP": "0.5"})
    assert found.spacing.source == "aperio.MPP"
    assert um in found.warnings[0]


def test_a_resolution_without_a_unit_says_nothing():
    assert find_spacing({"tiff.XResolution": "40000"}).spacing is None
    assert (
        find_spacing({"tiff.XResolution": "40000", "tiff.ResolutionUnit": "none"}).spacing is None
    )


def test_pixels_that_are_not_square_are_said():
    found = find_spacing({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"})
    assert found.spacing.mpp == pytest.approx(0.255)
    assert "not square" in found.warnings[0]
    assert not find_spacing({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.252"}).warnings


def test_philips_states_rows_before_columns_in_millimetres():
    found = find_spacing({"philips.DICOM_PIXEL_SPACING": '"0.000226907" "0.000226891"'}).spacing
    assert (found.mpp_x, found.mpp_y) == pytest.approx((0.226891, 0.226907))


def test_the_objective_serves_only_on_request_and_is_marked():
    properties = {"openslide.objective-power": "40"}
    refused = find_spacing(properties)
    assert refused.spacing is None
    assert "--allow-estimated-mpp" in refused.problem
    found = find_spacing(properties, allow_estimated=True).spacing
    assert (found.mpp, found.source, found.estimated) == (0.25, "objective-power", True)
    stated = find_spacing({**properties, "openslide.mpp-x": "0.23"}, allow_estimated=True).spacing
    assert (stated.source, stated.estimated) == ("openslide.mpp-x", False)


def test_an_objective_that_contradicts_the_pixel_size_is_said():
    found = find_spacing({"openslide.mpp-x": "0.25", "openslide.objective-power": "10"})
    assert "unusual for an objective of 10" in found.warnings[0]
    assert not find_spacing({"openslide.mpp-x": "0.32", "openslide.objective-power": "20"}).warnings


@pytest.mark.parametrize(
    ("unit", "um"), [("µm", 1), ("um", 1), ("nm", 1e-3), ("mm", 1e3), ("cm", 1e4), ("pixel", None)]
)
def test_units_of_length(unit, um):
    assert um_per_unit(unit) == um


def test_the_refusal_names_the_file_and_where_was_looked():
    info = SlideInfo(
        path=Path("a.svs"),
        format="aperio",
        backend="openslide",
        width_l0=1,
        height_l0=1,
        levels=(),
        bounds_l0=RectL0(x_l0=0, y_l0=0, width_l0=1, height_l0=1),
        spacing=None,
        spacing_problem=find_spacing({}).problem,
    )
    with pytest.raises(SpacingError, match=r"a\.svs: no pixel size \(looked at openslide\.mpp-x"):
        require_spacing(info)
