"""Owns finding the files that were mapped in a crashed process: below a sysroot, here, or from a debuginfod server.

A file is used only if its build ID is that of the core. Build IDs are hints: strip keeps them and they can be forged.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from http.client import HTTPException
from typing import TYPE_CHECKING

from core_dump_format.core import Core, read_build_ids, read_core
from core_dump_format.elf import PAGE, Form, NotACoreError, build_id_of
from core_dump_format.stream import Forward, Seekable
from core_dumps import show
from core_dumps.dump import DELETED

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_LINKS = 40
MOST_DOWNLOAD_BYTES = 4 * 1024**3
TIMEOUT_SECONDS = 60
DOWNLOAD_SECONDS = 1800
BLOCK_BYTES = 256 * 1024
MOST_PAGES_BELOW_ENTRY = 262_144
"""1 GiB: the largest distance from a program's first instruction back to its ELF header."""
_BUILD_ID = re.compile(r"[0-9a-f]{8,128}")


@dataclass(frozen=True, slots=True)
class Module:
    """A file that was mapped in the process, and the place where it was found."""

    path: str
    build_id: str | None
    found: str | None = None
    entry: int | None = None
    """Address of the first instruction, for a program whose build ID is not known."""


@dataclass(frozen=True, slots=True)
class Modules:
    """The files of a process."""

    executable: Module | None
    libraries: tuple[Module, ...]
    machine: str | None = None
    """Architecture of the core; None if it cannot be read."""
    has_files: bool = True
    """Whether the core lists its mapped files."""

    @property
    def missing(self) -> list[Module]:
        """Return the files that a debugger will not find."""
        every = [*([self.executable] if self.executable else []), *self.libraries]
        return [module for module in every if module.found is None and module.build_id]


