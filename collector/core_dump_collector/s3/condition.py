"""Owns the question whether requests carry `If-None-Match: *`, by which a store refuses to overwrite an object.

A store that does not know the header may refuse it with 400, 412 or 501, and so may a proxy for a moment. So the
condition counts as unknown only after the same request has succeeded without it, and is tried again after a time.

A store may also ignore the header and overwrite. So the condition protects nothing until the store is known to honour
it: Amazon S3 does, and so does a store that has once answered 412. Until then keys are looked at before they are
written. Where HEAD is refused, `learn` stores a tiny object twice, and the second response tells.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Literal

from core_dump_collector.jobs import RetryReason
from core_dump_collector.s3.errors import (
    ConditionRefusedError,
    PermanentError,
    RetryableError,
    TakenError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_collector.s3.store import Store

Mode = Literal["auto", "true", "false"]
LOOKS_BEFORE_PROBE = 8
"""After so many keys the store is asked: a HEAD before each small dump would be a third of its requests."""
UNKNOWN_SECONDS = 600.0
"""How long the condition counts as unknown."""
PROBE_NAME = ".condition"
"""The object in the folder of the node by which the collector learns whether the store honours the condition."""
_PROBE = b'{"written by": "core-dump-collector, to learn whether the store honours If-None-Match"}\n'
_AMAZON = (".amazonaws.com", ".amazonaws.com.cn")


class Condition:
    """What is known of the store's conditions."""

    def __init__(self, mode: Mode, host: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        """Start with what the setting CONDITIONAL says and whose store it is."""
        self.mode = mode
        self._clock = clock
        self._unknown_until = 0.0
        self._ignored = False
        self._looks = 0
        self._probe_at = LOOKS_BEFORE_PROBE
        self._trusted = self._trusted_with_parts = mode == "true" or host.endswith(_AMAZON)

    @property
    def is_used(self) -> bool:
        """Tell whether the next request carries the condition."""
        known = not self._ignored and self._clock() >= self._unknown_until
        return self.mode == "true" or (self.mode == "auto" and known)

    @property
    def is_trusted(self) -> bool:
        """Tell whether the next request carries the condition and the store is known to honour it."""
        return self.is_used and self._trusted

    @property
    def is_trusted_with_parts(self) -> bool:
        """Tell the same of a multipart upload: Ceph 16 honours the condition in PutObject alone."""
        return self.is_used and self._trusted_with_parts

    def count_look(self) -> bool:
        """Count a key that has to be looked at; tell whether to ask the store first, each time much later."""
        self._looks += 1
        if self._looks < self._probe_at:
            return False
        self._probe_at *= LOOKS_BEFORE_PROBE
        return True

    def trust(self, *, parts: bool) -> None:
        """Note that the store has refused to overwrite an object, with one request or with parts."""
        self._trusted = True
        self._trusted_with_parts |= parts

    def ignore(self) -> None:
        """Note that the store has overwritten an object although the request carried the condition."""
        self._ignored = True

    def forget(self) -> None:
        """Note that a request has succeeded only without the condition."""
        self._unknown_until = self._clock() + UNKNOWN_SECONDS


def must_look(store: Store, *, parts: bool) -> bool:
    """Return whether a key has to be looked at before it is written with the condition."""
    condition = store.condition
    if parts:  # a HEAD costs little there
        return not condition.is_trusted_with_parts
    if condition.is_trusted:
        return False
    if condition.count_look():
        with contextlib.suppress(RetryableError):
            return not learn(store)
    return True


def learn(store: Store) -> bool:
    """Return whether the condition protects other objects; ask a store of which it is not known, once.

    Raises:
        RetryableError: no response to rely on.
    """
    condition = store.condition
    if condition.is_trusted or not condition.is_used:
        return condition.is_trusted
    try:
        for _ in range(2):
            store.put_document(store.condition_key, _PROBE, conditional=True)
    except TakenError:
        return True  # the store has noted it
    except (ConditionRefusedError, PermanentError):
        return False
    except RetryableError as error:
        if error.reason != RetryReason.FORBIDDEN:
            raise
        return False
    condition.ignore()
    return False
