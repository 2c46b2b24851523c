"""Owns one pass over `.modules/`, in a process of its own: publishes lists, stores modules, removes what is too old.

Dumps go through the worker pool and wait for nothing here. A module is deleted when the bucket has an object under its
key, a list when it is published. If a pass ends early, the next one finds the rest on disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import time
from typing import TYPE_CHECKING, TypeVar

from core_dump_collector.board import Seat
from core_dump_collector.jobs import RetryReason
from core_dump_collector.moduleevents import Event, Kind
from core_dump_collector.node.modulefiles import RECEIPT_SUFFIX, Contents, File, ModuleFiles
from core_dump_collector.s3 import documents
from core_dump_collector.s3.errors import PermanentError, RetryableError, StoreError
from core_dump_collector.s3.flow import Flow
from core_dump_collector.s3.modules import MOST_BYTES, Stored, store_module
from core_dump_collector.s3.parts import FilePart
from core_dump_collector.s3.stores import Stores
from core_dump_format.gzip import DamagedError, inflate
from core_dump_format.keys import MODULES_LIST_SUFFIX
from core_dump_format.modules import (
    KNOWN_SECONDS,
    MOST_MODULE_BYTES,
    ListError,
    list_name,
    parse_list,
    parse_module_name,
)
from core_dump_format.names import PARTIAL_SUFFIX
from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from core_dump_collector.options import UploadOptions

T = TypeVar("T")
MOST_WAITING_BYTES = 4 << 30
"""Most bytes of modules and lists that wait. The helper has its own limit; this one does not rely on it."""
SETTLED_SECONDS = 60.0
"""A partial file, or a receipt without a list, is left alone for so long."""
ORPHAN_SECONDS = 3600.0
"""A list whose dump is not in the watch directory is kept for so long."""
LOOK_SECONDS = 1.0
"""Between modules, new lists are looked for after so long."""
MOST_FAILURES = 3
"""A pass ends after so many lists, or modules, have failed."""
_OF_THE_STORE = frozenset(RetryReason) - {RetryReason.CHECKSUM, RetryReason.UNPROVEN, RetryReason.SERVER}
"""Failures that every other object would meet too."""


class _ListsDueError(Exception):
    """Modules wait, because lists are small and a dump without its list names no file."""


class Pass:
    """One pass over the directory."""

    def __init__(self, directory: str, options: UploadOptions, report: Callable[[Event], None]) -> None:
        """Prepare; the client is made when something is sent."""
        self._directory = directory
        self._options = options
        self._report = report
        self._stores = Stores(options, Flow(Seat.private(options.shared_bytes_per_second)))
        self._failure: RetryableError | OSError | None = None
        self._looked_at = 0.0

    def run(self, *, lists: bool, modules: bool) -> None:
        """Clean up; then, if wanted, publish lists or store modules.

        Args:
            lists: lists of stored dumps are due.
            modules: modules are due.
        """
        try:
            with ModuleFiles(self._directory) as files:
                found = self._clean(files, files.scan())
                if lists:
                    self._each(list(found.receipts), lambda dump: self._publish(files, dump, found))
                if modules:
                    known = found.receipts.keys()
                    self._each(found.modules, lambda file: self._send(files, file, known))
        except _ListsDueError:
            self._report(Event(Kind.INTERRUPTED, ""))
        except (RetryableError, OSError) as error:
            self._failure = error
        finally:
            self._stores.close()
        if self._failure is not None:
            self._report(_explain(self._failure))

    def _each(self, items: Sequence[T], step: Callable[[T], None]) -> None:
        """Take a step for each item, in random order: nodes that crash together share the work.

        One that fails does not hold up the others.
        """
        failures = 0
        for item in random.sample(items, len(items)):
            try:
                step(item)
            except (RetryableError, OSError) as error:
                self._failure = error
                failures += 1
                if isinstance(error, BrokenPipeError) or getattr(error, "reason", "") in _OF_THE_STORE:
                    raise
                if failures >= MOST_FAILURES:
                    return

    # Removing

    def _clean(self, files: ModuleFiles, found: Contents) -> Contents:
        """Remove the files that nobody will send, and return the rest."""
        now = time.time()
        for file in found.partials:
            if now - file.modified_at > SETTLED_SECONDS:
                files.remove_abandoned(file.name)
        modules = [file for file in found.modules if not self._is_withheld(files, file)]
        modules = [file for file in modules if not self._is_outdated(files, file, now)]
        for dump, file in found.receipts.items():
            if now - file.modified_at > SETTLED_SECONDS and not files.expects_list(dump):
                files.remove(file.name)
        lists = {
            dump: file for dump, file in found.lists.items() if not self._is_orphan(files, dump, found, now)
        }
        return self._make_room(files, Contents(modules, lists, found.receipts))

    def _is_withheld(self, files: ModuleFiles, file: File) -> bool:
        parsed = parse_module_name(file.name)
        if self._options.upload_sensitive or parsed is None or not parsed.is_sensitive:
            return False
        return self._drop(files, file, Kind.WITHHELD)

    def _is_outdated(self, files: ModuleFiles, file: File, now: float) -> bool:
        return now - file.modified_at > KNOWN_SECONDS and self._drop(files, file, Kind.DROPPED_AGE)

    def _is_orphan(self, files: ModuleFiles, dump: str, found: Contents, now: float) -> bool:
        file = found.lists[dump]
        receipt = found.receipts.get(dump)
        if receipt is not None:
            is_old = now - receipt.modified_at > KNOWN_SECONDS
            return is_old and self._drop(files, file, Kind.LIST_DROPPED)
        if now - file.modified_at < ORPHAN_SECONDS:
            return False
        names = (dump, dump + PARTIAL_SUFFIX)
        if any(os.path.lexists(os.path.join(self._directory, name)) for name in names):
            return False
        return self._drop(files, file, Kind.LIST_DROPPED)

    def _make_room(self, files: ModuleFiles, found: Contents) -> Contents:
        """Remove the oldest modules, then the oldest lists, until the rest fits."""
        excess = found.size_bytes - MOST_WAITING_BYTES
        for file in sorted(found.modules, key=lambda file: file.modified_at):
            if excess > 0 and self._drop(files, file, Kind.DROPPED_SPACE):
                found.modules.remove(file)
                excess -= file.size_bytes
        for dump, file in sorted(found.lists.items(), key=lambda item: item[1].modified_at):
            if excess > 0 and self._drop(files, file, Kind.LIST_DROPPED):
                del found.lists[dump]
                excess -= file.size_bytes
        return found

    def _drop(self, files: ModuleFiles, file: File, kind: Kind) -> bool:
        if files.remove(file.name):
            self._report(Event(kind, file.name, file.size_bytes))
        return True

    # Sending

    def _publish(self, files: ModuleFiles, dump: str, found: Contents) -> None:
        """Publish the list of a stored dump; remove one that is damaged or belongs to another dump."""
        file, receipt = found.lists.get(dump), files.read_receipt(dump)
        if file is None:
            return
        kind, detail = Kind.LIST_DROPPED, "the receipt is of no use"
        try:
            content = files.read_list(dump)
            listed = parse_list(content)
            withheld = listed.sensitive and not self._options.upload_sensitive
            if listed.dump != dump:
                detail = "it is the list of another dump"
            elif withheld:
                detail = "of a sensitive dump"
            elif receipt is not None and receipt.bucket == self._options.bucket:
                documents.put(self._stores.open(), receipt.key + MODULES_LIST_SUFFIX, content)
                kind, detail = Kind.LIST_PUBLISHED, receipt.key
        except (ListError, PermanentError) as error:
            detail = printable(str(error))
        files.remove(list_name(dump))
        files.remove(dump + RECEIPT_SUFFIX)
        self._report(Event(kind, file.name, file.size_bytes, detail))

    def _send(self, files: ModuleFiles, file: File, known: Collection[str]) -> None:
        """Store one module and delete it; one that cannot be read is left for its age to remove.

        Raises:
            _ListsDueError: a dump that is not `known` was stored meanwhile, and its list waits.
        """
        try:
            fd = files.open(file.name)
        except OSError:
            return
        try:
            size = os.fstat(fd).st_size
            self._report(Event(Kind.SENDING, file.name, size))
            outcome, detail = self._store_open(file.name, FilePart(fd, 1, 0, size, last=True))
            if files.remove(file.name, fd):
                self._report(Event(outcome, file.name, size, detail))
        finally:
            os.close(fd)
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            here, self._looked_at = files.scan(), time.monotonic()
            if (here.receipts.keys() & here.lists.keys()) - set(known):
                raise _ListsDueError

    def _store_open(self, name: str, part: FilePart) -> tuple[Kind, str]:
        parsed = parse_module_name(name)
        if parsed is None or not has_content(part, parsed.sha256):
            return Kind.DROPPED_WRONG, "its content is not that of its name"
        if part.size_bytes > MOST_BYTES:
            return Kind.DROPPED_REFUSED, "larger than one request can store"
        try:
            stored = store_module(self._stores.open(), self._options.prefix, parsed.sha256, part)
        except PermanentError as error:
            return Kind.DROPPED_REFUSED, printable(str(error))
        return _KINDS[stored], ""


def _explain(error: RetryableError | OSError) -> Event:
    if isinstance(error, RetryableError):
        return Event(Kind.FAILED, error.reason, detail=printable(str(error)))
    return Event(Kind.FAILED, RetryReason.LOCAL_IO, detail=printable(error.strerror or str(error)))


_KINDS = {
    Stored.UPLOADED: Kind.UPLOADED,
    Stored.PRESENT: Kind.PRESENT,
    Stored.UNPROVEN: Kind.UNPROVEN,
}


def has_content(part: FilePart, sha256: str) -> bool:
    """Tell whether a gzip file is whole and its content has this SHA-256."""
    digest, size_bytes = hashlib.sha256(), 0
    try:
        for piece in inflate(map(bytes, part.blocks())):
            digest.update(piece)
            size_bytes += len(piece)
            if size_bytes > MOST_MODULE_BYTES:
                return False
    except DamagedError:
        return False
    return digest.hexdigest() == sha256


def run(
    directory: str, options: UploadOptions, report: Callable[[Event], None], *, lists: bool, modules: bool
) -> None:
    """Make one pass; a fault of ours is reported, and the next pass goes on."""
    try:
        Pass(directory, options, report).run(lists=lists, modules=modules)
    except StoreError as error:
        report(Event(Kind.FAILED, "server", detail=printable(str(error))))
    except Exception as error:  # noqa: BLE001  the boundary of the process
        with contextlib.suppress(OSError):
            report(Event(Kind.FAILED, "internal", detail=printable(repr(error))))
