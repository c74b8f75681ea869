"""`encoders list|show|check|fetch`, with a small hub that lies on disk."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from torch import nn
from typer.testing import CliRunner

from bagscope.cli.encoders import encoders
from bagscope.errors import BagscopeError, ConfigError, FingerprintMismatch
from bagscope.features.encoders import registry
from bagscope.features.encoders.loading import load_encoder
from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.encoders.weights import WeightSource, hub_file, read_state_dict
from tests.cli.conftest import Ran, files_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Command = Callable[..., Ran]
VIT = EncoderSpec(
    name="hub-vit",
    title="A small network",
    source="timm",
    hub_id="lab/vit",
    input_px=16,
    tile_px=20,
    mpp=0.25,
    dimension=3,
    licence="CC0",
    commercial_use=True,
    gated=True,
    card="https://huggingface.co/lab/vit",
)
BUILT_IN = VIT.model_copy(
    update={"name": "no-weights", "source": "bagscope", "hub_id": None, "card": "", "gated": False}
)
PACKAGED = BUILT_IN.model_copy(
    update={"name": "in-package", "card": "https://pypi.org/project/numpy/"}
)
FOREIGN = VIT.model_copy(
    update={"name": "foreign", "source": "package", "package": "nowhere", "architecture": "nowhere"}
)


class Small(nn.Module):
    """(B, 3, h, w) → (B, 3): a weighted mean colour."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) * self.weight


