"""Owns finding the files that a core was made of, by build ID: below a sysroot, here, or from a debuginfod server."""

from __future__ import annotations

import os
import re
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING

from core_dump_format.core import read_build_ids, read_core
from core_dump_format.elf import PAGE, NotACoreError, build_id_of
from core_dump_format.stream import Forward
from core_dumps import show

if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_LINKS = 40
MOST_DOWNLOAD_BYTES = 4 * 1024**3
TIMEOUT_SECONDS = 60
_BUILD_ID = re.compile(r"[0-9a-f]{8,128}")


class CoreFile(Forward):
    """A core on this machine, read wherever is asked."""

    def __init__(self, descriptor: int) -> None:
        """Read by a descriptor that somebody else closes."""
        super().__init__(lambda _: b"", 0)
        self._descriptor = descriptor

    def reach(self, offset: int, size: int) -> bytes:
        """Return as many of the bytes at an offset as there are."""
        end = os.fstat(self._descriptor).st_size
        return os.pread(self._descriptor, size, offset) if offset < end else b""


@dataclass(frozen=True, slots=True)
class Module:
    """A file that was mapped in the process, and where it was found."""

    path: str
    build_id: str | None
    found: str | None = None


@dataclass(frozen=True, slots=True)
class Modules:
    """What a core was made of."""

    executable: Module | None
    libraries: tuple[Module, ...]

    @property
    def missing(self) -> list[Module]:
        """Return what a debugger will not find."""
        every = [*([self.executable] if self.executable else []), *self.libraries]
        return [module for module in every if module.found is None and module.build_id]


def read_modules(core_path: str, executable: str | None, roots: Sequence[str], cache: str) -> Modules:
    """Read which files a core was made of, and find them.

    Args:
        core_path: a core on this machine.
        executable: the path of the program where the core does not say.
        roots: directories that hold the node's or image's files, tried before this machine's own.
        cache: a directory for what debuginfod gives.
    """
    descriptor = os.open(core_path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        source = CoreFile(descriptor)
        core = read_core(source)
        build_ids, _ = read_build_ids(core, source)
    except NotACoreError:
        return Modules(None, ())
    finally:
        os.close(descriptor)
    program = core.executable() or executable
    search = Search(roots, cache)
    main = search.find(Module(program, build_ids.get(program)), fetch=True) if program else None
    others = sorted(path for path in build_ids if path != program)
    return Modules(main, tuple(search.find(Module(path, build_ids[path])) for path in others))


@dataclass(frozen=True, slots=True)
class Search:
    """Where files are looked for."""

    roots: Sequence[str]
    cache: str

    def find(self, module: Module, *, fetch: bool = False) -> Module:
        """Return the module with the place of a file of its build ID.

        Without a build ID only a file below a root is taken, since nothing proves one from here.
        """
        for root in [*self.roots, "/"]:
            candidate = inside(root, module.path)
            if candidate and self._fits(candidate, module.build_id, trusted=root != "/"):
                return Module(module.path, module.build_id, candidate)
        known = module.build_id
        if known is None or not _BUILD_ID.fullmatch(known):
            return module
        for root in [*self.roots, "/"]:
            for place in (
                f"usr/lib/debug/.build-id/{known[:2]}/{known[2:]}",
                f".build-id/{known[:2]}/{known[2:]}",
            ):
                candidate = inside(root, place)
                if candidate and read_build_id(candidate) == known:
                    return Module(module.path, known, candidate)
        return Module(module.path, known, debuginfod(known, self.cache) if fetch else None)

    def _fits(self, candidate: str, build_id: str | None, *, trusted: bool) -> bool:
        return trusted if build_id is None else read_build_id(candidate) == build_id


def inside(root: str, path: str) -> str | None:
    """Return where a path leads below a root, links taken as the root's own; None where to nothing.

    A link in an image may be absolute, or climb: it never leaves the root.
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


def read_build_id(path: str) -> str | None:
    """Return the build ID of an ELF file, None where it has none or is none."""
    from elftools.common.exceptions import ELFError  # noqa: PLC0415  most files tell it in their first page
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
    """Ask the servers of DEBUGINFOD_URLS for an executable; what they send must have its build ID."""
    target = os.path.join(cache, f"{build_id}.executable")
    if os.path.isfile(target):
        return target
    for server in os.environ.get("DEBUGINFOD_URLS", "").split():
        if not server.startswith(("http://", "https://")):
            continue
        url = f"{server.rstrip('/')}/buildid/{build_id}/executable"
        partial = f"{target}.{os.getpid()}"
        try:
            _download(url, partial)
        except (urllib.error.URLError, OSError, ValueError) as error:
            show.note(f"{server}: {error}")
        else:
            if read_build_id(partial) == build_id:
                os.replace(partial, target)
                return target
            show.note(f"{server} sent another file than the one asked for: not used")
        if os.path.lexists(partial):
            os.unlink(partial)
    return None


def _download(url: str, target: str) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer, open(target, "xb") as file:  # noqa: S310  http(s) alone
        while piece := answer.read(1024 * 1024):
            file.write(piece)
            if file.tell() > MOST_DOWNLOAD_BYTES:
                raise ValueError("too long for an executable")
