"""The feature store beside NumPy and preadv, and beside the chunked layouts of the field.

    python benchmarks/bench_store.py [--record] [--rounds 15] [--cold]

Each round reads through every layout in turn, files in the page cache; ratios are of medians. Every
reader but the store opens its file anew; the store knows the files used last, so its times come
with and without opening. Chosen rows: 2,048 of 100,000, random and sorted. `--cold` empties the
page cache before each read (Linux, as root only).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import recording
from numpy.typing import NDArray

from bagscope.features.feature_file import FeatureHeader, read_feature_file, write_feature_file
from bagscope.features.store import FeatureStore
from bagscope.features.zarr_store import write_zarr_store

BAG_ROWS, MANY_ROWS, DIMENSION, CHOSEN = 20_000, 100_000, 1024, 2048

Reader = Callable[[], NDArray[Any]]
Medians = dict[str, float]


def main() -> None:
    """Measure, compare with the targets, record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append to results.csv and store.md")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cold", action="store_true", help="also with an empty page cache")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure(Path(scratch), arguments.rounds, cold=arguments.cold)
    recording.show(rows)
    if arguments.record:
        recording.record("store", rows, packages=("numpy", "h5py", "zarr"))


def measure(folder: Path, rounds: int, *, cold: bool) -> list[recording.Row]:
    chance = np.random.default_rng(0)
    vectors = chance.standard_normal((MANY_ROWS, DIMENSION), np.float32).astype(np.float16)
    bag = vectors[:BAG_ROWS]
    chosen = np.sort(chance.choice(MANY_ROWS, CHOSEN, replace=False))
    write(folder / "bag", bag)
    write(folder / "many", vectors)
    whole, scattered = whole_readers(folder / "bag"), row_readers(folder / "many", chosen)
    require_equal(whole, bag)
    require_equal(scattered, vectors[chosen])
    del vectors, bag
    rows = whole_rows(time_in_turn(whole, rounds)) + scattered_rows(time_in_turn(scattered, rounds))
    # Mapped pages stay in memory whatever is asked for.
    del whole, scattered
    return rows + (cold_rows(folder / "many", chosen) if cold else [])


def write(folder: Path, vectors: NDArray[np.float16]) -> None:
    """Write the same vectors in every layout."""
    header = FeatureHeader(
        slide_id="slide",
        fields={},
        encoder={"name": "random"},
        weights_sha256="unknown",
        coords_l0=np.zeros((len(vectors), 2), np.int32),
    )
    write_feature_file(folder / "store" / "slide.h5", header, vectors)
    write_zarr_store(FeatureStore.open(folder / "store"), folder / "store.zarr")
    np.save(folder / "slide.npy", vectors)
    for name, chunk_rows in (("one", 1), ("many", 32)):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file.create_dataset(
                "features",
                data=vectors,
                chunks=(chunk_rows, DIMENSION),
                maxshape=(None, DIMENSION),
            )


def whole_readers(folder: Path) -> dict[str, Reader]:
    def chunked(name: str) -> NDArray[Any]:
        with h5py.File(folder / f"{name}.h5") as file:
            return np.asarray(file["features"][:])

    opened = FeatureStore.open(folder / "store")
    opened.record("slide")
    return {
        "np.load": lambda: np.load(folder / "slide.npy"),
        "view": lambda: FeatureStore.open(folder / "store").bag("slide").features,
        "copy": lambda: FeatureStore.open(folder / "store").bag("slide", copy=True).features,
        "known": lambda: opened.bag("slide", copy=True).features,
        "one": lambda: chunked("one"),
        "many": lambda: chunked("many"),
        "zarr": lambda: FeatureStore.open(folder / "store.zarr").bag("slide").features,
    }


