"""The judgement of a response: the whole table, and that nothing but proof counts as stored."""

import itertools
import zlib
from base64 import b64encode
from hashlib import md5

import pytest

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

NEVER, UNKNOWN, ACKNOWLEDGED = Tried.NEVER, Tried.UNKNOWN, Tried.ACKNOWLEDGED
SEND, UPLOADED, STORED = Verdict.SEND, Verdict.UPLOADED, Verdict.ALREADY_STORED
COLLISION, OWN_KEY, RETRY, UNDECIDABLE = (
    Verdict.COLLISION,
    Verdict.OWN_KEY,
    Verdict.RETRY,
    Verdict.UNDECIDABLE,
)

#                           never tried           tried, unknown        acknowledged without proof
#                        guarded  unguarded    guarded  unguarded      guarded  unguarded
TABLE = {
    (Answer.NONE, Seen.SAME):       (STORED, STORED,         STORED, STORED,           STORED, STORED),
    (Answer.NONE, Seen.OTHER):      (COLLISION, COLLISION,   COLLISION, COLLISION,     COLLISION, COLLISION),
    (Answer.NONE, Seen.SILENT):     (COLLISION, COLLISION,   UNDECIDABLE, UNDECIDABLE, UNDECIDABLE, UNDECIDABLE),
    (Answer.NONE, Seen.ABSENT):     (SEND, SEND,             SEND, SEND,               SEND, SEND),
    (Answer.NONE, Seen.REFUSED):    (SEND, OWN_KEY,          SEND, UNDECIDABLE,        UNDECIDABLE, UNDECIDABLE),
    (Answer.UNPROVEN, Seen.SAME):   (UPLOADED,) * 6,
    (Answer.UNPROVEN, Seen.OTHER):  (RETRY,) * 6,
    (Answer.UNPROVEN, Seen.SILENT): (UNDECIDABLE,) * 6,
    (Answer.UNPROVEN, Seen.ABSENT): (RETRY,) * 6,
    (Answer.UNPROVEN, Seen.REFUSED): (UNDECIDABLE,) * 6,
    (Answer.TAKEN, Seen.SAME):      (STORED,) * 6,
    (Answer.TAKEN, Seen.OTHER):     (COLLISION,) * 6,
    (Answer.TAKEN, Seen.SILENT):    (COLLISION, COLLISION,   UNDECIDABLE, UNDECIDABLE, UNDECIDABLE, UNDECIDABLE),
    (Answer.TAKEN, Seen.ABSENT):    (SEND,) * 6,
    (Answer.TAKEN, Seen.REFUSED):   (COLLISION, COLLISION,   UNDECIDABLE, UNDECIDABLE, UNDECIDABLE, UNDECIDABLE),
    (Answer.GONE, Seen.SAME):       (UPLOADED,) * 6,
    (Answer.GONE, Seen.OTHER):      (RETRY,) * 6,
    (Answer.GONE, Seen.SILENT):     (RETRY, RETRY,           UNDECIDABLE, UNDECIDABLE, UNDECIDABLE, UNDECIDABLE),
    (Answer.GONE, Seen.ABSENT):     (RETRY,) * 6,
    (Answer.GONE, Seen.REFUSED):    (RETRY, RETRY,           UNDECIDABLE, UNDECIDABLE, UNDECIDABLE, UNDECIDABLE),
}  # fmt: skip
COLUMNS = list(itertools.product((NEVER, UNKNOWN, ACKNOWLEDGED), (True, False)))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0].name}-{row[1].name}")
def test_every_response_has_one_meaning(row):
    assert [judge(*row, tried, guarded=guarded) for tried, guarded in COLUMNS] == list(TABLE[row])


def test_the_table_has_every_case():
    assert set(TABLE) == set(itertools.product(set(Answer) - {Answer.PROVEN}, Seen))


@pytest.mark.parametrize(("tried", "guarded"), COLUMNS)
def test_a_proof_in_the_response_needs_nothing_else(tried, guarded):
    assert judge(Answer.PROVEN, None, tried, guarded=guarded) is UPLOADED


