"""Owns the walk through the keys of a bucket: which folders are listed for a query, and the facts that keys contain.

A key template is walked folder by folder. A segment whose value the query gives costs no request, and dates outside
the query's time are skipped. Once there are enough folders for parallel requests, each is listed with all below it.
"""

from __future__ import annotations

import re
import string
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from core_dump_format.keys import MODULES_LIST_SUFFIX, UNKNOWN, clean_segment
from core_dump_format.names import parse_name
from core_dumps.dump import METADATA_SUFFIX, Dump, Value
from core_dumps.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from core_dumps.client import Page, Row
    from core_dumps.match import Query

LISTERS = 12
DAY_SECONDS = 86400
_PLACES = frozenset({"node", "namespace", "pod", "container"})
_RECORD = re.compile(r"storm-[0-9a-f]+-(?P<timestamp>[0-9]{1,12})")
_PROBE = re.compile(r"\.(condition|check-.*)")
"""Objects by which the collector tests the store."""
_EVER = 10**11
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


class Pages(Protocol):
    """Lists the keys that begin with a prefix and sort after a key; with a delimiter, folders instead of their keys."""

    def __call__(self, prefix: str, *, after: str = "", delimiter: str = "") -> Iterator[Page]:
        """Yield the pages of a listing."""


class Walk:
    """The walk of one query through a template."""

    def __init__(
        self, pages: Pages, prefix: str, template: str, query: Query, *, foreign: Collection[str] = ()
    ) -> None:
        """Prepare; nothing is listed yet.

        Args:
            pages: lists the bucket.
            prefix: the beginning of all keys; empty, or ending in a slash.
            template: KEY_TEMPLATE of the keys below the prefix.
            query: selects the dumps.
            foreign: folders below the prefix whose keys follow other rules.
        """
        self._pages, self._prefix, self._query = pages, prefix, query
        self._foreign = tuple(prefix + folder for folder in foreign)
        self._segments = template.split("/")
        self._pattern = _pattern(template)
        self._first, self._last = _dates(query)

    def groups(self) -> Iterator[list[Dump]]:
        """Yield the dumps that can match, newest first.

        If the template begins with dates, there is one group for each day, so the newest day is shown while older
        days are still listed. Otherwise there is one group, because names that begin with a command do not sort by
        time.
        """
        literal = 0
        while "{" not in self._segments[literal]:
            literal += 1
        if self._segments[literal] == "{date}" and literal < len(self._segments) - 1:
            yield from self._by_day(literal)
            return
        with Pool(LISTERS) as pool:
            folders = [(self._prefix, 0)]
            while (further := self._deeper(pool, folders)) is not None:
                folders = further
            found = [dump for leaf in pool.map(self._leaf, folders) for dump in leaf]
        if found:
            yield newest_first(found)

    def _by_day(self, depth: int) -> Iterator[list[Dump]]:
        """Yield the dumps of each day; the more days are consumed, the more are listed ahead."""
        top = self._prefix + "".join(f"{segment}/" for segment in self._segments[:depth])
        days = sorted(self._below(top, depth), reverse=True)
        with Pool(LISTERS) as pool:
            ahead, waiting = 1, deque[Any]()
            while days or waiting:
                while days and len(waiting) < ahead:
                    waiting.append(pool.submit(self._day, (days.pop(0), depth + 1)))
                found = waiting.popleft().result()
                ahead = min(2 * ahead, LISTERS)
                if found:
                    yield found

    def _day(self, folder: tuple[str, int]) -> list[Dump]:
        """List a day in one go, or only the folders in it that the query names."""
        folders = [folder]
        while any(self._known(segment) for segment in self._segments[folders[0][1] : -1]):
            folders = [below for each in folders for below in self._step(each)]
            if not folders:
                return []
        return newest_first([dump for each in folders for dump in self._leaf(each)])

    def _deeper(self, pool: Pool, folders: list[tuple[str, int]]) -> list[tuple[str, int]] | None:
        """Return the folders one level down; None if these are to be listed as they are."""
        depth = folders[0][1] if folders else len(self._segments)
        rest = self._segments[depth:-1]
        if not rest or (len(folders) >= LISTERS and not any(self._known(segment) for segment in rest)):
            return None
        return [folder for below in pool.map(self._step, folders) for folder in below]

    def _known(self, segment: str) -> str | None:
        """Return the only folder of a segment that the query allows, if it names one."""
        field = segment[1:-1]
        value = self._query.only(field) if segment == f"{{{field}}}" and field in _PLACES else None
        return None if value is None else clean_segment(value)

    def _step(self, folder: tuple[str, int]) -> list[tuple[str, int]]:
        """Return the folders one level below a folder that can hold matching dumps."""
        path, depth = folder
        segment = self._segments[depth]
        known = segment if "{" not in segment else self._known(segment)
        below = self._below(path, depth) if known is None else [f"{path}{known}/"]
        return [(each, depth + 1) for each in below]

    def _below(self, folder: str, depth: int) -> list[str]:
        """List the folders in a folder; dates outside the query's time are left out."""
        dates = self._segments[depth] == "{date}"
        # some stores skip a folder whose bare name is given, so start behind the day before (`~` sorts behind `/`)
        after = f"{folder}{self._first}~" if dates and self._first else ""
        pages = self._pages(folder, delimiter="/", after=after)
        found = [f for page in pages for f in page.folders if f not in self._foreign]
        return [f for f in found if not dates or self._may_hold(f[len(folder) : -1])]

    def _may_hold(self, date: str) -> bool:
        """Tell whether a folder is that of a date up to the query's end; `unknown` stands for dates after 9999."""
        return date <= self._last if _DATE.fullmatch(date) else date == UNKNOWN and self._query.until > _EVER

    def _leaf(self, folder: tuple[str, int]) -> list[Dump]:
        """List everything below a folder.

        A thread's name in the query is a prefix of names, and then its start time is a key to start after; a date
        is one as well.
        """
        prefix, depth = folder
        after, end = "", ""
        thread, segment = self._query.only("thread"), self._segments[depth]
        if segment == "{name}" and thread is not None:
            prefix += f"core-{clean_segment(thread)}-"
            if self._query.since >= 10**9:  # times since 2001 have ten digits, so they sort as text
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
        """Return the dumps in a listing that can match; each knows whether its metadata object is there too."""
        found = []
        for key, row in rows.items():
            if _PROBE.fullmatch(key.rpartition("/")[2]) or key.startswith(self._foreign):
                continue
            owner = key.removesuffix(METADATA_SUFFIX)
            if owner == key:
                metadata, modules = f"{key}{METADATA_SUFFIX}" in rows, f"{key}{MODULES_LIST_SUFFIX}" in rows
                dump = self._dump(key, row.size_bytes, row, has_metadata=metadata, has_modules=modules)
            elif owner not in rows and not key.endswith(MODULES_LIST_SUFFIX):
                dump = self._dump(owner, None, row, has_metadata=True)
            else:
                continue
            if self._query.may_match(dump):
                found.append(dump)
        return found

    def _dump(
        self, key: str, size: int | None, row: Row, *, has_metadata: bool, has_modules: bool = False
    ) -> Dump:
        match = self._pattern.fullmatch(key, len(self._prefix))
        from_key: dict[str, Value] = (
            {k: v for k, v in match.groupdict().items() if k in _PLACES} if match else {}
        )
        last = key.rpartition("/")[2]
        core = parse_name(last)
        if core is not None:
            from_key["thread"], from_key["pid"] = core.comm, core.pid
            from_key["signal"], from_key["timestamp"] = core.signal, core.timestamp
            return Dump(key, size, core.timestamp, has_metadata, from_key, has_modules=has_modules)
        record = _RECORD.fullmatch(last)
        timestamp = int(record["timestamp"]) if record else row.modified_seconds
        return Dump(key, size, timestamp, has_metadata, from_key, has_modules=has_modules)


def newest_first(dumps: list[Dump]) -> list[Dump]:
    """Sort dumps in place and return them."""
    dumps.sort(key=lambda dump: (dump.timestamp, dump.key), reverse=True)
    return dumps


def _pattern(template: str) -> re.Pattern[str]:
    """Return a pattern of the keys of a template."""
    seen: set[str] = set()
    pattern = ""
    for literal, field, _, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if field is not None:
            pattern += "[^/]+?" if field in seen else f"(?P<{field}>[^/]+?)"
            seen.add(field)
    return re.compile(pattern + r"(\.gz)?")


def _dates(query: Query) -> tuple[str, str]:
    """Return the day before the first matching day, empty if there is none, and the last one, as `YYYY-MM-DD`."""
    before = query.since - DAY_SECONDS
    first = datetime.fromtimestamp(before, UTC).strftime("%Y-%m-%d") if before > 0 else ""
    last = (
        datetime.fromtimestamp(query.until, UTC).strftime("%Y-%m-%d") if query.until < _EVER else "9999-12-31"
    )
    return first, last
