from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest

from bagscope.errors import ConfigError
from bagscope.features.encoders import (
    EncoderSpec,
    encoder_specs,
    find_encoder,
    register_encoder,
    registry,
)


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the registry as it was: what a test registers is forgotten after it."""
    encoder_specs()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield


def mine(name: str = "my-vit") -> EncoderSpec:
    return EncoderSpec(name=name, source="bagscope", input_px=32, dimension=4)


def test_a_registered_encoder_is_found() -> None:
    @register_encoder(mine(), mine("my-vit-cls"))
    def build(spec: EncoderSpec, source: object) -> None:
        raise NotImplementedError

    assert find_encoder("my-vit-cls").spec == mine("my-vit-cls")
    assert find_encoder("my-vit").build is build
    assert encoder_specs()["my-vit"] == mine()
    assert list(encoder_specs()) == sorted(encoder_specs())


def test_a_name_is_one_embedding() -> None:
    with pytest.raises(ValueError, match="'uni' is registered already"):
        register_encoder(mine("uni"))(lambda spec, source: None)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("unii", "uni"),
        ("UNI2_H", "uni2-h"),
        ("Virchow 2", "virchow2"),
        ("uni_v1", "uni"),
        ("uni_v2", "uni2-h"),
        ("conch_v15", "conch-v1.5"),
        ("hoptimus1", "h-optimus-1"),
        ("pathology/owkin_phikon", "phikon"),
        ("resnet50", "resnet50-trunc"),
        # TRIDENT's default is the class token alone.
        ("midnight12k", "midnight-12k-cls"),
        ("phikonv2", "phikon-v2"),
    ],
)
def test_the_nearest_name_and_names_of_other_tools_are_suggested(typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"no encoder .* \(did you mean '{meant}'\?\)"):
        find_encoder(typed)


def test_no_synonym_is_a_name_and_none_stands_twice() -> None:
    specs = encoder_specs()
    synonyms = [synonym for spec in specs.values() for synonym in spec.synonyms]
    assert len(set(synonyms)) == len(synonyms)
    assert not set(synonyms) & set(specs)


@pytest.mark.parametrize("name", ["timm:", "local:", "hub:uni", ":", ""])
def test_a_scheme_wants_something_behind_it(name: str) -> None:
    with pytest.raises(ConfigError, match="no encoder"):
        find_encoder(name)


def test_every_family_is_registered() -> None:
    """A family file that nobody lists would silently be missing."""
    folder = Path(registry.__file__).parent
    registering = {
        path.stem for path in folder.glob("*.py") if "import register_encoder" in path.read_text()
    } - {"__init__"}
    assert set(registry.FAMILIES) >= {name for name in registering if name != "color_texture"}


def test_plug_ins_are_loaded_and_a_broken_one_takes_nothing_away(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plug_in = ModuleType("their_encoders")

    class Finder:
        """Registers on import, as the module of a plug-in does."""

        def find_spec(self, name: str, path: object, target: object = None) -> object:
            from importlib.machinery import ModuleSpec

            return ModuleSpec(name, self) if name == "their_encoders" else None

        def create_module(self, spec: object) -> ModuleType:
            return plug_in

        def exec_module(self, module: ModuleType) -> None:
            register_encoder(mine("theirs"))(lambda spec, source: None)

    points = EntryPoints(
        (
            EntryPoint("broken", "no_such_module_anywhere", registry.ENTRY_POINT_GROUP),
            EntryPoint("theirs", "their_encoders", registry.ENTRY_POINT_GROUP),
        )
    )
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    monkeypatch.setattr(registry, "entry_points", lambda group: points.select(group=group))
    monkeypatch.setattr(registry, "_loaded", False)
    monkeypatch.setattr(registry, "FAMILIES", ())
    with caplog.at_level(logging.WARNING):
        assert find_encoder("theirs").spec.name == "theirs"
    assert "no_such_module_anywhere can't be loaded" in caplog.text
    assert find_encoder("uni").spec.name == "uni"
    sys.modules.pop("their_encoders", None)


def test_the_list_of_encoders_needs_no_heavy_import() -> None:
    code = (
        "import sys; from bagscope.features.encoders import encoder_specs; encoder_specs(); "
        "print(sorted({'torch', 'timm', 'transformers', 'open_clip', 'cv2', 'scipy', 'pandas'} "
        "& set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