def read_modules(core_path: str, executable: str | None, roots: Sequence[str], cache: str) -> Modules:
    """Read which files a process was made of, and find them.

    Args:
        core_path: a core on this machine.
        executable: the program's path in the metadata. The kernel leaves the list of mapped files out of a core if
            it is too long.
        roots: directories with the files of the node or image, searched before this machine's own files.
        cache: the directory for files from debuginfod.
    """
    descriptor = os.open(core_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        source = Seekable(descriptor)
        core = read_core(source)
        build_ids, _ = read_build_ids(core, source)
        program = core.executable() or executable
        build_id = build_ids.get(program or "") or (None if core.files else _build_id_at_entry(core, source))
    except NotACoreError:
        return Modules(None, ())
    finally:
        os.close(descriptor)
    search = Search(roots, cache)
    main = search.find(Module(program, build_id, entry=core.entry), fetch=True) if program else None
    others = sorted(path for path in build_ids if path != program)
    libraries = tuple(search.find(Module(path, build_ids[path])) for path in others)
    return Modules(main, libraries, core.machine, has_files=bool(core.files))


def _build_id_at_entry(core: Core, source: Forward) -> str | None:
    """Return the build ID in the first ELF header at or below the program's first instruction."""
    if core.entry is None:
        return None
    top = core.entry // PAGE * PAGE
    for address in range(top, max(-1, top - MOST_PAGES_BELOW_ENTRY * PAGE), -PAGE):
        place = core.where(address, PAGE)
        if place is not None:
            page = source.reach(*place)
            if page.startswith(b"\x7fELF"):
                return build_id_of(page)
    return None


@dataclass(frozen=True, slots=True)
class Search:
    """The places in which files are searched."""

    roots: Sequence[str]
    cache: str

    def find(self, module: Module, *, fetch: bool = False) -> Module:
        """Return the module with the place of a file that has its build ID.

        A module without build ID is only accepted below a root, because nothing proves a file of this machine.
        """
        for root in [*self.roots, "/"]:
            for path in dict.fromkeys((module.path, module.path.removesuffix(DELETED))):
                candidate = inside(root, path)
                if candidate and self._fits(candidate, module, trusted=root != "/"):
                    return replace(module, found=candidate)
        known = module.build_id
        if known is None or not _BUILD_ID.fullmatch(known):
            return module
        for root in [*self.roots, "/"]:
            for folder in ("usr/lib/debug/.build-id", ".build-id"):
                candidate = inside(root, f"{folder}/{known[:2]}/{known[2:]}")
                if candidate and read_build_id(candidate) == known:
                    return replace(module, found=candidate)
        return replace(module, found=debuginfod(known, self.cache) if fetch else None)

    def _fits(self, candidate: str, module: Module, *, trusted: bool) -> bool:
        if module.build_id is not None:
            return read_build_id(candidate) == module.build_id
        return trusted and has_entry(candidate, module.entry)


def inside(root: str, path: str) -> str | None:
    """Return the file that a path leads to below a root, with links resolved within the root; None if there is none.

    A link in an image may be absolute, or climb with `..`: it never leaves the root.
    """
    parts, links = [p for p in path.split("/") if p][::-1], 0
    done: list[str] = []
    while parts:
        part = parts.pop()
        if part == ".":
            continue
        if part == "..":
            done = done[:-1]
            continue
        here = os.path.join(root, *done, part)
        try:
            mode = os.lstat(here).st_mode
            if stat.S_ISLNK(mode):
                links += 1
                if links > MOST_LINKS:
                    return None
                target = os.readlink(here)
                done = [] if target.startswith("/") else done
                parts += [p for p in target.split("/") if p][::-1]
                continue
        except (OSError, ValueError):
            return None
        done.append(part)
    found = os.path.join(root, *done)
    return found if os.path.isfile(found) else None


def has_entry(path: str, entry: int | None) -> bool:
    """Tell whether an ELF file can begin at an address: both have the same offset within a page."""
    if entry is None:
        return True
    try:
        with open(path, "rb") as file:
            front = file.read(64)
        return bool(Form(front[:6]).header.unpack_from(front)[3] % PAGE == entry % PAGE)
    except (OSError, NotACoreError, struct.error):
        return False


def read_build_id(path: str) -> str | None:
    """Return the build ID of an ELF file; None if it has none, or is not one."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  most files have it in their first page
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415  likewise

    try:
        with open(path, "rb") as file:
            quick = build_id_of(file.read(PAGE))
            if quick is not None:
                return quick
            file.seek(0)
            for section in ELFFile(file).iter_sections(type="SHT_NOTE"):
                for note in section.iter_notes():  # type: ignore[attr-defined,unused-ignore]
                    if note["n_type"] == "NT_GNU_BUILD_ID":
                        return str(note["n_desc"])
    except (ELFError, OSError, ValueError, KeyError, TypeError):
        return None
    return None


def debuginfod(build_id: str, cache: str) -> str | None:
    """Ask the servers in DEBUGINFOD_URLS for an executable; a file with another build ID is not used."""
    target = os.path.join(cache, f"{build_id}.executable")
    if os.path.isfile(target):
        return target
    for server in os.environ.get("DEBUGINFOD_URLS", "").split():
        if not server.startswith(("http://", "https://")):
            continue
        partial = f"{target}.{os.getpid()}"
        try:
            _download(f"{server.rstrip('/')}/buildid/{build_id}/executable", partial)
            if read_build_id(partial) == build_id:
                os.replace(partial, target)
                return target
            show.note(f"{server} sent a file with another build ID: not used")
        except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
            show.note(f"{server}: {error}")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
    return None


def _download(url: str, target: str) -> None:
    """Download a file.

    Raises:
        ValueError: it is too long, or takes too long.
        HTTPException: the answer is damaged.
        OSError: the server does not answer, or the file cannot be written.
    """
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "xb") as file:  # noqa: S310  http(s) alone
        while piece := answer.read1(BLOCK_BYTES):
            file.write(piece)
            if file.tell() > MOST_DOWNLOAD_BYTES:
                raise ValueError("too long for an executable")
            if time.monotonic() > deadline:
                raise ValueError(f"the download takes longer than {DOWNLOAD_SECONDS} s")
        if answer.length:  # what http.client still expects
            raise ValueError("the answer ended early")
