"""Owns finding the files that were mapped in a crashed process on this machine: below a sysroot, or at their own paths.

A file is used only if its build ID is that of the core. Build IDs are hints: strip keeps them and they can be forged.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from core_dump_format.elf import PAGE, Form, NotACoreError, build_id_of
from core_dumps.dump import DELETED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MOST_LINKS = 40
BLOCK_BYTES = 1024 * 1024
BUILD_ID = re.compile(r"[0-9a-f]{8,128}")


@dataclass(frozen=True, slots=True)
class Module:
    """A file that was mapped in the process, and the place where it was found."""

    path: str
    build_id: str | None
    found: str | None = None
    entry: int | None = None
    """Address of the first instruction, for a program whose build ID is not known."""
    names: tuple[bytes, ...] = ()
    """Its names in the loader's list."""
    sha256: str = ""
    """Of the content, according to the list of modules; empty if unknown."""
    size_bytes: int = 0
    """Length of the content, likewise; 0 if unknown."""
    reason: str = ""
    """Why the node did not keep the file; empty if it did, or if that is unknown."""
    is_unproven: bool = False
    """Whether no build ID and no SHA-256 is known: any file with the right path is used."""


@dataclass(frozen=True, slots=True)
class Modules:
    """The files of a process."""

    executable: Module | None
    libraries: tuple[Module, ...]
    machine: str | None = None
    """Architecture of the core; None if it cannot be read."""
    has_files: bool = True
    """Whether the core lists its mapped files."""
    left_out: int = 0
    """Number of files that a limit kept out of the list of modules."""

    @property
    def every(self) -> list[Module]:
        """Return all of them, the executable first."""
        return [*([self.executable] if self.executable else []), *self.libraries]

    @property
    def missing(self) -> list[Module]:
        """Return the files that a debugger will not find."""
        return [m for m in self.every if m.found is None and (m.build_id or m.sha256 or m.reason)]

    def with_found(self, places: Mapping[str, str]) -> Modules:
        """Return the modules with the places of further files, which are given by build ID or SHA-256."""

        def placed(module: Module) -> Module:
            place = places.get(module.sha256) or places.get(module.build_id or "")
            return replace(module, found=place) if module.found is None and place else module

        executable = self.executable and placed(self.executable)
        return replace(self, executable=executable, libraries=tuple(map(placed, self.libraries)))


@dataclass(frozen=True, slots=True)
class Search:
    """The directories of this machine in which files are searched."""

    roots: Sequence[str]
    """Directories with the files of the node or image, searched before this machine's own files."""

    def find(self, module: Module) -> Module:
        """Return the module with the place of a file that has its build ID or its SHA-256.

        A module with neither is only accepted below a root, because nothing proves a file of this machine.
        """
        for root in [*self.roots, "/"]:
            for path in dict.fromkeys((module.path, module.path.removesuffix(DELETED))):
                candidate = inside(root, path)
                if candidate and _fits(candidate, module, named=root != "/"):
                    return replace(module, found=candidate)
        known = module.build_id
        if known is None or not BUILD_ID.fullmatch(known):
            return module
        for root in [*self.roots, "/"]:
            for folder in ("usr/lib/debug/.build-id", ".build-id"):
                candidate = inside(root, f"{folder}/{known[:2]}/{known[2:]}")
                if candidate and read_build_id(candidate) == known:
                    return replace(module, found=candidate)
        return module


def _fits(candidate: str, module: Module, *, named: bool) -> bool:
    """Tell whether a file is the module.

    Below a root that the user named, the build ID suffices: strip keeps it, and an unstripped file is better.
    """
    if not named and module.size_bytes and os.path.getsize(candidate) != module.size_bytes:
        return False
    if module.build_id is not None:
        return read_build_id(candidate) == module.build_id
    if module.sha256 and not named:
        return _sha256_of(candidate) == module.sha256
    return (named and has_entry(candidate, module.entry)) or module.is_unproven


def _sha256_of(path: str) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(BLOCK_BYTES):
                digest.update(piece)
    except OSError:
        return ""
    return digest.hexdigest()


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
                    if note["n_type"] == "NT_GNUBUILD_ID":
                        return str(note["n_desc"])
    except (ELFError, OSError, ValueError, KeyError, TypeError):
        return None
    return None


def has_debug_info(path: str) -> bool:
    """Tell whether an ELF file has DWARF debug information."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  few commands need it
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415  likewise

    try:
        with open(path, "rb") as file:
            return any(
                section.name in {".debug_info", ".zdebug_info"} for section in ELFFile(file).iter_sections()
            )
    except (ELFError, OSError, ValueError, KeyError, TypeError):
        return False
