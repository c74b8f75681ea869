"""One encoder on one device: what it accepts, what it finds out, what it refuses."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bagscope.errors import ConfigError, EncoderUnavailable
from bagscope.features.session import is_out_of_memory, require_device
from tests.features.engine_parts import TILE_PX, Neighbourly, Tiny, alone, encoder_of, session_of


def random_tiles(count: int, seed: int = 1) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, TILE_PX, TILE_PX, 3), dtype=np.uint8)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_a_batch_becomes_the_vectors_of_its_tiles(batch_size: int) -> None:
    encoder = encoder_of(Tiny())
    tiles = random_tiles(batch_size)
    found = session_of(encoder, batch_size=batch_size).encode(torch.from_numpy(tiles))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, alone(encoder, tiles), atol=2e-3, rtol=2e-3)


def test_the_same_batch_gives_the_same_bits() -> None:
    tiles = torch.from_numpy(random_tiles(8))
    one, other = session_of(Tiny()), session_of(Tiny())
    assert (
        one.encode(tiles).tobytes() == one.encode(tiles).tobytes() == other.encode(tiles).tobytes()
    )


def test_a_new_batch_is_black_and_of_the_right_shape() -> None:
    batch = session_of(Tiny(), batch_size=3).new_batch()
    assert batch.shape == (3, TILE_PX, TILE_PX, 3)
    assert batch.dtype == torch.uint8
    assert not batch.any()


class PlaceMatters(Tiny):
    """The first row of a batch comes out differently."""

    def forward(self, images: Tensor) -> Tensor:
        vectors = super().forward(images).clone()
        vectors[0] *= 1.001
        return vectors


class LeftNeighbour(Tiny):
    """Every row but the first takes something of the one before it."""

    def forward(self, images: Tensor) -> Tensor:
        vectors = super().forward(images)
        return vectors + 0.01 * torch.cat([torch.zeros_like(vectors[:1]), vectors[:-1]])


class RightNeighbour(Tiny):
    """Every row but the last takes something of the one after it."""

    def forward(self, images: Tensor) -> Tensor:
        vectors = super().forward(images)
        return vectors + 0.01 * torch.cat([vectors[1:], torch.zeros_like(vectors[:1])])


@pytest.mark.parametrize("batch_size", [2, 3, 4, 8, 32])
@pytest.mark.parametrize("network", [PlaceMatters, LeftNeighbour, RightNeighbour, Neighbourly])
def test_rows_that_depend_on_place_or_neighbours_are_noticed(
    network: type[nn.Module], batch_size: int
) -> None:
    assert not session_of(network(), batch_size=batch_size).crosses_slides


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_rows_that_stand_alone_may_share_a_batch(batch_size: int) -> None:
    assert session_of(Tiny(), batch_size=batch_size).crosses_slides


def test_an_encoder_that_returns_something_else_than_it_states_is_refused() -> None:
    with pytest.raises(EncoderUnavailable, match=r"tiny.*8.*16"):
        session_of(encoder_of(Tiny(), dimension=16))


def test_what_was_found_is_recorded() -> None:
    execution = session_of(Tiny(), batch_size=3).execution.as_json()
    assert execution["device"] == "cpu"
    assert execution["precision"] == "float32"
    assert execution["batch_size"] == 3
    assert execution["compiled"] is False
    assert execution["threads"] == torch.get_num_threads()
    assert execution["torch"] == torch.__version__


def test_a_batch_size_is_found_where_none_is_given() -> None:
    assert session_of(Tiny(), batch_size=None).batch_size >= 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_never_multiplies_in_float16(dtype: str) -> None:
    session = session_of(encoder_of(Tiny(), dtype=dtype))
    assert session.precision in ("float32", "bfloat16")
    found = session.encode(torch.from_numpy(random_tiles(8)))
    expected = alone(session.encoder, random_tiles(8))
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1)
    assert (cosines / np.linalg.norm(expected, axis=1)).min() > 0.999


def test_pooling_and_length_are_the_specs() -> None:
    class Tokens(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            return self.conv(images).flatten(2).transpose(1, 2)

    spec = {"pooling": "token+mean", "prefix_tokens": 3, "dimension": 16, "normalise": True}
    encoder = encoder_of(Tokens(), **spec)
    tiles = random_tiles(8)
    found = session_of(encoder).encode(torch.from_numpy(tiles))
    tokens = alone(encoder, tiles)
    expected = np.concatenate([tokens[:, 0], tokens[:, 3:].mean(axis=1)], axis=1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=3e-3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


# --- memory ---------------------------------------------------------------------------------


class Cramped(Tiny):
    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 3:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)")
        return super().forward(images)


def test_a_batch_size_that_does_not_fit_shrinks_before_the_first_slide(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        session = session_of(encoder_of(Cramped(), "narrow"), batch_size=16)
    assert session.batch_size == 2
    assert session.crosses_slides
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"encoder narrow: out of memory on cpu; going on with batches of {size}"
        for size in (8, 4, 2)
    ]
    assert session.encode(torch.from_numpy(random_tiles(2))).shape == (2, 8)


def test_an_encoder_for_which_there_is_no_room_at_all_is_refused() -> None:
    class Huge(Tiny):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(EncoderUnavailable, match=r"tiny: cpu has not enough memory for one tile"):
        session_of(Huge())


def test_torch_itself_says_so_when_memory_runs_out() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# --- devices --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xpu", "", "meta", "cpu0"])
def test_a_device_that_is_not_there_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_device(name)
    assert repr(name) in str(caught.value)


def test_a_cuda_device_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="'cuda' asked for, but this machine has 0 CUDA devices"):
        session_of(Tiny(), device="cuda")


# --- compiling ------------------------------------------------------------------------------


def test_what_can_not_be_compiled_runs_as_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("this platform\nhas no compiler")

    encoder = encoder_of(Tiny())
    session = session_of(encoder)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with caplog.at_level(logging.WARNING):
        session.compile()
    assert not session.is_compiled
    assert "this platform" in caplog.text
    tiles = random_tiles(8)
    found = session.encode(torch.from_numpy(tiles))
    np.testing.assert_allclose(found, alone(encoder, tiles), atol=2e-3, rtol=2e-3)


def test_code_that_compiles_to_other_numbers_is_not_used(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = encoder_of(Tiny())
    session = session_of(encoder)

    def wrong(function: object, **_: object) -> object:
        return lambda images: torch.flip(function(images), dims=(1,))  # type: ignore[operator]

    monkeypatch.setattr(torch, "compile", wrong)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    with caplog.at_level(logging.WARNING):
        session.compile()
    assert not session.is_compiled
    assert "other numbers" in caplog.text
    tiles = random_tiles(8)
    found = session.encode(torch.from_numpy(tiles))
    np.testing.assert_allclose(found, alone(encoder, tiles), atol=2e-3, rtol=2e-3)


def test_without_a_compiler_nothing_is_compiled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    session = session_of(Tiny())
    with caplog.at_level(logging.WARNING):
        session.compile()
    assert not session.is_compiled
    assert "no C++ compiler" in caplog.text
