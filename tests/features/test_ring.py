from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from bagscope.errors import ConfigError
from bagscope.features.ring import RingWindow, TileRing, slot_bytes

GEOMETRY = {"slots": 3, "rows": 4, "tile_px": 16}

WRITE = """
import sys
from bagscope.features.ring import RingWindow
with RingWindow(sys.argv[1], slots=3, rows=4, tile_px=16) as ring:
    view = ring.view(1, 2)
    view[0] = 7
    view[1, 5, 6] = (1, 2, 3)
"""


def test_another_process_writes_what_this_one_reads() -> None:
    ring = TileRing(**GEOMETRY)
    before = ring.view(1).copy()
    assert not before.any()
    subprocess.run([sys.executable, "-c", WRITE, ring.path], check=True)
    found = ring.view(1)
    assert found.shape == (4, 16, 16, 3)
    assert found.dtype == np.uint8
    assert (found[0] == 7).all()
    assert found[1, 5, 6].tolist() == [1, 2, 3]
    assert found.sum() == 7 * 16 * 16 * 3 + 6
    for slot in (0, 2):
        assert not ring.view(slot).any()
    ring.close()


def test_slots_share_no_byte() -> None:
    ring = TileRing(**GEOMETRY)
    for slot in range(3):
        ring.view(slot)[...] = slot + 1
    with RingWindow(ring.path, **GEOMETRY) as window:
        for slot in range(3):
            assert (window.view(slot, 4) == slot + 1).all()
            assert window.view(slot, 2).shape == (2, 16, 16, 3)
            assert window.view(slot, 2).flags.c_contiguous
    ring.close()


def test_a_slot_weighs_what_its_tiles_do() -> None:
    assert slot_bytes(4, 16) == 4 * 16 * 16 * 3


def test_memory_is_given_back() -> None:
    process = psutil.Process()
    # What earlier tests left to the garbage collector is not this ring's.
    gc.collect()
    handles, maps = process.num_fds(), _ring_maps(process)
    ring = TileRing(slots=4, rows=64, tile_px=256)
    ring.view(0)[...] = 1
    path = ring.path
    assert Path(path).exists()
    ring.close()
    assert process.num_fds() == handles
    assert not Path(path).exists()
    assert _ring_maps(process) == maps


def _ring_maps(process: psutil.Process) -> int:
    return sum("bagscope-tiles" in region.path for region in process.memory_maps())


def test_memory_that_can_not_be_had_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    handles = psutil.Process().num_fds()
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=r"300 MiB of shared memory .* use fewer --workers"):
        TileRing(slots=25, rows=64, tile_px=256)
    assert psutil.Process().num_fds() == handles
