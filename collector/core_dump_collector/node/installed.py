"""Owns the description of the helper that the core pattern names: its release and its configuration.

In a container, which does not see the node's files, both are unknown.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat

from core_dump_collector.node import corepattern

_MOST_BYTES = 1 << 16
_RELEASE = re.compile(rb'^RELEASE = "(\d[\w.-]{0,63})"$', re.MULTILINE)
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
VERSION = re.compile(r"\d{1,5}(\.\d{1,5}){1,3}[A-Za-z0-9.+-]{0,20}")
"""Release of a helper in the attributes of a dump."""


def identify_helper() -> tuple[str, str]:
    """Return the release of the installed helper and 12 hex digits of the SHA-256 of its configuration file.

    Either is empty if it is unknown.
    """
    call = corepattern.helper_call(corepattern.read())
    if call is None or corepattern.is_contained():
        return "", ""
    release = _RELEASE.search(_read(call.program))
    config = _read(call.config)
    return release[1].decode() if release else "", hashlib.sha256(config).hexdigest()[:12] if config else ""


def _read(path: str) -> bytes:
    """Return the beginning of a regular file; nothing if it cannot be read."""
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError):
        return b""
    try:
        return os.read(descriptor, _MOST_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except OSError:
        return b""
    finally:
        os.close(descriptor)
