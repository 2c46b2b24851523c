"""Owns RULES: an ordered list that chooses how much of a dump is kept. Imported only where the setting is not empty.

`trim exe=/usr/bin/java; nothing exe=/opt/batch/* signal=ABRT,6; metadata origin=unit:vault.service`: the first rule
wins whose conditions all hold; without conditions, a rule always holds. Names may hold the wildcards `*` and `?`.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` builds enums: 2 ms

from core_dump_helper.keep import METADATA, NOTHING, TRIM, WHOLE
from core_dump_helper.settings import are_numbers

ACTIONS = (WHOLE, TRIM, METADATA, NOTHING)
CONDITIONS = {
    "exe": "exe",
    "origin": "origin",
    "signal": "signal",
    "image": "image",
    "namespace": "namespace",
}
"""Attribute of the crash that each condition is compared with."""
FROM_RUNTIME = ("image", "namespace")
"""Attributes that only the container runtime's file has."""
FORM = "rules, separated by semicolons, of an action (%s) and conditions (%s=VALUE)" % (
    ", ".join(ACTIONS),
    "=, ".join(CONDITIONS),
)
MAX_RULES, MAX_VALUE_BYTES = 1000, 1000
MAX_SIGNAL = 64


class Rule:
    """One rule."""

    def __init__(self, action: str, conditions: list[tuple[str, list[bytes]]]) -> None:
        """Store the action, and attribute and patterns of each condition."""
        self.action, self.conditions = action, conditions

    def holds(self, metadata: dict[str, bytes]) -> bool:
        """Return whether every condition holds; one of an unknown attribute does not."""
        return all(
            any(matches(metadata[name], pattern) for pattern in patterns) if name in metadata else False
            for name, patterns in self.conditions
        )


def needs_runtime(text: str) -> bool:
    """Return whether a rule needs the container runtime's file; raises ValueError."""
    return any(name in FROM_RUNTIME for rule in parse_rules(text) for name, _ in rule.conditions)


def choose(text: str, metadata: dict[str, bytes]) -> str:
    """Return the action of the first rule that holds for a crash, or an empty string; raises ValueError."""
    return next((rule.action for rule in parse_rules(text) if rule.holds(metadata)), "")


def parse_rules(text: str) -> list[Rule]:
    """Return the rules of a setting; raises ValueError that says which rule is wrong."""
    parts = [part.split() for part in text.split(";")]
    if len(parts) > MAX_RULES:
        raise ValueError("%s; at most %d of them" % (FORM, MAX_RULES))
    return [_parse_rule(number, words) for number, words in enumerate(parts, 1) if words]


def _parse_rule(number: int, words: list[str]) -> Rule:
    if words[0] not in ACTIONS:
        raise ValueError("%s; rule %d begins with %a" % (FORM, number, words[0][:60]))
    conditions = []
    for word in words[1:]:
        name, _, value = word.partition("=")
        patterns = [value.encode("utf-8", "surrogateescape")]
        if name not in CONDITIONS or not value or len(patterns[0]) > MAX_VALUE_BYTES:
            raise ValueError("%s; rule %d has %a" % (FORM, number, word[:60]))
        if name == "signal":
            patterns = [_signal_number(number, each) for each in value.split(",")]
        conditions.append((CONDITIONS[name], patterns))
    return Rule(words[0], conditions)


def _signal_number(number: int, text: str) -> bytes:
    """Return a signal's number from `11`, `SEGV` or `SIGSEGV`."""
    name = text if text.startswith("SIG") else "SIG" + text
    found = int(text) if are_numbers([text], 2) else int(getattr(_signal, name, 0))
    if not 0 < found <= MAX_SIGNAL or "_" in text:
        raise ValueError("%s; rule %d has signal=%a, which is no signal" % (FORM, number, text[:60]))
    return b"%d" % found


def matches(value: bytes, pattern: bytes) -> bool:
    """Tell whether a pattern with the wildcards `*` and `?` describes all of a value.

    Only the last `*` is ever tried again, so the time is bounded by the product of both lengths.
    """
    at = place = 0
    star = back = -1
    while at < len(value):
        if place < len(pattern) and pattern[place] == STAR:
            star, back = place, at
            place += 1
        elif place < len(pattern) and pattern[place] in (value[at], QUESTION_MARK):
            at, place = at + 1, place + 1
        elif star >= 0:
            back += 1
            at, place = back, star + 1
        else:
            return False
    return not pattern[place:].strip(b"*")


STAR, QUESTION_MARK = b"*?"