def test_nothing_counts_as_stored_unless_the_dump_was_seen_or_proven():
    columns = [*COLUMNS, (Tried.PROVEN, True), (Tried.PROVEN, False)]
    for answer, seen, (tried, guarded) in itertools.product(set(Answer) - {Answer.PROVEN}, Seen, columns):
        if judge(answer, seen, tried, guarded=guarded) in {UPLOADED, STORED}:
            believed = (answer, tried) == (Answer.NONE, Tried.PROVEN) and seen in {Seen.SILENT, Seen.REFUSED}
            assert seen is Seen.SAME or believed


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (Seen.SAME, STORED),
        (Seen.SILENT, STORED),
        (Seen.REFUSED, STORED),
        (Seen.ABSENT, SEND),
        (Seen.OTHER, COLLISION),
    ],
)
def test_an_earlier_proof_holds_unless_the_object_is_gone_or_another(seen, verdict):
    assert {judge(Answer.NONE, seen, Tried.PROVEN, guarded=guarded) for guarded in (True, False)} == {verdict}


BYTES = b"a dump"
CRC32 = b64encode(zlib.crc32(BYTES).to_bytes(4, "big")).decode()
MD5 = md5(BYTES, usedforsecurity=False).hexdigest()
CONTENT = Content(len(BYTES), zlib.crc32(BYTES), lambda: MD5)
PARTS = Content(len(BYTES), zlib.crc32(BYTES), lambda: f"{MD5}-3", lambda: "abcdEF==-3")
FOUND = [
    ("checksum", CONTENT, Found(None, CRC32, "x"), Seen.SAME),
    ("length and checksum", CONTENT, Found(6, CRC32, ""), Seen.SAME),
    ("checksum of another object", CONTENT, Found(6, "AAAAAA==", MD5), Seen.OTHER),
    ("another length with our checksum", CONTENT, Found(5, CRC32, MD5), Seen.OTHER),
    ("length alone", CONTENT, Found(6, None, ""), Seen.SILENT),
    ("MD5", CONTENT, Found(None, None, f'"{MD5.upper()}"'), Seen.SAME),
    ("another MD5, or no MD5 at all", CONTENT, Found(6, None, "0" * 32), Seen.SILENT),
    ("an ETag of another form", CONTENT, Found(6, None, "5f8d1b2c-1a"), Seen.SILENT),
    ("checksum of the parts' checksums", PARTS, Found(None, "abcdEF==-3", ""), Seen.SAME),
    ("that without the number of parts", PARTS, Found(None, "abcdEF==", ""), Seen.SAME),
    ("neither, and no number of parts", PARTS, Found(None, "AAAAAA==", ""), Seen.OTHER),
    ("that of other parts", PARTS, Found(6, "abcdEF==-4", ""), Seen.SILENT),
    ("MD5 of the parts' MD5s", PARTS, Found(6, None, f"{MD5}-3"), Seen.SAME),
    ("that of other parts", PARTS, Found(6, None, f"{MD5}-4"), Seen.SILENT),
    ("MD5 of the whole for an object of parts", PARTS, Found(6, None, MD5), Seen.SILENT),
    ("parts where there should be one", CONTENT, Found(6, "abcdEF==-3", MD5), Seen.SILENT),
]


@pytest.mark.parametrize(
    ("content", "found", "seen"), [row[1:] for row in FOUND], ids=[row[0] for row in FOUND]
)
def test_what_a_store_says_is_compared_with_what_was_sent(content, found, seen):
    assert compare(found, content) is seen


def test_the_md5_is_not_computed_where_a_checksum_decides():
    never = Content(6, zlib.crc32(BYTES), lambda: pytest.fail("read"), lambda: pytest.fail("read"))
    assert compare(Found(6, CRC32, MD5), never) is Seen.SAME
    assert compare(Found(6, None, "no-md5"), never) is Seen.SILENT


def test_the_advice_names_a_permission_or_a_setting():
    assert "s3:GetObject" in advise(Seen.REFUSED, sends_checksums=True)
    assert "CHECKSUM=when_supported" in advise(Seen.REFUSED, sends_checksums=False)
    assert "CHECKSUM=when_supported" in advise(Seen.SILENT, sends_checksums=False)
    assert "checksum" in advise(Seen.SILENT, sends_checksums=True)
    assert "checksum" in advise(Seen.OTHER, sends_checksums=True)
