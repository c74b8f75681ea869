from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from bagscope.features.encoders import encoder_specs, find_encoder
from bagscope.features.encoders.table import EXAMPLE_YAML, encoders_page

PAGE = Path(__file__).parents[3] / "docs" / "encoders.md"


def test_the_page_is_what_the_registry_gives() -> None:
    written = PAGE.read_text(encoding="utf-8")
    again = "run python -m bagscope.features.encoders.table > docs/encoders.md"
    assert written == encoders_page(), again


def rows() -> dict[str, list[str]]:
    lines = re.findall(r"^\| (`.*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [line.split(" | ") for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def test_every_encoder_has_a_row_with_every_column() -> None:
    specs = encoder_specs()
    assert list(rows()) == list(specs)
    assert {len(row) for row in rows().values()} == {10}
    for name, row in rows().items():
        assert row[1].startswith(f"{specs[name].dimension}, ")
        assert row[-1] == ("yes" if specs[name].run_here else "not yet")


@pytest.mark.parametrize(
    ("name", "column", "text"),
    [
        ("gigapath", 2, "256 → 224, bicubic"),
        ("conch-v1", 4, "512 px, 0.5 µm"),
        ("hibou-l", 5, "its repository"),
        ("musk", 5, "its package"),
        ("mstar", 6, "?"),
        ("h-optimus-0", 8, "?"),
        ("keep", 1, "768, pooled, length 1"),
        ("uni", 9, "not yet"),
        ("efficientnet-lite0", 9, "yes"),
    ],
)
def test_rows_say_what_is_known_and_what_is_not(name: str, column: int, text: str) -> None:
    assert rows()[name][column] == text


def test_the_example_of_a_cytology_transformer_works(tmp_path: Path) -> None:
    (tmp_path / "cytofm.yaml").write_text(EXAMPLE_YAML)
    (tmp_path / "cytofm.pth").write_bytes(b"weights are not looked at yet")
    spec = find_encoder(f"local:{tmp_path / 'cytofm.pth'}").spec
    assert (spec.dimension, spec.prefix_tokens, spec.pooling) == (768, 1, "token")
    assert yaml.safe_load(EXAMPLE_YAML)["architecture"] == spec.architecture
    assert torch.tensor(spec.mean).shape == (3,)
