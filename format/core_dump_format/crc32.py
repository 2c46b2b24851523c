"""Owns how S3 writes a CRC-32."""

from __future__ import annotations

import base64


def encode_crc32(crc: int) -> str:
    """Return a CRC-32 as S3 writes it: base64 of four bytes, big-endian (Amazon S3 API Reference, PutObject)."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()
