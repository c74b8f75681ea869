"""One encoder on one device, with everything that its numbers depend on held fixed.

Batches always have the same shape, so a tile's vector is the same to the bit whether a run was
interrupted, shared out or neither. That stands on a tile's vector not depending on its place in
the batch or on its neighbours, which is checked with the encoder itself before the first slide.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bagscope.arithmetic import avoid_broken_units
from bagscope.artifacts import Json
from bagscope.errors import ConfigError, EncoderUnavailable, first_line
from bagscope.features.encoders.loading import LoadedEncoder, pool
from bagscope.features.precision import Precision, choose_precision
from bagscope.features.transform import TileTransform

if TYPE_CHECKING:
    import torch

_log = logging.getLogger(__name__)

_CPU_BATCH = 32
_CPU_BATCH_LARGE = 8
_LARGE_PARAMETERS = 200_000_000
_GPU_BATCHES = (32, 64, 128, 256, 512)
_GPU_MEMORY_SHARE = 0.6
_GAIN_WORTH_DOUBLING = 1.05
_LEAST_COSINE = 0.999


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How an encoder is run: found once, then fixed for every slide of the run and its resumption.

    Attributes:
        device: kind and model of the device, such as "cpu" or "cuda NVIDIA H100".
        precision: of the matrix products.
        batch_size: tiles per batch.
        compiled: whether torch.compile made the code.
        threads: of the CPU, 0 on other devices.
        torch: version.
    """

    device: str
    precision: Precision
    batch_size: int
    compiled: bool
    threads: int
    torch: str

    def as_json(self) -> dict[str, Json]:
        """Return the fields as JSON."""
        return asdict(self)


@dataclass(kw_only=True)
class Pending:
    """A batch on its way through the device."""

    output: torch.Tensor
    done: Callable[[], None]


