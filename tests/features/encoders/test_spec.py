from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagscope.artifacts import canonical_json
from bagscope.errors import ConfigError
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.specs import parse_spec


def spec_of(**changes: Any) -> EncoderSpec:
    values: dict[str, Any] = {"name": "vit", "source": "timm", "input_px": 224, "dimension": 8}
    return parse_spec(EncoderSpec, values | changes, where="here")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_px", 256),
        ("resize_px", 256),
        ("interpolation", "bilinear"),
        ("mean", (0.5, 0.5, 0.5)),
        ("std", (0.5, 0.5, 0.5)),
        ("stain", "macenko"),
        ("pooling", "token+mean"),
        ("prefix_tokens", 5),
        ("normalise", True),
        ("dimension", 9),
        ("dtype", "float16"),
        ("builder_args", {"img_size": 224}),
        ("hub_id", "lab/vit"),
        ("revision", "0123abc"),
        ("name", "vit-cls"),
    ],
)
def test_what_changes_a_vector_is_its_identity(field: str, value: object) -> None:
    changed = spec_of(**{field: value})
    assert changed.identity() != spec_of().identity()
    assert changed != spec_of()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("title", "A"),
        ("synonyms", ("vit1",)),
        ("tile_px", 512),
        ("mpp", 1.0),
        ("licence", "MIT"),
        ("commercial_use", True),
        ("gated", True),
        ("card", "https://example.org"),
        ("run_here", True),
    ],
)
def test_what_people_are_told_is_not(field: str, value: object) -> None:
    assert spec_of(**{field: value}).identity() == spec_of().identity()


def test_the_identity_is_json_and_names_no_folder_of_this_machine() -> None:
    identity = spec_of(weights_file="/home/someone/w.pth", builder_args={"a": [1, "b"]}).identity()
    assert json.loads(canonical_json(identity)) == identity
    assert identity["weights_file"] == "w.pth"
    assert "/home" not in spec_of(weights_file="/home/someone/w.pth").model_dump_json()


def test_a_subfolder_of_the_repository_is_kept() -> None:
    assert spec_of(weights_file="a/b.pth").identity()["weights_file"] == "a/b.pth"


@pytest.mark.parametrize(
    ("name", "stain", "folder"),
    [
        ("uni2-h", "none", "uni2-h"),
        ("timm:vit_tiny.a1", "none", "timm-vit_tiny.a1"),
        ("conch-v1.5", "macenko", "conch-v1.5+macenko"),
        ("local:ab cd/ü", "none", "local-ab-cd"),
    ],
)
def test_folders_are_portable(name: str, stain: str, folder: str) -> None:
    assert spec_of(name=name, stain=stain).folder == folder


@given(st.text(min_size=1, max_size=30))
def test_no_name_leaves_its_folder(name: str) -> None:
    folder = spec_of(name=name).folder
    assert "/" not in folder and "\\" not in folder and not folder.startswith(".")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resize_px": 200}, "resize_px 200 is below input_px 224"),
        ({"source": "package"}, "needs the name of the package"),
        ({"poling": "token"}, "unknown option 'poling' \\(did you mean 'pooling'"),
        ({"input_px": 0}, "input_px is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(**changes)
