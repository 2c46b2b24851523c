"""Puts modules and lists into `.modules/` as the helper does, and makes passes over it in this process."""

from __future__ import annotations

import gzip
import hashlib
import os
from typing import TYPE_CHECKING, Any

from tests.support.uploads import options

from core_dump_collector import modulepass
from core_dump_collector.moduleevents import Event, Kind
from core_dump_format.modules import DIRECTORY, Module, ModuleList, list_name, module_name, render_list

if TYPE_CHECKING:
    from pathlib import Path


def directory(watch_dir: Path) -> Path:
    """Return `.modules/`, which is there afterwards."""
    found = watch_dir / DIRECTORY
    found.mkdir(mode=0o700, exist_ok=True)
    return found


def digest(content: bytes) -> str:
    """Return the SHA-256 of a content."""
    return hashlib.sha256(content).hexdigest()


def put_module(
    watch_dir: Path, content: bytes, *, sensitive: bool = False, level: int = 1, name: str = ""
) -> Path:
    """Put a module there; return its file."""
    path = directory(watch_dir) / (name or module_name(digest(content), is_sensitive=sensitive))
    path.write_bytes(gzip.compress(content, level, mtime=0))
    return path


def module(content: bytes, path: bytes = b"/app/app", start: int = 0x400000, build_id: str = "") -> Module:
    """Return the row of a list for a module."""
    return Module(path, start, start + 4096, 0, build_id, len(content), digest(content))


def put_list(watch_dir: Path, dump: str, *modules: Module, sensitive: str = "", of: str = "") -> Path:
    """Put the list of a dump there; return its file."""
    path = directory(watch_dir) / list_name(dump)
    path.write_bytes(render_list(ModuleList(of or dump, modules, 0, sensitive)))
    return path


def make_pass(watch_dir: Path, *, sends: bool = True, modules: bool = True, **changes: Any) -> list[Event]:
    """Send lists, then modules, to the store that the environment names; return the events but those of beginnings."""
    events: list[Event] = []
    for lists in (True, False)[: 1 + (sends and modules)]:
        wanted = {"lists": lists and sends, "modules": modules and sends and not lists}
        modulepass.run(str(watch_dir), options(**changes), events.append, **wanted)
    return [event for event in events if event.kind is not Kind.SENDING]


def age(path: Path, seconds: float) -> None:
    """Make a file older than it is."""
    at = path.stat().st_mtime - seconds
    os.utime(path, (at, at))
