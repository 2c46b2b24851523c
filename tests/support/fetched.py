"""Owns writing a local dump as `core-dumps get` writes it: decompressed, its memory by address."""

from __future__ import annotations

import os
from pathlib import Path

from core_dump_format.core import read_core
from core_dump_format.stream import Forward
from core_dumps.addressorder import AddressOrder


def write_by_address(dump: bytes, path: Path, piece_bytes: int = 1 << 20) -> bool:
    """Write a core by address, from pieces of a length; as it is, and return False, if its order stays."""
    order = AddressOrder.of(read_core(Forward.over([dump], 1 << 30)))
    if order is None:
        path.write_bytes(dump)
        return False
    pieces = (dump[at : at + piece_bytes] for at in range(0, len(dump), piece_bytes))
    with path.open("w+b") as file:
        os.ftruncate(file.fileno(), order.write(file.fileno(), pieces))
    return True
