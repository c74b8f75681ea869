from __future__ import annotations

import pytest
from pydantic import Field

from bagscope.errors import ConfigError
from bagscope.mil.recipe import TrainSpec
from bagscope.specs import Spec, did_you_mean, parse_spec
from bagscope.wsi.tiling import RoiSpec, TilingSpec, tiling_name


class Inner(Spec):
    colour: str = "red"


class Outer(Spec):
    size: int = Field(3, ge=1)
    inner: Inner = Inner()


def test_an_unknown_option_is_refused_and_the_nearest_named() -> None:
    with pytest.raises(ConfigError, match=r"study\.yaml: unknown option 'siez'.*'size'"):
        parse_spec(Outer, {"siez": 4}, where="study.yaml")
    with pytest.raises(ConfigError, match=r"'inner\.color' \(did you mean 'colour'\?\)"):
        parse_spec(Outer, {"inner": {"color": "blue"}}, where="study.yaml")


def test_every_finding_is_listed_with_its_value() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(Outer, {"size": 0, "inner": {"colour": 7}}, where="here")
    assert "size is 0" in str(caught.value)
    assert "inner.colour is 7" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("balansed", "here: objective.class_weights is 'balansed': input should be 'none' or "),
        ([1, -2], "here: objective.class_weights.1 is -2: "),
    ],
)
def test_an_option_of_two_forms_is_named_as_it_is_written(value: object, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(TrainSpec, {"objective": {"class_weights": value}}, where="here")
    assert str(caught.value).startswith(told)


def test_a_name_like_none_gets_the_list() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == " (known: a, b)"
    assert did_you_mean("zzz", []) == ""


def test_specs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TilingSpec().mpp = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mpp": 0}, "mpp is 0"),
        ({"mpp": -0.5}, "mpp is -0.5"),
        ({"mpp": 250}, "mpp is 250"),
        ({"overlap_px": 256}, "smaller than tile_px 256"),
        ({"coarser_mpp": [1.3]}, "whole multiple"),
        ({"coarser_mpp": [2.0, 1.0]}, "whole multiple"),
        ({"min_tissue": 1.2}, "min_tissue is 1.2"),
        ({"downscale": "lanczos"}, "downscale is 'lanczos'"),
        ({"roi": {"include": []}}, "roi.include is"),
    ],
)
def test_a_tiling_that_makes_no_sense_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_spec(TilingSpec, values, where="x")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "mpp", "name"),
    [
        (TilingSpec(), None, "0.50mpp_256px"),
        (TilingSpec(mpp=0.125, tile_px=512), None, "0.125mpp_512px"),
        (TilingSpec(overlap_px=32), None, "0.50mpp_256px_32overlap"),
        (TilingSpec(coarser_mpp=(2.0,)), 2.0, "2.00mpp_256px_over_0.50mpp"),
        (TilingSpec(coarser_mpp=(2.0,)), 0.5, "0.50mpp_256px"),
    ],
)
def test_tilings_are_named_after_what_they_are(
    spec: TilingSpec, mpp: float | None, name: str
) -> None:
    assert tiling_name(spec, mpp) == name


def test_regions_default_to_every_class() -> None:
    assert RoiSpec().include is None