def build(spec: EncoderSpec, source: WeightSource) -> nn.Module:
    network = Small()
    if spec.hub_id is not None:
        network.load_state_dict(read_state_dict(hub_file(spec, source), what=spec.name))
    return network


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, Registered]:
    """Replace the registered encoders by four small ones."""
    specs = (VIT, BUILT_IN, PACKAGED, FOREIGN)
    known = {spec.name: Registered(spec=spec, build=build) for spec in specs}
    monkeypatch.setattr(registry, "_registered", known)
    monkeypatch.setattr(registry, "_loaded", True)
    return known


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give every test an empty cache and no connection; return the cache's folder of lab/vit."""

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    from_cache = partial(huggingface_hub.hf_hub_download, local_files_only=True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", from_cache)
    return tmp_path / "hub" / "models--lab--vit"


def put_in_cache(hub: Path, name: str = "pytorch_model.bin", weight: float = 2.0) -> Path:
    """Lay weights into the cache as the hub's client does."""
    path = hub / "snapshots" / COMMIT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weight": torch.full((3,), weight)}, path)
    (hub / "refs").mkdir(exist_ok=True)
    (hub / "refs" / "main").write_text(COMMIT)
    return path


@pytest.fixture
def downloads(hub: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the hub hold `pytorch_model.bin` for whoever asks; return the names asked for."""
    asked: list[str] = []

    def download(repository: str, name: str, **options: object) -> str:
        assert repository == "lab/vit"
        asked.append(name)
        if name != "pytorch_model.bin":
            raise refusal(errors.RemoteEntryNotFoundError)
        return str(put_in_cache(hub))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", Mock())
    return asked


def refusal(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("no", response=Mock(headers={}))


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    for name in ("get_hf_file_metadata", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, name, Mock(side_effect=error))


@pytest.fixture
def command() -> Command:
    """Run `bagscope encoders ...` in this process, as `main` would."""

    def run(*arguments: object) -> Ran:
        result = CliRunner().invoke(encoders, [str(argument) for argument in arguments])
        if isinstance(result.exception, BagscopeError):
            usage = isinstance(result.exception, ConfigError | FingerprintMismatch)
            return Ran(2 if usage else 1, result.stdout, f"{result.stderr}{result.exception}")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


def lines(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.out.splitlines()]


# --- list, show ---------------------------------------------------------------------------------


def test_the_list_is_a_table(command: Command) -> None:
    ran = command("list")
    assert ran.code == 0
    row = next(line.split() for line in ran.out.splitlines() if "hub-vit" in line)
    assert row == ["hub-vit", "3", "20", "px", "@", "0.25", "CC0", "yes", "yes", "native"]
    assert "package nowhere" in ran.out
    assert "4 encoders" in ran.out


def test_the_list_is_for_programs_too(command: Command, known: dict[str, Registered]) -> None:
    rows = lines(command("list", "--json"))
    assert [row["name"] for row in rows] == sorted(known)
    assert {row["name"]: row["source"] for row in rows}["foreign"] == "package nowhere"


def test_one_encoder_is_shown_whole(command: Command) -> None:
    ran = command("show", "hub-vit")
    assert ran.code == 0
    for text in ("lab/vit", "CC0", "https://huggingface.co/lab/vit", "0.25", "A small network"):
        assert text in ran.out
    assert "bagscope extract STUDY --encoder hub-vit" in ran.out
    assert "ask for access at https://huggingface.co/lab/vit" in ran.out
    (page,) = lines(command("show", "hub-vit", "--json"))
    assert EncoderSpec(**page["facts"]) == VIT
    assert set(page["meanings"]) == set(EncoderSpec.model_fields)


@pytest.mark.parametrize("verb", [["show"], ["check"], ["fetch", "--to", "there"]])
def test_a_misspelt_name_gets_the_nearest(command: Command, verb: list[str]) -> None:
    ran = command(*verb, "hub_vitt")
    assert ran.code == 2
    assert "did you mean 'hub-vit'?" in ran.err


# --- check --------------------------------------------------------------------------------------


def test_weights_at_hand_run_one_tile(command: Command, hub: Path) -> None:
    put_in_cache(hub)
    ran = command("check", "hub-vit", "--json")
    assert ran.code == 0
    (found,) = lines(ran)
    assert found["weights"] == "cache"
    assert found["works_offline"]
    assert found["usable"]
    assert found["seconds"] > 0
    assert "in the cache" in command("check", "hub-vit").out


@pytest.mark.parametrize("name", ["no-weights", "in-package"])
def test_what_needs_no_download_runs_too(command: Command, name: str) -> None:
    (found,) = lines(command("check", name, "--json"))
    assert found["usable"]
    assert found["works_offline"]
    assert found["seconds"] > 0


def test_weights_of_the_given_folder_run(command: Command, tmp_path: Path) -> None:
    path = put_in_cache(tmp_path / "elsewhere")
    (tmp_path / "weights" / "hub-vit").mkdir(parents=True)
    path.rename(tmp_path / "weights" / "hub-vit" / path.name)
    ran = command("check", "hub-vit", "--weights", tmp_path / "weights", "--json")
    assert (ran.code, lines(ran)[0]["weights"]) == (0, "folder")


def test_what_can_be_downloaded_is_usable_but_not_offline(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: None)
    ran = command("check", "hub-vit", "--json")
    (found,) = lines(ran)
    assert ran.code == 0
    assert found["granted"]
    assert not found["works_offline"]
    assert found["seconds"] is None
    assert "to download" in command("check", "hub-vit").out


def test_a_gated_encoder_says_where_to_ask(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, refusal(errors.GatedRepoError))
    ran = command("check", "hub-vit", "no-weights")
    assert ran.code == 1
    flat = " ".join(ran.out.split())
    assert "ask at https://huggingface.co/lab/vit" in flat
    assert "1 of 2 can be used here, 1 without a connection" in flat


@pytest.mark.parametrize(
    ("vectors", "sentence"),
    [
        (lambda v: v[:, :2], "gave (1, 2) for one tile, expected (1, 3)"),
        (lambda v: v * float("nan"), "gave a vector that is not finite"),
        (lambda v: v @ torch.ones(7), "can't run one tile ("),
    ],
)
def test_what_a_network_does_wrong_is_found(
    command: Command,
    hub: Path,
    known: dict[str, Registered],
    vectors: Callable[[torch.Tensor], torch.Tensor],
    sentence: str,
) -> None:
    class Wrong(Small):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return vectors(super().forward(x))

    put_in_cache(hub)
    known["hub-vit"] = replace(known["hub-vit"], build=lambda spec, source: Wrong())
    ran = command("check", "hub-vit", "--json")
    (found,) = lines(ran)
    assert ran.code == 1
    assert found["problem"].startswith(f"encoder hub-vit: {sentence}")
    assert "\n" not in found["problem"]
    assert not found["works_offline"]


def test_a_truncated_checkpoint_is_found(command: Command, hub: Path) -> None:
    path = put_in_cache(hub)
    path.write_bytes(path.read_bytes()[:100])
    ran = command("check", "hub-vit", "--json")
    assert ran.code == 1
    assert "can't be read as weights" in lines(ran)[0]["problem"]


def test_without_names_all_are_looked_at_and_none_is_run(
    command: Command,
    hub: Path,
    known: dict[str, Registered],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", asked)
    for name in ("another", "third"):
        spec = VIT.model_copy(update={"name": name, "hub_id": f"lab/{name}"})
        known[name] = Registered(spec=spec, build=build)
    for name, registered in list(known.items()):
        known[name] = replace(registered, build=lambda spec, source: pytest.fail("was built"))
    put_in_cache(hub)
    ran = command("check", "--json")
    assert ran.code == 0
    found = {row["name"]: row for row in lines(ran)}
    assert set(found) == set(known)
    assert all(row["seconds"] is None for row in found.values())
    assert {name for name, row in found.items() if row["works_offline"]} == {
        "hub-vit",
        "in-package",
        "no-weights",
    }
    assert "pip install 'nowhere'" in found["foreign"]["problem"]
    assert "no route to host" in found["third"]["problem"]
    said = " ".join(command("check").out.split())
    assert said.count("(no route to host); on a machine with a connection run") == 1
    assert asked.call_count == 2  # an unreachable hub is not asked for every encoder


# --- fetch --------------------------------------------------------------------------------------


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


# --- light --------------------------------------------------------------------------------------

HEAVY = ("torch", "timm", "transformers", "scipy", "cv2", "pandas", "huggingface_hub.hf_api")


@pytest.mark.parametrize(
    "arguments",
    [["list"], ["--help"], *([verb, "--help"] for verb in ("list", "show", "check", "fetch"))],
    ids=" ".join,
)
def test_lists_and_help_import_nothing_heavy(arguments: list[str]) -> None:
    script = (
        "import sys\n"
        "from bagscope.cli.encoders import encoders\n"
        f"try: encoders({arguments!r})\n"
        "except SystemExit: pass\n"
        f"sys.stderr.write(','.join(m for m in {HEAVY!r} if m in sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == ""
    assert "Usage" in ran.stdout or "efficientnet-lite0" in ran.stdout
