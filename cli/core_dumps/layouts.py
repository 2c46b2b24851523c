"""Owns the search through a bucket whose keys follow several templates, such as those of an older release."""

from __future__ import annotations

from itertools import takewhile
from typing import TYPE_CHECKING

from core_dump_format.keys import MODULES_FOLDER, literal_folder
from core_dumps.pool import Pool
from core_dumps.walk import Pages, Walk, newest_first

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from core_dumps.dump import Dump
    from core_dumps.match import Query

    Head = tuple[list[Dump], Iterator[list[Dump]]]


def find(pages: Pages, prefix: str, templates: Sequence[str], query: Query) -> Iterator[list[Dump]]:
    """Yield the dumps that can match, newest first, in groups.

    Args:
        pages: lists the bucket.
        prefix: the beginning of all keys; empty, or ending in a slash.
        templates: of the keys below the prefix.
        query: selects the dumps.
    """
    folders = {folder for template in templates if (folder := literal_folder(template))}
    walks = []
    for template in dict.fromkeys(templates):
        foreign = folders - {literal_folder(template)} | {f"{MODULES_FOLDER}/"}
        walks.append(Walk(pages, prefix, template, query, foreign=foreign).groups())
    return merge(walks)


def merge(streams: Sequence[Iterator[list[Dump]]]) -> Iterator[list[Dump]]:
    """Merge streams of groups, each newest first, into one; a record that is in two of them is yielded once."""
    seen: set[tuple[str | None, str]] = set()
    heads = _pull(streams)
    while heads:
        certain = max((group[-1].timestamp, group[-1].key) for group, _ in heads)
        ready: list[Dump] = []
        rest: list[Head] = []
        ended: list[Iterator[list[Dump]]] = []
        for group, stream in heads:
            newest = _until(group, certain)
            ready += newest
            if older := group[len(newest) :]:
                rest.append((older, stream))
            else:
                ended.append(stream)
        yield [dump for dump in newest_first(ready) if _is_new(dump, seen)]
        heads = rest + _pull(ended)


def _until(group: list[Dump], last: tuple[int, str]) -> list[Dump]:
    """Return the first dumps of a group, up to a time and key, without looking at the others, perhaps 100,000."""
    return list(takewhile(lambda dump: (dump.timestamp, dump.key) >= last, group))


def _pull(streams: Sequence[Iterator[list[Dump]]]) -> list[Head]:
    """Return the next group of each stream that has one; all are listed at the same time."""
    with Pool(len(streams)) as pool:
        groups = list(pool.map(lambda stream: next(stream, []), streams))
    return [(group, stream) for group, stream in zip(groups, streams, strict=True) if group]


def _is_new(dump: Dump, seen: set[tuple[str | None, str]]) -> bool:
    """Tell whether a dump was not shown yet; both layouts may hold a record without a dump."""
    if dump.size_bytes is not None:
        return True
    known = (dump.text("node"), dump.key.rpartition("/")[2])
    is_new = known not in seen
    seen.add(known)
    return is_new
