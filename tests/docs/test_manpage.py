"""The manual pages describe every command and option that --help shows, and every setting."""

import re
import shutil
import subprocess

import pytest
from tests.support import manuals
from tests.support.pages import ROOT
from typer.main import get_command
from typer.testing import CliRunner

from core_dumps.cli import app

PAGE = (ROOT / "docs/core-dumps.1").read_text().replace("\\-", "-").replace("\\fB", "").replace("\\fR", "")
COMMANDS = sorted(name for name, command in get_command(app).commands.items() if not command.hidden)


def sections():
    """Return the text of each command's part, with the options that all commands share added."""
    parts = dict(re.findall(r"^\.SS (\S+)\n(.*?)(?=^\.S[SH] )", PAGE, re.MULTILINE | re.DOTALL))
    shared = re.search(r"^\.SH OPTIONS OF EVERY COMMAND\n(.*?)^\.SH ", PAGE, re.MULTILINE | re.DOTALL)[1]
    return {name: text + shared for name, text in parts.items()}


def test_page_describes_every_command():
    assert sorted(sections()) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_page_describes_every_option_of_a_command(command):
    text = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).stdout
    shown = set(re.findall(r"(?:^ +|, )(--?[A-Za-z0-9][a-z0-9-]*)", text, re.MULTILINE))
    described = set(re.findall(r"(?:^|, )(--?[A-Za-z0-9][a-z0-9-]*)", sections()[command], re.MULTILINE))
    assert "--bucket" in shown
    assert shown - {"-h", "--help"} == described


@pytest.mark.parametrize("page", manuals.PAGES)
def test_page_is_the_one_of_this_code(page):
    assert (ROOT / "docs" / page).read_text() == manuals.PAGES[page](), "make docs"


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
@pytest.mark.parametrize("page", ["core-dumps.1", *manuals.PAGES])
def test_page_is_shown_without_a_warning(page):
    command = ["groff", "-man", "-Tutf8", "-z", "-wmac", "-wsyntax", "-wescape", ROOT / "docs" / page]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stderr == ""
