"""From tiles as they were read to what a network sees, a whole batch at a time.

    tiles (B, tile_px, tile_px, 3) uint8
      → stain normalisation, where the spec asks for it
      → resize to `resize_px` or `input_px`, antialiased, rounded to 8 bits
      → centre crop to `input_px`
      → (x / 255 − mean) / std, (B, 3, input_px, input_px), channels last

Every step treats each tile by itself, with operations that IEEE 754 rounds exactly, so that a row
never depends on its neighbours or on its place in the batch.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from bagscope.features.encoders.spec import EncoderSpec
from bagscope.features.stain import stain_normaliser

NUMERICS = 1
"""Raised by hand whenever the same tiles would give other numbers."""


class TileTransform(nn.Module):
    """Turns tiles into the input of an encoder's network; it has no parameters and no state.

    Args:
        spec: of the encoder.
    """

    scale_row: Tensor
    shift_row: Tensor

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.spec = spec
        self.resized_px = spec.resize_px or spec.input_px
        self._stain = stain_normaliser(spec.stain)
        mean = torch.tensor(spec.mean, dtype=torch.float64)
        std = torch.tensor(spec.std, dtype=torch.float64)
        # One entry per byte of an image row: three would leave the CPU loops of three elements.
        for name, row in (("scale_row", 1 / (255 * std)), ("shift_row", -mean / std)):
            self.register_buffer(name, row.float().repeat(spec.input_px), persistent=False)

    def __call__(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (B, 3, input_px, input_px) of `dtype`, channels last, of uint8 tiles."""
        return cast(Tensor, super().__call__(tiles, dtype))

    def forward(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        """Do all steps: see `__call__`."""
        return self.normalise(self.to_input_u8(tiles), dtype)

    def to_input_u8(self, tiles: Tensor) -> Tensor:
        """Return the stain-normalised, resized and cropped tiles.

        Args:
            tiles: (B, tile_px, tile_px, 3) uint8.

        Returns:
            (B, 3, input_px, input_px) uint8, channels last.

        Raises:
            ValueError: tiles of another shape or type.
        """
        if tiles.dtype != torch.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
            raise ValueError(
                f"tiles are {tiles.dtype} {tuple(tiles.shape)}; pass uint8 (B, tile_px, tile_px, 3)"
            )
        if tiles.shape[1] != tiles.shape[2]:
            raise ValueError(f"tiles are {tiles.shape[2]} × {tiles.shape[1]} px; pass square ones")
        if self._stain is not None:
            tiles = self._stain(tiles)
        images = tiles.permute(0, 3, 1, 2)
        if tiles.shape[1] != self.resized_px and tiles.shape[0]:
            images = resized(images, self.resized_px, self.spec.interpolation)
        edge = self.spec.input_px
        # Where the margin is odd, Python rounds to even, and so do the authors' transforms.
        start = round((self.resized_px - edge) / 2)
        images = images[:, :, start : start + edge, start : start + edge]
        return images.contiguous(memory_format=torch.channels_last)

    def normalise(self, images_u8: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (x / 255 − mean) / std.

        Args:
            images_u8: (B, 3, input_px, input_px) uint8, channels last.
            dtype: of the result; the arithmetic is in float32.

        Returns:
            (B, 3, input_px, input_px) of `dtype`, channels last.
        """
        count, _, height, width = images_u8.shape
        rows = images_u8.permute(0, 2, 3, 1).reshape(count * height, width * 3)
        values = rows.to(torch.float32)
        # Two steps rather than one: a fused multiply-add rounds differently at the end of a loop.
        values.mul_(self.scale_row.to(values.device)).add_(self.shift_row.to(values.device))
        images = values.to(dtype).view(count, height, width, 3)
        return images.permute(0, 3, 1, 2)


def resized(images: Tensor, edge_px: int, interpolation: str) -> Tensor:
    """Resize (B, 3, h, w) uint8 images to squares, antialiased and rounded, as Pillow does."""
    if images.device.type == "cpu":
        # Torch's own path for bytes keeps the channels-last layout and rounds like Pillow.
        return _interpolated(images, (edge_px, edge_px), interpolation)
    return resized_in_float32(images, edge_px, interpolation)


def resized_in_float32(images: Tensor, edge_px: int, interpolation: str) -> Tensor:
    """Do the same on devices that interpolate floating point only; within one grey level."""
    values = images.to(torch.float32)
    # As in Pillow, halves go up, and both directions are rounded and cut.
    for size in ((images.shape[2], edge_px), (edge_px, edge_px)):
        values = _interpolated(values, size, interpolation).add_(0.5).floor_().clamp_(0, 255)
    return values.to(torch.uint8)


def _interpolated(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    return nn.functional.interpolate(
        images, size, mode=interpolation, antialias=True, align_corners=False
    )
