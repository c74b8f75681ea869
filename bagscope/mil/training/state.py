"""What a training leaves on disk, so that it goes on after being killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bagscope.errors import ArtifactError, ConfigError, FingerprintMismatch, first_line

STATE_NAME = "state.pt"
METRICS_NAME = "metrics.csv"
PREPARATION_NAME = "preparation"
"""Folder of the training that a regime may need first, within that of its own."""


def read_state(path: Path, fingerprint: str, device: torch.device) -> dict[str, Any]:
    """Return the state that an earlier process of the same training left.

    Raises:
        ArtifactError: it can't be read.
        FingerprintMismatch: it is of another training.
        ConfigError: it is of another kind of device.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file makes of the unpickler
        raise ArtifactError(
            f"{path}: can't be read ({first_line(error)}); delete it to train this member anew"
        ) from error
    if state["fingerprint"] != fingerprint:
        raise FingerprintMismatch(
            f"{path}: was left by a training with other options or data; pass --overwrite to "
            "train anew, or choose another --name"
        )
    if state["device"] != device.type:
        raise ConfigError(
            f"{path}: was left by a training on {state['device']}, and this one is on "
            f"{device.type}, which draws other numbers; pass --device {state['device']}, "
            "or --overwrite to train anew"
        )
    return state
