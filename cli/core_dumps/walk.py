"""Owns the way through the keys of a bucket: which parts of it are listed for a query, and what names say of dumps.

A key template is walked folder by folder: a segment that the query knows costs no request, dates outside the asked
time are left out. Once there are enough folders to list side by side, all below each is listed in one go.
"""

from __future__ import annotations

import re
import string
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from core_dump_format.keys import clean_segment
from core_dump_format.names import parse_name
from core_dumps.dump import SIDECAR_SUFFIX, Dump, Value

if TYPE_CHECKING:
    from collections.abc import Iterator

    from core_dumps.client import Page, Row
    from core_dumps.match import Query

LISTERS = 12
DAY_SECONDS = 86400
_PLACES = frozenset({"node", "namespace", "pod", "container"})
_RECORD = re.compile(r"storm-[0-9a-f]+-(?P<timestamp>[0-9]{1,12})")
_EVER = 10**11


class Pages(Protocol):
    """Lists what begins with a prefix, after a key; with a delimiter, what is common to many as one folder."""

    def __call__(self, prefix: str, *, after: str = "", delimiter: str = "") -> Iterator[Page]:
        """Yield the pages of a listing."""


class Walk:
    """One query's way through a template."""

    def __init__(self, pages: Pages, prefix: str, template: str, query: Query) -> None:
        """Ask nothing yet.

        Args:
            pages: lists the bucket.
            prefix: what all keys begin with; empty, or with a slash at its end.
            template: of the keys below it.
            query: what is asked for.
        """
        self._pages, self._prefix, self._query = pages, prefix, query
        self._segments = template.split("/")
        self._pattern = _pattern(template)
        self._first, self._last = _dates(query)
        self._places_in_name = any(f"{{{place}}}" in self._segments[-1] for place in _PLACES)
        self._places = lru_cache(maxsize=1024)(self._find_places)

    def groups(self) -> Iterator[list[Dump]]:
        """Yield the dumps that may be meant, newest first.

        In pieces where dates come first in the template, so that the newest is shown while the rest is listed; else
        in one, since names that begin with a command say nothing of the order in time.
        """
        literal = 0
        while "{" not in self._segments[literal]:
            literal += 1
        if self._segments[literal] == "{date}" and literal < len(self._segments) - 1:
            yield from self._by_day(literal)
            return
        with ThreadPoolExecutor(LISTERS) as pool:
            folders = [(self._prefix, 0)]
            while (further := self._deeper(pool, folders)) is not None:
                folders = further
            found = [dump for leaf in pool.map(self._leaf, folders) for dump in leaf]
        if found:
            yield _newest_first(found)

    def _by_day(self, depth: int) -> Iterator[list[Dump]]:
        """Yield each day's dumps; more days are listed ahead the more are asked for."""
        top = self._prefix + "".join(f"{segment}/" for segment in self._segments[:depth])
        days = sorted(self._below(top, depth), reverse=True)
        with ThreadPoolExecutor(LISTERS) as pool:
            ahead, waiting = 1, deque[Any]()
            try:
                while days or waiting:
                    while days and len(waiting) < ahead:
                        waiting.append(pool.submit(self._day, days.pop(0), depth + 1))
                    found = waiting.popleft().result()
                    ahead = min(2 * ahead, LISTERS)
                    if found:
                        yield found
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _day(self, folder: str, depth: int) -> list[Dump]:
        """List what lies below a day, at once unless the query knows a folder in it."""
        folders = [(folder, depth)]
        while any(self._known(segment) for segment in self._segments[folders[0][1] : -1]):
            folders = [below for each in folders for below in self._step(each)]
            if not folders:
                return []
        return _newest_first([dump for each in folders for dump in self._leaf(each)])

    def _deeper(
        self, pool: ThreadPoolExecutor, folders: list[tuple[str, int]]
    ) -> list[tuple[str, int]] | None:
        """Return the folders one level down; None where these are to be listed."""
        depth = folders[0][1] if folders else len(self._segments)
        rest = self._segments[depth:-1]
        if not rest or (len(folders) >= LISTERS and not any(self._known(segment) for segment in rest)):
            return None
        return [folder for below in pool.map(self._step, folders) for folder in below]

    def _known(self, segment: str) -> str | None:
        """Return the one folder that the query leaves of a segment."""
        field = segment[1:-1]
        value = self._query.only(field) if segment == f"{{{field}}}" and field in _PLACES else None
        return None if value is None else clean_segment(value)

    def _step(self, folder: tuple[str, int]) -> list[tuple[str, int]]:
        """Return what lies one level below a folder and may hold what is meant."""
        path, depth = folder
        segment = self._segments[depth]
        known = segment if "{" not in segment else self._known(segment)
        below = self._below(path, depth) if known is None else [f"{path}{known}/"]
        return [(each, depth + 1) for each in below]

    def _below(self, folder: str, depth: int) -> list[str]:
        """List the folders in a folder; of dates those alone that may be meant."""
        dates = self._segments[depth] == "{date}"
        # a store may take a folder's bare name for the folder itself: so the day before, and what sorts behind its /
        after = f"{folder}{self._first}~" if dates and self._first else ""
        pages = self._pages(folder, delimiter="/", after=after)
        found = [folder for page in pages for folder in page.folders]
        return [f for f in found if not dates or f.removesuffix("/").rpartition("/")[2] <= self._last]

    def _leaf(self, folder: tuple[str, int]) -> list[Dump]:
        """List all below a folder.

        A thread's name asked for is a prefix, and then the time is one to start after; so is a date that comes next.
        """
        prefix, depth = folder
        after, end = "", ""
        thread, segment = self._query.only("thread"), self._segments[depth]
        if segment == "{name}" and thread is not None:
            prefix += f"core-{clean_segment(thread)}-"
            if (
                self._query.since >= 10**9
            ):  # so many digits have all times since 2001, so text sorts as numbers
                after = f"{prefix}{int(self._query.since) - 1}~"
        elif segment == "{date}":
            after, end = f"{prefix}{self._first}~" if self._first else "", f"{prefix}{self._last}~"
        rows: dict[str, Row] = {}
        for page in self._pages(prefix, after=after):
            rows |= {row.key: row for row in page.rows}
            if end and page.rows and page.rows[-1].key > end:
                break
        return self._dumps(rows)

    def _dumps(self, rows: dict[str, Row]) -> list[Dump]:
        """Return the dumps among the rows of a listing, each with its sidecar, that may be meant."""
        found = []
        for key, row in rows.items():
            owner = key.removesuffix(SIDECAR_SUFFIX)
            if owner == key:
                dump = self._dump(key, row.size_bytes, row, has_sidecar=f"{key}{SIDECAR_SUFFIX}" in rows)
            elif owner not in rows:
                dump = self._dump(owner, None, row, has_sidecar=True)
            else:
                continue
            if self._query.may_match(dump):
                found.append(dump)
        return found

    def _dump(self, key: str, size: int | None, row: Row, *, has_sidecar: bool) -> Dump:
        match = self._pattern.fullmatch(key, len(self._prefix))
        named: dict[str, Value] = (
            {k: v for k, v in match.groupdict().items() if k in _PLACES} if match else {}
        )
        last = key.rpartition("/")[2]
        core = parse_name(last)
        if core is not None:
            named["thread"], named["pid"] = core.comm, core.pid
            named["signal"], named["timestamp"] = core.signal, core.timestamp
            return Dump(key, size, core.timestamp, has_sidecar, named)
        record = _RECORD.fullmatch(last)
        timestamp = int(record["timestamp"]) if record else row.modified_seconds
        return Dump(key, size, timestamp, has_sidecar, named)

    def _find_places(self, key: str) -> dict[str, Value]:
        """Return what the folders of a key say, the same for all in one."""
        match = self._pattern.fullmatch(key, len(self._prefix))
        return {k: v for k, v in match.groupdict().items() if k in _PLACES} if match else {}


def _newest_first(dumps: list[Dump]) -> list[Dump]:
    dumps.sort(key=lambda dump: (dump.timestamp, dump.key), reverse=True)
    return dumps


def _pattern(template: str) -> re.Pattern[str]:
    """Return what keys of a template look like."""
    seen: set[str] = set()
    pattern = ""
    for literal, field, _, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if field is not None:
            pattern += "[^/]+?" if field in seen else f"(?P<{field}>[^/]+?)"
            seen.add(field)
    return re.compile(pattern + r"(\.gz)?")


def _dates(query: Query) -> tuple[str, str]:
    """Return the day before the first, and the last, that a query can mean, as `YYYY-MM-DD`; empty for any first."""
    before = query.since - DAY_SECONDS
    first = datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%d") if before > 0 else ""
    last = (
        datetime.fromtimestamp(query.until, UTC).strftime("%Y-%m-%d") if query.until < _EVER else "9999-12-31"
    )
    return first, last
