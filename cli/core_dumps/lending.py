"""Owns the files that `debuginfod` serves: the modules of dumps by build ID, each downloaded at its first request."""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING

from core_dump_format.text import printable
from core_dumps import show, stored
from core_dumps.buildid import has_debug_info, read_build_id
from core_dumps.errors import CliError
from core_dumps.pool import Pool
from core_dumps.serving import EXECUTABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from core_dump_format.modules import Module
    from core_dumps.bucket import Bucket
    from core_dumps.dump import Dump

READERS = 24


class _Silent:
    """Shows no progress: several clients may be served at a time."""

    def start(self, what: str, total_bytes: int | None) -> None:
        pass

    def advance(self, count: int) -> None:
        pass


class Shelf:
    """The modules of several dumps."""

    def __init__(
        self, bucket: Bucket, dumps: Iterable[Dump], cache: str, note: Callable[[str], None]
    ) -> None:
        """Read the lists of the dumps, newest first; the first module of a build ID counts.

        Raises:
            CliError: none of the dumps has a list.
        """
        self._bucket, self._cache, self._note = bucket, cache, note
        self._modules: dict[str, Module] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        with Pool(READERS) as pool:
            for dump, modules in pool.map(self._read, dumps):
                if not modules:
                    note(f"{printable(dump.key, 1100)} has no list of modules")
                for module in modules:
                    if module.build_id and module.sha256:
                        self._modules.setdefault(module.build_id, module)
        if not self._modules:
            raise CliError("the bucket has no files of these dumps: core-dumps modules tells why")

    def _read(self, dump: Dump) -> tuple[Dump, tuple[Module, ...]]:
        try:
            listed = stored.read_list(self._bucket, dump)
        except CliError as error:
            self._note(str(error))
            return dump, ()
        return dump, listed.modules if listed else ()

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._modules)

    def find(self, build_id: str, kind: str) -> str | None:
        """Return the path of a module; None if the bucket has no right one.

        The kind `debuginfo` takes a module with its own debug information.
        """
        module = self._modules.get(build_id)
        if module is None:
            return None
        with self._locks[module.sha256]:
            found = stored.fetch_modules(self._bucket, [module], self._cache, _Silent(), self._note)
        place = found.get(module.sha256)
        name = printable(module.path.decode("utf-8", "backslashreplace"))
        if place is None:
            self._note(f"{name} (build ID {build_id}) is not in the bucket")
            return None
        if read_build_id(place) != build_id:
            self._note(f"{name} has another build ID than the list says: not sent")
            return None
        if kind != EXECUTABLE and not has_debug_info(place):
            return None
        self._note(f"sent {name} ({show.size(module.size_bytes)})")
        return place
