import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_collector.node.corepattern import is_ours, read


@pytest.mark.parametrize(
    ("pattern", "ours"),
    [
        ("|/usr/libexec/core-dump-handler/core-dump-helper -P%P -- %e", True),
        ("/var/core_dumps/core-%e-%t-%P-%s", True),
        ("/core_dumps/core-%e-%t-%P-%s", True),
        ("|/usr/bin/dd of=/var/core_dumps/core-%e-%t-%P-%s conv=excl", True),
        ("|/usr/bin/dd of=/tmp/core-%e", False),
        ("core", False),
        ("", False),
        ("|/bin/false", False),
        ("|", False),
        ("|  ", False),
        ("/", False),
        ("|/usr/lib/systemd/systemd-coredump %P %u", False),
        ("/var/other/core", False),
        ("|/tmp/evil core-dump-helper", False),
        ("@/run/sock", False),
    ],
)
def test_pattern_is_ours_when_it_leads_here(pattern, ours):
    assert is_ours(pattern, "/core_dumps") is ours


def test_pattern_is_read_without_its_newline(tmp_path):
    (tmp_path / "p").write_text("core\n")
    assert read(str(tmp_path / "p")) == "core"
    assert read(str(tmp_path / "missing")) == ""


@given(st.text(max_size=127) | st.text(max_size=126).map("|".__add__), st.text(max_size=20))
def test_any_pattern_has_an_answer(pattern, directory):
    assert is_ours(pattern, directory) in {True, False}
