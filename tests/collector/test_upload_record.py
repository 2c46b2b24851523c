"""The upload record is read from an attribute that anybody may have written."""

import json

from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from core_dump_collector.s3 import record
from core_dump_format.attributes import UPLOAD_RECORD

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
FIELDS = st.fixed_dictionaries(
    {
        "state": st.sampled_from(["sending", "sent", "stored", "x"]),
        "key": st.text() | JSON,
        "modified_ns": JSON,
    },
    optional={"size": JSON, "crc32": JSON, "upload_id": JSON, "part_bytes": JSON, "more": JSON},
)


@limits(deadline=None)
@given(st.binary() | (JSON | FIELDS).map(lambda value: json.dumps(value).encode()), st.booleans())
def test_no_bytes_in_the_record_of_an_attempt_fail(raw, trusted):
    read = record.read({UPLOAD_RECORD: raw}, trusted=trusted)
    if read is not None:
        assert type(read.key) is str
        assert type(read.size) is int
        assert trusted or read.state is record.State.SENDING
