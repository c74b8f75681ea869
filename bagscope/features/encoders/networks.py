"""What stands around the networks of other libraries, so that each returns one tensor.

`loading.pool` turns that tensor into vectors: the network's own (B, D), tokens (B, T, D) after the
last norm, or a map (B, D, h, w).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Features(nn.Module):
    """A timm network cut before its pooling: tokens (B, T, D) after the norm, or a map."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the tokens or the map of normalised images (B, 3, h, w)."""
        features: torch.Tensor = self.trunk.forward_features(images)  # type: ignore[operator]
        return features


class Answer(nn.Module):
    """A network of transformers, of which one named output is taken."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the chosen output for normalised images (B, 3, h, w)."""
        answer = self.model(images)
        if isinstance(answer, torch.Tensor):
            return answer
        chosen: torch.Tensor = getattr(answer, self.output)
        return chosen


class Method(nn.Module):
    """A model of which one method with fixed arguments is the encoder."""

    def __init__(self, model: nn.Module, method: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.arguments = dict(arguments)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return what the method gives for normalised images (B, 3, h, w)."""
        answer: torch.Tensor = getattr(self.model, self.method)(images, **self.arguments)
        return answer


class Headed(nn.Module):
    """An image tower with a projection head behind it."""

    def __init__(self, visual: nn.Module, visual_head: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.visual_head = visual_head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the projected vectors (B, D) of normalised images (B, 3, h, w)."""
        vectors: torch.Tensor = self.visual_head(self.visual(images))
        return vectors


class ConvStem(nn.Module):
    """The convolutional stem that CTransPath puts before a Swin transformer: stride 4, NHWC."""

    def __init__(self, width: int) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        channels = 3
        for out in (width // 8, width // 4):
            steps += [
                nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(inplace=True),
            ]
            channels = out
        self.proj = nn.Sequential(*steps, nn.Conv2d(channels, width, kernel_size=1))
        self.norm = nn.LayerNorm(width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, h / 4, w / 4, width) for normalised images (B, 3, h, w)."""
        normed: torch.Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return normed


class Musk(nn.Module):
    """MUSK's image side: the first of what its forward returns."""

    def __init__(self, model: nn.Module, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.arguments = dict(arguments)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the global vectors (B, D) of normalised images (B, 3, h, w)."""
        answer = self.model(image=images, out_norm=False, return_global=True, **self.arguments)
        vectors: torch.Tensor = answer[0]
        return vectors
