"""Owns the bound on the body of a response: http.client and urllib3 bound neither it nor the lines between its chunks.

The collector asks for no object, only for listings, headers and short results.
"""

from __future__ import annotations

from typing import Any

MOST_RESPONSE_BYTES = 4 << 20
"""Longest body of a response, with its framing; a listing of 1,000 parts is a tenth of it."""


class LongResponseError(Exception):
    """The body of a response is longer than any of S3; botocore wraps it in HTTPClientError."""


class _BoundedFile:
    """The file that a response is read from, which ends with an error after MOST_RESPONSE_BYTES.

    http.client and urllib3 bound neither a body nor the lines between its chunks.
    """

    def __init__(self, file: Any) -> None:  # noqa: ANN401  a raw file
        self._file = file
        self._left = MOST_RESPONSE_BYTES

    def read(self, size: int | None = -1) -> bytes:
        return self._count(self._file.read(self._bound(size)))

    def read1(self, size: int = -1) -> bytes:
        return self._count(self._file.read1(self._bound(size)))

    def readline(self, size: int = -1) -> bytes:
        return self._count(self._file.readline(self._bound(size)))

    def readinto(self, buffer: Any) -> int:  # noqa: ANN401  any writable buffer
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)

    def _bound(self, size: int | None) -> int:
        return self._left + 1 if size is None or size < 0 else min(size, self._left + 1)

    def _count(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise LongResponseError(f"the response is longer than {MOST_RESPONSE_BYTES} bytes")
        return content

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._file, name)


def bound_body(response: Any) -> None:  # noqa: ANN401  of http.client, or of urllib3 2, which wraps that
    """Let the reading of a response end with LongResponseError after MOST_RESPONSE_BYTES."""
    raw = getattr(response, "_fp", response)
    if raw.fp is not None:
        raw.fp = _BoundedFile(raw.fp)
