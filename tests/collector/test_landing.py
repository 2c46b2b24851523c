"""The page at `/`: what people see, and nothing that a crashed process can make of it."""

import html.parser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core_dump_collector.landing import Fact, Overview, Recent, render, sized

HOSTILE = [
    "core-<script>alert(1)</script>-1-2-3.gz",
    'core-"onmouseover=x-1-2-3',
    "core-&lt;-1-2-3",
    "core-\x1b[31m\n-1-2-3",
    "core-\u202e-1-2-3",
    "core-\udcff-1-2-3",
]


class Page(html.parser.HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], set(), ""
        self.feed(page.decode())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def of(*names, why=""):
    recent = tuple(Recent(name, "uploaded", 1_790_000_000.0, is_good=True) for name in names)
    return render(Overview("node-1", (Fact("Directory", "/core_dumps"),), recent), why)


PLAIN = Page(of("core-app-1-2-3.gz"))


@pytest.mark.parametrize("name", HOSTILE)
def test_name_of_a_dump_is_text_and_nothing_else(name):
    page = Page(of(name))
    assert (page.tags, page.attributes) == (PLAIN.tags, PLAIN.attributes)
    assert all(character.isprintable() or character == "\n" for character in page.text)


@given(st.text(st.characters(), max_size=80))
def test_any_text_leaves_the_page_as_it_is(text):
    fact = Fact(text, text, is_good=False)
    page = Page(render(Overview(text, (fact,), (Recent(text, text, 0.0, is_good=False),)), text or "x"))
    assert page.tags == PLAIN.tags


def test_page_tells_state_and_dumps():
    page = Page(of("core-app-1-2-3.gz", why="not ready: the store does not take dumps: forbidden"))
    for word in ("node-1", "/core_dumps", "core-app-1-2-3.gz", "uploaded", "forbidden", "2026-09-21"):
        assert word in page.text
    assert "None since" in Page(of()).text
    assert "/metrics" in page.text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**42, "4.0 TiB"), (2**60, "1048576.0 TiB")],
)
def test_sizes_are_told_in_binary_units(number, text):
    assert sized(number) == text
