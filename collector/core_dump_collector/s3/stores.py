"""Owns the store of a worker: made by its first job, shared by its threads, replaced when its credentials are refused.

A store that is replaced may still be in use by other threads; it is closed when the last of them is done with it.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3 import classify
from core_dump_collector.s3.client import make_client
from core_dump_collector.s3.errors import RetryableError
from core_dump_collector.s3.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dump_collector.options import UploadOptions
    from core_dump_collector.s3.flow import Flow


class Stores:
    """The current store, and those that are still in use."""

    def __init__(self, options: UploadOptions, flow: Flow) -> None:
        """Start without one."""
        self._options = options
        self._flow = flow
        self._lock = threading.Lock()
        self._current: Store | None = None
        self._users: dict[Store, int] = {}

    def open(self) -> Store:
        """Return the current store; make its client, from the environment, if there is none.

        Raises:
            RetryableError: the client cannot be made now.
        """
        with self._lock:
            return self._open()

    def _open(self) -> Store:
        if self._current is None:
            try:
                client = make_client(self._options, self._flow)
            except BotoCoreError as error:
                raise classify.translate(error) from error
            self._current = Store(client, self._options, self._flow)
        return self._current

    @contextlib.contextmanager
    def lease(self) -> Iterator[Store]:
        """Use the current store; one whose credentials are refused gives way to one that reads them again.

        Raises:
            RetryableError: the client cannot be made now.
        """
        with self._lock:  # one step: a store that nobody uses may be closed at any moment
            store = self._open()
            self._users[store] = self._users.get(store, 0) + 1
        try:
            yield store
        except RetryableError as error:
            if error.reason == RetryReason.CREDENTIALS:
                self._retire(store)
            raise
        finally:
            self._release(store)

    def close(self) -> None:
        """Close the current store, unless it is in use; the next job makes another."""
        store = self._current
        if store is not None:
            self._retire(store)

    def _retire(self, store: Store) -> None:
        with self._lock:
            if self._current is not store:
                return
            self._current = None
            idle = store not in self._users
        if idle:
            store.close()

    def _release(self, store: Store) -> None:
        with self._lock:
            self._users[store] -= 1
            if self._users[store]:
                return
            del self._users[store]
            unwanted = self._current is not store
        if unwanted:
            store.close()
