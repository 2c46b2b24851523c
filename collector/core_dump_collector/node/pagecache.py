"""Owns reading files without filling the page cache, which belongs to the programs of the node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_DROP_BYTES = 8 * 1024 * 1024


def drop_cache(fd: int, offset: int, size: int) -> None:
    """Tell the kernel to drop a range from the page cache."""
    os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)


def read_blocks(fd: int, block_bytes: int) -> Iterator[bytes]:
    """Yield the file in blocks; drop the blocks before from the page cache."""
    offset = dropped = 0
    while block := os.pread(fd, block_bytes, offset):
        yield block
        offset += len(block)
        if offset - dropped >= _DROP_BYTES:
            drop_cache(fd, dropped, offset - dropped)
            dropped = offset
