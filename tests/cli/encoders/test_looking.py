"""`encoders list|show|check`, with a small hub that lies on disk."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from bagscope.features.encoders.registry import Registered
from bagscope.features.encoders.spec import EncoderSpec
from tests.cli.encoders.conftest import (
    VIT,
    Command,
    Small,
    build,
    lines,
    put_in_cache,
    refusal,
    refuse,
)

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
