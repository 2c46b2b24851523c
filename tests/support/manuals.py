"""Writes the manual pages of the programs on a node, from their own help: `python tests/support/manuals.py --write`."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "sysctl"), str(ROOT / "helper"), str(ROOT / "format")]

from core_dump_collector import cli, config  # noqa: E402  the path comes first
from core_dump_helper import VERSION  # noqa: E402
from core_dump_setup import cli as setup  # noqa: E402

SETUP_FILES = {
    "/etc/core-dump-handler/helper.conf": "the helper's settings: core-dump-helper(8)",
    "/etc/sysctl.d/69-core-dump.conf": "sets the core pattern at boot",
    "/var/lib/core-dump-handler/": "the pattern that was replaced, the fastest compressor, checksums of files",
}
COLLECTOR_FILES = {
    "/core_dumps": "the usual watch directory",
    "/etc/core-dump-handler/collector.env": "settings of core-dump-collector.service, as NAME=VALUE",
}
HELPER_FILES = {
    "/etc/core-dump-handler/helper.conf": "the settings; it must belong to root",
    "/core_dumps": "the usual watch directory",
}
CODES = {"0": "Done.", "1": "A check or a step failed.", "2": "Wrong usage or configuration."}
HELPER_TEXT = """
The kernel starts this program at every crash, as kernel.core_pattern says, and pipes the core into it. It compresses
the core while the kernel writes it, and renames the dump into place when it is whole. What it does is logged to the
kernel's log: dmesg | grep core-dump-helper.

A wrong setting is logged and has its default. Unlike other programs it reads its settings at every crash."""


@dataclass
class Page:
    """One manual page: the title, and the parts in their order."""

    name: str
    summary: str
    see: tuple[str, ...]
    lines: list[str] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Begin a part."""
        self.lines.append(f".SH {title}")

    def text(self, text: str) -> None:
        """Add paragraphs."""
        for number, paragraph in enumerate(text.strip().split("\n\n")):
            self.lines += [".PP"] * bool(number) + [escape(" ".join(paragraph.split()))]

    def item(self, term: str, text: str) -> None:
        """Add a term with its explanation."""
        self.lines += [".TP", rf"\fB{escape(term)}\fR", escape(" ".join(text.split()))]

    def items(self, title: str, found: dict[str, str]) -> None:
        """Add a part that consists of terms."""
        self.section(title)
        for term, text in found.items():
            self.item(term, text)

    def render(self) -> str:
        """Return the page in man(7)."""
        title = (
            f'.TH {escape(self.name.upper())} 8 "" "core\\-dump\\-handler {VERSION}" "System Administration"'
        )
        head = [title, ".SH NAME", escape(f"{self.name} - {self.summary}")]
        see = [".SH SEE ALSO", escape(", ".join(self.see))]
        return "\n".join([*head, *self.lines, *see]) + "\n"


def escape(text: str) -> str:
    """Return text that roff prints as it is."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return "\\&" + text if text[:1] in {".", "'"} else text


def commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Yield name, help and parser of each command."""
    (found,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in found._choices_actions:
        yield action.dest, action.help or "", found.choices[action.dest]


def options(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield each option of a command, without the settings, and its help."""
    settings = {
        "--" + name.replace("_", "-") for key in config.Settings.model_fields for name in config.names_of(key)
    }
    for action in parser._actions:
        names = [name for name in action.option_strings if name not in settings]
        if names and action.dest != "help":
            yield (
                " ".join([*names, str(action.metavar or "")]).strip(),
                (action.help or "").replace("%%", "%"),
            )


def of_parser(page: Page, parser: argparse.ArgumentParser) -> None:
    """Add synopsis and commands."""
    page.section("SYNOPSIS")
    for name, _, command in commands(parser):
        words = [f"[{option}]" for option, _ in options(command)]
        words += [str(action.metavar) for action in command._actions if not action.option_strings]
        page.lines += [rf"\fB{escape(f'{page.name} {name}')}\fR {escape(' '.join(words))}".rstrip(), ".br"]
    page.section("DESCRIPTION")
    page.text(parser.description or "")
    page.section("COMMANDS")
    for name, text, command in commands(parser):
        page.lines.append(f".SS {escape(name)}")
        page.text(text[:1].upper() + text[1:] + ".")
        for option, explained in options(command):
            page.item(option, explained[:1].upper() + explained[1:] + ".")


def collector() -> str:
    """Return core-dump-collector(8)."""
    page = Page(
        "core-dump-collector",
        "upload core dumps to S3",
        ("core-dumps(1)", "core-dump-helper(8)", "core-dump-setup(8)"),
    )
    of_parser(page, cli._parser())
    page.section("SETTINGS")
    page.text(
        "run and check take each of these as a flag or as an environment variable: --bucket-name or BUCKET_NAME."
    )
    for key, info in config.Settings.model_fields.items():
        default = config.default_text(info)
        text = f"{info.description}" + (f" Default: {default}." if default else "")
        page.item(", ".join(name.upper() for name in config.names_of(key)), text.replace("`", ""))
    page.items("EXIT STATUS", CODES)
    page.items("FILES", COLLECTOR_FILES)
    return page.render()


def installer() -> str:
    """Return core-dump-setup(8)."""
    page = Page(
        "core-dump-setup",
        "install the core dump helper and prove that it works",
        ("core-dump-helper(8)", "core(5)"),
    )
    of_parser(page, setup._parser())
    page.items("EXIT STATUS", CODES)
    page.items("FILES", SETUP_FILES)
    return page.render()


def helper() -> str:
    """Return core-dump-helper(8)."""
    page = Page(
        "core-dump-helper",
        "write a core dump that the kernel pipes",
        ("core-dump-setup(8)", "core(5)", "sysctl.d(5)"),
    )
    page.section("SYNOPSIS")
    pattern = re.search(
        r"^kernel\.core_pattern=(.*)$", (ROOT / "sysctl/69-core-dump.conf").read_text(), re.MULTILINE
    )
    words = ("kernel.core_pattern=" + (pattern[1] if pattern else "")).partition(" ")
    page.lines += [escape(words[0]), ".br", escape(words[2])]
    for flag in ("--calibrate", "--check", "--version"):
        page.lines += [".br", rf"\fB{escape(page.name + ' ' + flag)}\fR"]
    page.section("DESCRIPTION")
    page.text(HELPER_TEXT)
    page.section("SETTINGS")
    comment: list[str] = []
    for line in (ROOT / "sysctl/helper.conf").read_text().splitlines():
        name, equals, value = line.lstrip("#").partition("=")
        if equals and name.isupper():
            page.item(name, " ".join([*comment, f"Default: {value}." if value else "Empty by default."]))
            comment = []
        else:
            comment = [*comment, line.lstrip("# ").replace("`", "")] if line else []
    page.items("FILES", HELPER_FILES)
    return page.render()


PAGES = {"core-dump-collector.8": collector, "core-dump-setup.8": installer, "core-dump-helper.8": helper}

if __name__ == "__main__" and "--write" in sys.argv:
    for page_name, render in PAGES.items():
        (ROOT / "docs" / page_name).write_text(render())
