"""Owns threads that never delay the end of a command: Ctrl-C and errors take effect at once."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool:
    """Runs calls on daemon threads.

    A ThreadPoolExecutor waits for its threads when it is left, and the interpreter waits for them again. A thread
    that reads from a slow network would then hold up an interrupted command for as long as the read takes.
    """

    def __init__(self, threads: int) -> None:
        """Start no thread yet; each is started with one of the first calls."""
        self._most_threads = threads
        self._threads: list[threading.Thread] = []
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._left = threading.Event()

    def __enter__(self) -> Self:
        """Return the pool."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop the calls that have not begun, and wait for none that has."""
        self._left.set()
        for _thread in self._threads:
            self._calls.put(None)

    def submit(self, call: Callable[[Item], Result], item: Item) -> Future[Result]:
        """Queue a call."""
        future: Future[Result] = Future()
        self._calls.put((future, lambda: call(item)))
        if len(self._threads) < self._most_threads:
            thread = threading.Thread(target=self._work, daemon=True)
            self._threads.append(thread)
            thread.start()
        return future

    def map(self, call: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of the items."""
        futures = [self.submit(call, item) for item in items]
        for future in futures:
            yield future.result()

    def _work(self) -> None:
        while (queued := self._calls.get()) is not None:
            future, call = queued
            if self._left.is_set() or not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001  whoever waits for the result gets it
                future.set_exception(error)
