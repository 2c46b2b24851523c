"""Owns the request that makes an object visible: with or without condition, and until its outcome is known.

`verdict` decides what a response means; the record is written before each step whose outcome may stay unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from core_dump_collector.jobs import Outcome, RetryReason
from core_dump_collector.metadata import StoredObject
from core_dump_collector.s3.condition import learn, must_look
from core_dump_collector.s3.errors import (
    CollisionError,
    ConditionRefusedError,
    GoneError,
    HeadRefusedError,
    OwnKeyNeededError,
    PermanentError,
    RetryableError,
    TakenError,
    UnprovenError,
)
from core_dump_collector.s3.record import State, UploadRecord
from core_dump_collector.s3.verdict import (
    Answer,
    Content,
    Found,
    Seen,
    Tried,
    Verdict,
    advise,
    compare,
    judge,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_collector.s3.store import Store


@dataclass(frozen=True, slots=True)
class Candidate:
    """An object that is about to become visible."""

    stored: StoredObject
    content: Content
    send: Callable[[bool], Found]
    """Send the request; the argument says whether on the condition that the key is free."""
    upload_id: str = ""


class Publisher:
    """Makes objects of one dump visible under one key."""

    def __init__(self, store: Store, record: UploadRecord, *, own_key: bool) -> None:
        """Say whether the key is derived from the content, so that nothing else can have it."""
        self._store = store
        self._record = record
        self._own_key = own_key

    def settle(self, stored: StoredObject, content: Content) -> Outcome | None:
        """Return the outcome of an earlier attempt; None if the dump is to be sent.

        Raises:
            CollisionError, OwnKeyNeededError, UnprovenError, RetryableError
        """
        conditional = self._store.condition.is_used
        return self._look_first(stored, content, self._record.tried(stored), conditional=conditional)

    def require_not_completed(self, stored: StoredObject, content: Content) -> None:
        """Make sure that an upload that is gone has not become the object.

        Raises:
            UnprovenError, RetryableError
        """
        seen = self._look(stored.key, content)
        verdict = judge(Answer.GONE, seen, self._record.tried(stored), guarded=True)
        if verdict is Verdict.UNDECIDABLE:
            self._apply(verdict, Answer.GONE, seen, stored)

    def publish(self, candidate: Candidate) -> Outcome:
        """Send the request and return its outcome.

        Raises:
            CollisionError, OwnKeyNeededError, UnprovenError, RetryableError, PermanentError
        """
        tried = self._record.tried(candidate.stored)
        condition = self._store.condition
        if condition.is_used and must_look(self._store, parts=bool(candidate.upload_id)):
            outcome = self._look_first(candidate.stored, candidate.content, tried, conditional=True)
            if outcome is not None:
                return outcome
        if not condition.is_used:
            return self._publish_without_condition(candidate, tried)
        try:
            answer, tried = self._send_with_condition(candidate, tried)
        except ConditionRefusedError:
            return self._learn_without_condition(candidate, tried)
        outcome = self._conclude(answer, candidate, tried)
        return outcome or self._learn_without_condition(candidate, tried)

    def _send_with_condition(self, candidate: Candidate, tried: Tried) -> tuple[Answer, Tried]:
        """Send the request, a second time if it is refused: a proxy refuses much for a moment."""
        try:
            return self._send(candidate, tried, conditional=True)
        except ConditionRefusedError:
            return self._send(candidate, tried, conditional=True)

    def _learn_without_condition(self, candidate: Candidate, tried: Tried) -> Outcome:
        """Find out whether the store refuses the condition or the request."""
        outcome = self._publish_without_condition(candidate, tried)
        self._store.condition.forget()
        return outcome

    def _publish_without_condition(self, candidate: Candidate, tried: Tried) -> Outcome:
        outcome = self._look_first(candidate.stored, candidate.content, tried, conditional=False)
        if outcome is None:
            answer, tried = self._send(candidate, tried, conditional=False)
            outcome = self._conclude(answer, candidate, tried)
        if outcome is None:
            raise RetryableError(
                RetryReason.SERVER, "the store calls the key taken, and shows that it is free"
            )
        return outcome

    def _look_first(
        self, stored: StoredObject, content: Content, tried: Tried, *, conditional: bool
    ) -> Outcome | None:
        seen = self._look(stored.key, content)
        guarded = self._own_key or (conditional and seen is Seen.REFUSED and learn(self._store))
        verdict = self._limit(judge(Answer.NONE, seen, tried, guarded=guarded), Answer.NONE, seen, tried)
        return self._apply(verdict, Answer.NONE, seen, stored)

    def _conclude(self, answer: Answer, candidate: Candidate, tried: Tried) -> Outcome | None:
        stored = candidate.stored
        if answer is Answer.UNPROVEN:
            self._record.write(State.UNPROVEN, stored)
        seen = Seen.SAME if answer is Answer.PROVEN else self._look(stored.key, candidate.content)
        verdict = self._limit(judge(answer, seen, tried, guarded=True), answer, seen, tried)
        return self._apply(verdict, answer, seen, stored)

    def _limit(self, verdict: Verdict, answer: Answer, seen: Seen, tried: Tried) -> Verdict:
        """Leave only one key because the store shows another object than was sent: the next one would be no better."""
        written = answer is Answer.UNPROVEN or tried is not Tried.NEVER
        if seen is not Seen.OTHER or not written:
            return verdict
        if self._record.moved:
            return Verdict.UNDECIDABLE
        self._record.moved = verdict is Verdict.COLLISION
        return verdict

    def _send(self, candidate: Candidate, tried: Tried, *, conditional: bool) -> tuple[Answer, Tried]:
        stored = candidate.stored
        self._record.write(State.SENT, stored, candidate.upload_id)
        try:
            found = candidate.send(conditional)
        except TakenError as error:
            if tried is not Tried.NEVER:
                return Answer.TAKEN, tried
            if error.by_us:
                return Answer.TAKEN, Tried.UNKNOWN
            self._take_back(candidate)
            return Answer.TAKEN, Tried.NEVER
        except GoneError as error:
            return Answer.GONE, Tried.UNKNOWN if error.by_us and tried is Tried.NEVER else tried
        except (RetryableError, PermanentError) as error:
            unknown = isinstance(error, RetryableError) and error.outcome_unknown
            if not unknown and tried is Tried.NEVER:
                self._take_back(candidate)
            raise
        proven = compare(found, candidate.content) is Seen.SAME
        return Answer.PROVEN if proven else Answer.UNPROVEN, tried

    def _take_back(self, candidate: Candidate) -> None:
        """Record that nothing became visible."""
        if candidate.upload_id:
            nothing = StoredObject(candidate.stored.key, 0, 0)
            self._record.write(State.SENDING, nothing, candidate.upload_id)
        else:
            self._record.clear()

    def _look(self, key: str, content: Content) -> Seen:
        try:
            found = self._store.look(key)
        except HeadRefusedError:
            return Seen.REFUSED
        return Seen.ABSENT if found is None else compare(found, content)

    def _apply(self, verdict: Verdict, answer: Answer, seen: Seen, stored: StoredObject) -> Outcome | None:
        """Return the outcome, None to send the request, or raise what keeps the dump on disk."""
        match verdict:
            case Verdict.SEND:
                return None
            case Verdict.UPLOADED | Verdict.ALREADY_STORED:
                self._record.write(State.STORED, stored)
                return Outcome.UPLOADED if verdict is Verdict.UPLOADED else Outcome.ALREADY_STORED
            case Verdict.COLLISION:
                raise CollisionError(stored, seen=seen is not Seen.REFUSED)
            case Verdict.OWN_KEY:
                raise OwnKeyNeededError(stored.size_bytes, stored.crc32)
            case Verdict.UNDECIDABLE:
                self._record.write(State.UNPROVEN, stored)
                raise UnprovenError(advise(seen, sends_checksums=self._store.sends_checksums))
        if answer is Answer.GONE:
            raise RetryableError(RetryReason.SERVER, "the multipart upload is gone; it starts again")
        self._record.write(State.SENT, stored)
        raise RetryableError(RetryReason.CHECKSUM, "the store does not have the dump as it was sent")
