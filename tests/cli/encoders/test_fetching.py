"""`encoders fetch`, with a small hub that lies on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from huggingface_hub import errors

from bagscope.features.encoders.loading import load_encoder
from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource, hub_file
from tests.cli.conftest import files_of
from tests.cli.encoders.conftest import (
    COMMIT,
    VIT,
    Command,
    Small,
    build,
    lines,
    put_in_cache,
    refusal,
    refuse,
)


def test_fetched_weights_need_no_network(
    command: Command, downloads: list[str], hub: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    to = tmp_path / "weights"
    ran = command("fetch", "hub-vit", "--to", to, "--json")
    assert ran.code == 0
    shutil.rmtree(hub)
    refuse(monkeypatch, AssertionError("the network was touched"))
    source = WeightSource(folder=to)
    assert hub_file(VIT, source) == to / "hub-vit" / "pytorch_model.bin"
    loaded = load_encoder("hub-vit", source=source)
    assert loaded.network.state_dict()["weight"].tolist() == [2.0, 2.0, 2.0]
    assert command("check", "hub-vit", "--weights", to).code == 0

    stored = json.loads((to / "hub-vit" / "encoder.json").read_text())
    assert stored.pop("commit") == COMMIT
    assert EncoderSpec(**stored) == VIT
    (done,) = lines(ran)
    for name, digest in done["sha256"].items():
        content = (to / "hub-vit" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
    sums = dict(
        reversed(line.split("  ")) for line in (to / "hub-vit/SHA256SUMS").read_text().splitlines()
    )
    assert sums == {k: v for k, v in done["sha256"].items() if k != "SHA256SUMS"}
    assert set(sums) == {"encoder.json", "pytorch_model.bin"}
    assert not list(to.rglob("*.tmp"))


def test_fetching_again_keeps_what_is_whole_and_mends_what_is_not(
    command: Command, downloads: list[str], tmp_path: Path
) -> None:
    to = tmp_path / "weights"
    command("fetch", "hub-vit", "--to", to)
    before = files_of(to)
    downloads.clear()
    ran = command("fetch", "hub-vit", "--to", to)
    assert ran.code == 0
    assert "is there already" in ran.out
    assert downloads == []
    assert files_of(to) == before
    (to / "hub-vit" / "pytorch_model.bin").write_bytes(b"damaged")
    assert command("fetch", "hub-vit", "--to", to).code == 0
    assert files_of(to) == before


def test_weights_fetched_for_another_spec_are_kept_unless_told(
    command: Command, downloads: list[str], tmp_path: Path, known: dict[str, Registered]
) -> None:
    to = tmp_path / "weights"
    command("fetch", "hub-vit", "--to", to)
    before = files_of(to)
    spec = VIT.model_copy(update={"resize_px": 18})
    known["hub-vit"] = Registered(spec=spec, build=build)
    ran = command("fetch", "hub-vit", "--to", to)
    assert ran.code == 2
    assert "encoder.resize_px is null, asked for 18" in ran.err
    assert files_of(to) == before
    assert command("fetch", "hub-vit", "--to", to, "--overwrite").code == 0
    assert files_of(to) != before


def test_a_file_in_a_subfolder_of_a_data_set_keeps_its_place(
    command: Command, hub: Path, known: dict[str, Registered], tmp_path: Path, monkeypatch: Any
) -> None:
    name = "models/vit/weights.pth"
    spec = VIT.model_copy(update={"hub_id": "datasets/lab/vit", "weights_file": name})
    known["hub-vit"] = Registered(spec=spec, build=build)
    folder = hub.with_name("datasets--lab--vit")

    def download(repository: str, file: str, *, revision: None, repo_type: str) -> str:
        assert (repository, file, repo_type) == ("lab/vit", name, "dataset")
        return str(put_in_cache(folder, name))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", Mock())
    assert command("fetch", "hub-vit", "--to", tmp_path / "w").code == 0
    assert (tmp_path / "w" / "hub-vit" / name).is_file()
    assert json.loads((tmp_path / "w/hub-vit/encoder.json").read_text())["commit"] == COMMIT
    for options in ([], ["--weights", tmp_path / "w"]):
        (found,) = lines(command("check", "hub-vit", "--json", *options))
        assert (found["weights"], found["usable"]) == ("folder" if options else "cache", True)


def test_remote_code_is_fetched_as_a_whole_and_not_run(
    command: Command, hub: Path, known: dict[str, Registered], tmp_path: Path, monkeypatch: Any
) -> None:
    spec = VIT.model_copy(update={"source": "remote-code"})
    known["hub-vit"] = Registered(spec=spec, build=lambda spec, source: Small())
    snapshot = put_in_cache(hub).parent
    (snapshot / "model.py").write_text("raise SystemExit\n")
    assert command("check", "hub-vit", "--trust-remote-code").code == 1  # there is no config yet
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    to = tmp_path / "weights"
    assert command("fetch", "hub-vit", "--to", to).code == 0
    names = {path.name for path in (to / "hub-vit").iterdir()}
    assert {"model.py", "config.json", "pytorch_model.bin", "encoder.json"} <= names
    ran = command("check", "hub-vit", "--weights", to, "--json")
    assert ran.code == 1
    assert "--trust-remote-code" in lines(ran)[0]["problem"]
    ran = command("check", "hub-vit", "--weights", to, "--trust-remote-code", "--json")
    assert (ran.code, lines(ran)[0]["weights"]) == (0, "folder")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("no-weights", "it has no weights"),
        ("in-package", "its weights come in the package numpy, to be installed with pip"),
    ],
)
def test_what_needs_no_fetching_says_so(
    command: Command, tmp_path: Path, name: str, why: str
) -> None:
    ran = command("fetch", name, "--to", tmp_path / "weights")
    assert ran.code == 0
    assert ran.out.strip() == f"encoder {name} needs no fetching: {why}"
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            refusal(errors.GatedRepoError),
            "access to its weights must be granted; ask for it at https://huggingface.co/lab/vit",
        ),
        (refusal(errors.RepositoryNotFoundError), "does not exist or needs a login"),
        (refusal(errors.RemoteEntryNotFoundError), "holds none of model.safetensors"),
        (OSError("no route"), "https://huggingface.co/lab/vit can't be reached (no route)"),
        (refusal(errors.HfHubHTTPError), "https://huggingface.co/lab/vit could not be read"),
    ],
)
def test_what_can_not_be_fetched_is_one_sentence(
    command: Command, tmp_path: Path, monkeypatch: Any, error: Exception, sentence: str
) -> None:
    refuse(monkeypatch, error)
    ran = command("fetch", "hub-vit", "--to", tmp_path / "weights")
    assert ran.code == 1
    assert ran.err.startswith("encoder hub-vit: ")
    assert sentence in ran.err
    assert "\n" not in ran.err
    assert not (tmp_path / "weights").exists()


def test_a_checkpoint_that_no_hub_has_is_asked_of_the_user(
    command: Command, known: dict[str, Registered], tmp_path: Path
) -> None:
    spec = VIT.model_copy(update={"hub_id": None, "weights_file": "vit.pth"})
    known["hub-vit"] = Registered(spec=spec, build=build)
    ran = command("fetch", "hub-vit", "--to", tmp_path / "weights")
    assert ran.code == 1
    assert "get vit.pth from https://huggingface.co/lab/vit, put it at DIR/hub-vit" in ran.err


def test_weights_that_only_a_builder_knows_can_not_be_fetched(
    command: Command, known: dict[str, Registered], tmp_path: Path
) -> None:
    spec = VIT.model_copy(update={"hub_id": None})
    known["hub-vit"] = Registered(spec=spec, build=build)
    ran = command("fetch", "hub-vit", "--to", tmp_path / "weights")
    assert ran.code == 1
    assert "states neither hub_id nor weights_file" in ran.err


def test_a_name_that_stands_for_another_is_run_under_itself(
    command: Command, known: dict[str, Registered], monkeypatch: Any
) -> None:
    # As local:PATH does, whose spec is named after the last part of the path.
    known["longer/no-weights"] = known.pop("no-weights")
    (found,) = lines(command("check", "longer/no-weights", "--json"))
    assert (found["name"], found["usable"]) == ("no-weights", True)
    assert "--encoder longer/no-weights" in command("show", "longer/no-weights").out


def test_a_folder_of_somebody_else_is_left_alone(
    command: Command, downloads: list[str], tmp_path: Path
) -> None:
    (tmp_path / "weights" / "hub-vit").mkdir(parents=True)
    mine = tmp_path / "weights" / "hub-vit" / "mine.txt"
    mine.write_text("mine")
    ran = command("fetch", "hub-vit", "--to", tmp_path / "weights", "--overwrite")
    assert ran.code == 1
    assert "did not put there" in ran.err
    assert files_of(tmp_path / "weights") == {"hub-vit/mine.txt": b"mine"}


def test_a_full_disk_leaves_nothing_behind(
    command: Command, downloads: list[str], tmp_path: Path, monkeypatch: Any
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shutil, "copyfile", Mock(side_effect=full))
    ran = command("fetch", "hub-vit", "--to", tmp_path / "weights")
    assert ran.code == 1
    assert "No space left on device" in ran.err
    assert not list((tmp_path / "weights").iterdir())