class EncoderSession:
    """Encodes batches of tiles of one size.

    Args:
        encoder: with its weights.
        device: "cpu", "cuda", "cuda:1", "mps".
        tile_px: edge of the tiles.
        precision: instead of the encoder's own, where the device allows it.
        batch_size: instead of one that is found.

    Raises:
        ConfigError: no such device.
        EncoderUnavailable: the encoder does not return what its spec says.
    """

    def __init__(
        self,
        encoder: LoadedEncoder,
        *,
        device: str,
        tile_px: int,
        precision: Precision | None = None,
        batch_size: int | None = None,
    ) -> None:
        import torch

        avoid_broken_units()
        self.encoder = encoder
        self.spec = encoder.spec
        self.device = require_device(device)
        self.tile_px = tile_px
        self.precision = choose_precision(self.spec.dtype, self.device, asked=precision)
        self._dtype: torch.dtype = getattr(torch, self.precision)
        self._transform = TileTransform(self.spec)
        self._network = encoder.network.to(self.device).to(memory_format=torch.channels_last)
        self.run_ready: Callable[[torch.Tensor], torch.Tensor] = self._vectors
        self.is_compiled = False
        self.batch_size = batch_size or self._find_batch_size()
        self.seconds_per_tile = 0.0
        self.crosses_slides = self._checked_within_memory()

    @property
    def execution(self) -> Execution:
        """Return how batches are run, for the record and for the next run."""
        import torch

        return Execution(
            device=device_text(self.device),
            precision=self.precision,
            batch_size=self.batch_size,
            compiled=self.is_compiled,
            threads=torch.get_num_threads() if self.device.type == "cpu" else 0,
            torch=torch.__version__,
        )

    def new_batch(self) -> torch.Tensor:
        """Return room for a batch of tiles: (batch_size, tile_px, tile_px, 3) uint8."""
        import torch

        shape = (self.batch_size, self.tile_px, self.tile_px, 3)
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def encode(self, tiles: torch.Tensor) -> NDArray[np.float32]:
        """Encode (batch_size, tile_px, tile_px, 3) uint8 tiles into (batch_size, D) float32."""
        return self.collect(self.submit(tiles))

    def submit(self, tiles: torch.Tensor) -> Pending:
        """Start encoding a batch; `tiles` must stay as it is until it is collected."""
        import torch

        with torch.inference_mode():
            vectors = self.run_ready(self.ready(tiles.to(self.device, non_blocking=True)))
            if self.device.type != "cuda":
                return Pending(output=vectors.float().cpu(), done=lambda: None)
            output = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            output.copy_(vectors, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            return Pending(output=output, done=event.synchronize)

    def collect(self, pending: Pending) -> NDArray[np.float32]:
        """Wait for a batch and return its vectors."""
        pending.done()
        vectors: NDArray[np.float32] = pending.output.numpy()
        return vectors

    def shrink(self) -> None:
        """Halve the batch after the device ran out of memory.

        Raises:
            EncoderUnavailable: one tile at a time is too much already.
        """
        import torch

        if self.batch_size == 1:
            raise EncoderUnavailable(
                f"encoder {self.spec.name}: {device_text(self.device)} has not enough memory for "
                "one tile; use another device"
            )
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        _log.warning(
            "encoder %s: out of memory on %s; going on with batches of %d",
            self.spec.name,
            device_text(self.device),
            self.batch_size,
        )

    # --- finding out --------------------------------------------------------------------------

    def ready(self, tiles: torch.Tensor) -> torch.Tensor:
        """Return tiles as the network takes them: (B, 3, input_px, input_px), normalised."""
        return self._transform(tiles, self._dtype)

    def _vectors(self, inputs: torch.Tensor) -> torch.Tensor:
        import torch

        if self.precision == "float32":
            return pool(self._network(inputs), self.spec)
        with torch.autocast(self.device.type, self._dtype):
            return pool(self._network(inputs), self.spec)

    def compile(self) -> None:
        """Compile the encoder, if that works and gives the same numbers."""
        self.is_compiled = self._compile()
        if self.is_compiled:
            self.crosses_slides = self._checked_within_memory()

    def _compile(self) -> bool:
        """Compile network and pooling; return whether that worked and is right."""
        import torch

        if self.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
            _log.warning("no C++ compiler, so encoder %s runs uncompiled", self.spec.name)
            return False
        tiles = self._trial_tiles()
        expected = self.encode(tiles)
        self.run_ready = torch.compile(self._vectors, dynamic=False)
        try:
            with _frozen_weights():
                found = self.encode(tiles)
        except Exception as error:  # whatever the compiler meets, the plain network still works
            _log.warning(
                "encoder %s can't be compiled (%s) and runs as it is",
                self.spec.name,
                first_line(error),
            )
            self.run_ready = self._vectors
            return False
        if _least_cosine(expected, found) < _LEAST_COSINE:
            _log.warning("encoder %s compiles to other numbers; runs uncompiled", self.spec.name)
            self.run_ready = self._vectors
            return False
        return True

    def _checked_within_memory(self) -> bool:
        """Check the rows, with smaller batches where the device has no room for these."""
        while True:
            try:
                return self._check_rows()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self.shrink()

    def _check_rows(self) -> bool:
        """Return whether a tile's vector is the same wherever in whatever batch it stands."""
        tiles = self._trial_tiles()
        here = self.encode(tiles)
        begin_s = time.perf_counter()
        elsewhere = self.encode(tiles.roll(self._shift, 0))
        self.seconds_per_tile = (time.perf_counter() - begin_s) / self.batch_size
        if here.shape != (self.batch_size, self.spec.dimension):
            raise EncoderUnavailable(
                f"encoder {self.spec.name}: returns {here.shape[1:]} values per tile, its spec "
                f"says {self.spec.dimension}"
            )
        if self.batch_size == 1:
            return True
        tiles[1:] = 0
        alone = self.encode(tiles)
        moved_back = np.roll(elsewhere, -self._shift, 0)
        return bool(np.array_equal(here, moved_back) and np.array_equal(here[0], alone[0]))

    @property
    def _shift(self) -> int:
        return (self.batch_size // 2 + 1) % self.batch_size or 1

    def _trial_tiles(self) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(0)
        shape = (self.batch_size, self.tile_px, self.tile_px, 3)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    def _find_batch_size(self) -> int:
        """Return the tiles per batch: on a GPU where doubling stops to pay, else by size."""
        if self.device.type != "cuda":
            parameters = sum(p.numel() for p in self._network.parameters())
            return _CPU_BATCH_LARGE if parameters > _LARGE_PARAMETERS else _CPU_BATCH
        return self._find_gpu_batch_size()

    def _find_gpu_batch_size(self) -> int:
        import torch

        best, best_rate = _GPU_BATCHES[0], 0.0
        total = torch.cuda.get_device_properties(self.device).total_memory
        for size in _GPU_BATCHES:
            self.batch_size = size
            tiles = self._trial_tiles()
            try:
                self.encode(tiles)
                begin = time.perf_counter()
                self.encode(tiles)
                rate = size / (time.perf_counter() - begin)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            if rate < best_rate * _GAIN_WORTH_DOUBLING:
                break
            best, best_rate = size, rate
            if torch.cuda.max_memory_allocated(self.device) * 2 > _GPU_MEMORY_SHARE * total:
                break
        return best


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether a device ran out of memory."""
    import torch

    text = str(error).lower()
    stated = "out of memory" in text or "can't allocate memory" in text  # the latter on CPUs
    return isinstance(error, torch.OutOfMemoryError) or stated


def require_device(name: str) -> torch.device:
    """Return a device that is there.

    Raises:
        ConfigError: it is not.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device {name!r} is not known; choose cpu, cuda, cuda:N or mps"
        ) from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ConfigError(
                f"device {name!r} asked for, but this machine has {count} CUDA devices"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("device 'mps' asked for, but this machine has none")
    elif device.type != "cpu":
        raise ConfigError(f"device {name!r} is not supported; choose cpu, cuda, cuda:N or mps")
    return device


def device_text(device: torch.device) -> str:
    """Return kind and model of a device, without its number."""
    if device.type != "cuda":
        return device.type
    import torch

    return f"cuda {torch.cuda.get_device_name(device)}"


@contextlib.contextmanager
def _frozen_weights() -> Any:
    """Let the compiler take the weights as constants."""
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield


def _least_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(norms, 1e-12)
    return float(cosines.min())