def row_readers(folder: Path, chosen: NDArray[np.int64]) -> dict[str, Reader]:
    offset = read_feature_file(folder / "store" / "slide.h5").offset
    opened = FeatureStore.open(folder / "store")
    opened.record("slide")

    def preadv() -> NDArray[Any]:
        found = np.empty((len(chosen), DIMENSION), np.float16)
        row_bytes = found.strides[0]
        target = memoryview(found.view(np.uint8).reshape(-1))
        descriptor = os.open(folder / "store" / "slide.h5", os.O_RDONLY)
        for place, row in enumerate(chosen.tolist()):
            piece = target[place * row_bytes : (place + 1) * row_bytes]
            os.preadv(descriptor, [piece], offset + row * row_bytes)
        os.close(descriptor)
        return found

    def chunked(name: str) -> NDArray[Any]:
        with h5py.File(folder / f"{name}.h5") as file:
            return np.asarray(file["features"][chosen])

    return {
        "preadv": preadv,
        "store": lambda: opened.bag("slide", chosen).features,
        "anew": lambda: FeatureStore.open(folder / "store").bag("slide", chosen).features,
        "one": lambda: chunked("one"),
        "many": lambda: chunked("many"),
        "zarr": lambda: FeatureStore.open(folder / "store.zarr").bag("slide", chosen).features,
    }


def whole_rows(found: Medians) -> list[recording.Row]:
    load = found["np.load"]
    return [
        recording.Row("whole bag, 20,000 × 1,024 float16: np.load", load * 1e3, "ms"),
        recording.Row("store, a view ÷ np.load", found["view"] / load, "×", at_most=1.2),
        recording.Row("store, copied ÷ np.load", found["known"] / load, "×", at_most=1.2),
        recording.Row("store, copied, file opened anew ÷ np.load", found["copy"] / load, "×"),
        recording.Row(
            "1 row per chunk (TRIDENT) ÷ store copied", found["one"] / found["copy"], "×"
        ),
        recording.Row(
            "32 rows per chunk (CLAM) ÷ store copied", found["many"] / found["copy"], "×"
        ),
        recording.Row("Zarr backend ÷ store copied", found["zarr"] / found["copy"], "×"),
    ]


def scattered_rows(found: Medians) -> list[recording.Row]:
    read, anew = found["preadv"], found["anew"]
    return [
        recording.Row("2,048 of 100,000 rows: preadv per row", read * 1e3, "ms"),
        recording.Row("store ÷ preadv per row", found["store"] / read, "×", at_most=1.5),
        recording.Row("store, file opened anew ÷ preadv per row", anew / read, "×"),
        recording.Row("1 row per chunk (TRIDENT) ÷ store opened anew", found["one"] / anew, "×"),
        recording.Row("32 rows per chunk (CLAM) ÷ store opened anew", found["many"] / anew, "×"),
        recording.Row("Zarr backend ÷ store opened anew", found["zarr"] / anew, "×"),
    ]


def cold_rows(folder: Path, chosen: NDArray[np.int64]) -> list[recording.Row]:
    readers = row_readers(folder, chosen)
    kept = {name: readers[name] for name in ("anew", "preadv", "one", "many")}
    found = time_in_turn(kept, 5, before=empty_page_cache)
    store = found["anew"]
    return [
        recording.Row("cold: store, file opened anew", store * 1e3, "ms", at_most=70),
        recording.Row("cold: preadv per row ÷ store", found["preadv"] / store, "×"),
        recording.Row("cold: 1 row per chunk (TRIDENT) ÷ store", found["one"] / store, "×"),
        recording.Row("cold: 32 rows per chunk (CLAM) ÷ store", found["many"] / store, "×"),
    ]


def require_equal(readers: dict[str, Reader], expected: NDArray[Any]) -> None:
    """Refuse to time what reads something else."""
    for name, read in readers.items():
        if not np.array_equal(read(), expected):
            raise SystemExit(f"{name} reads other vectors than were written")


def time_in_turn(
    readers: dict[str, Reader], rounds: int, before: Callable[[], None] | None = None
) -> Medians:
    seconds: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, read in readers.items():
            if before is not None:
                before()
            began_s = time.perf_counter()
            kept = read()
            seconds[name].append(time.perf_counter() - began_s)
            del kept
    return {name: statistics.median(values) for name, values in seconds.items()}


def empty_page_cache() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1", encoding="ascii")


if __name__ == "__main__":
    main()
