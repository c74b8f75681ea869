"""What makes a slide this slide: sizes and hashes of its content, never its path or its times.

Hashing gigabytes would cost more than tiling them. So the header and the directories are hashed
whole (they hold every tile's place and size, so that hardly any edit leaves them unchanged), and
sixteen blocks spread over the rest.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from bagscope.errors import ReadError
from bagscope.wsi.tiff_directory import looks_like_tiff, read_structure

SAMPLED_BLOCKS = 16
BLOCK_BYTES = 4096
HEADER_BYTES = 65536
_VMS_SUFFIXES = (".vms", ".vmu")


def slide_identity(path: Path) -> dict[str, int | str]:
    """Return what a slide's fingerprint is made of.

    `size_bytes` and `files` count all files of the slide (an MRXS with its folder, a DICOM series,
    a Zarr folder). `header_sha256` covers the first file's header and directories and, where there
    are several files, each one's name and size; a lone file's name counts for nothing.
    `samples_sha256` covers sixteen blocks spread evenly over all the bytes, the first and the last
    of them included.

    Raises:
        ReadError: a file is missing or can't be read.
    """
    try:
        members = slide_files(path)
        sizes = [(path_.stat().st_size, path_) for path_ in members]
        header = hashlib.sha256()
        if len(members) > 1:
            base = path if path.is_dir() else path.parent
            for size_bytes, member in sizes:
                name = member.relative_to(base).as_posix()
                # An MRXS may be renamed together with its folder; only what is inside counts.
                if path.suffix.lower() == ".mrxs":
                    name = name.removeprefix(f"{path.stem}/") if member != path else ""
                header.update(f"{name}\0{size_bytes}\0".encode())
        header.update(_header_of(members[0]))
        samples = hashlib.sha256()
        for member, offset, length in sampled_blocks(sizes):
            samples.update(_read(member, offset, length))
    except OSError as error:
        raise ReadError(f"{path}: can't be read ({error.strerror or error})") from error
    return {
        "files": len(members),
        "size_bytes": sum(size_bytes for size_bytes, _ in sizes),
        "header_sha256": header.hexdigest(),
        "samples_sha256": samples.hexdigest(),
    }


def slide_files(path: Path) -> list[Path]:
    """Return every file that belongs to a slide, in a fixed order.

    Raises:
        ReadError: a folder without files.
        OSError: the path does not exist.
    """
    if path.is_dir():
        members = [p for p in path.rglob("*") if p.is_file()]
        if not members:
            raise ReadError(f"{path}: the folder holds no file")
        return sorted(members, key=lambda p: p.relative_to(path).as_posix())
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        return [path, *sorted(p for p in path.with_suffix("").rglob("*") if p.is_file())]
    if suffix == ".dcm":
        return sorted(p for p in path.parent.iterdir() if p.suffix.lower() == ".dcm")
    if suffix in _VMS_SUFFIXES:
        names = re.findall(r"=\s*([^\r\n=]+)", path.read_text("latin-1"))
        siblings = {path.parent / name.strip() for name in names}
        return [path, *sorted(p for p in siblings if p.is_file() and p != path)]
    path.stat()
    return [path]


def sampled_blocks(sizes: Sequence[tuple[int, Path]]) -> list[tuple[Path, int, int]]:
    """Return (file, offset, length) of the sampled blocks, file by file.

    All files are laid end to end in the given order. Block starts divide that length evenly, from
    its very first byte to the block that holds its last; a block goes on into the next file.
    """
    total = sum(size_bytes for size_bytes, _ in sizes)
    last_start = max(0, total - BLOCK_BYTES)
    starts = sorted({last_start * i // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)})
    ends = list(itertools.accumulate(size_bytes for size_bytes, _ in sizes))
    blocks: list[tuple[Path, int, int]] = []
    for start in starts:
        stop = min(start + BLOCK_BYTES, total)
        index = bisect.bisect_right(ends, start)
        while start < stop:
            size_bytes, member = sizes[index]
            offset = start - (ends[index] - size_bytes)
            length = min(stop - start, size_bytes - offset)
            if length:
                blocks.append((member, offset, length))
            start += length
            index += 1
    return blocks


def _header_of(path: Path) -> bytes:
    """Return a digest of a file's first bytes and, for a TIFF, of all its directories."""
    digest = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size_bytes = os.fstat(descriptor).st_size
        head = os.pread(descriptor, HEADER_BYTES, 0)
        digest.update(head)
        if looks_like_tiff(head):
            try:
                spans = read_structure(descriptor).spans
            except ReadError:
                # A damaged or unusual directory: the samples still tell files apart.
                spans = ()
            for offset, length in spans:
                room = max(0, size_bytes - offset)
                if room:
                    digest.update(os.pread(descriptor, min(length, room), offset))
    finally:
        os.close(descriptor)
    return digest.digest()


def _read(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as handle:
        handle.seek(offset)
        return handle.read(length)
