"""Documentation leads somewhere: every relative link and every named test or make target exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [t for t in targets if not re.match(r"[a-z]+:", t)]
    missing = [t for t in local if not (page.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_page_installs_this_project_by_a_name_that_is_not_published(page):
    assert not re.search(r"pip3? install [^\n]*\bcore-dump-handler(?!/)", page.read_text())


def test_make_targets_that_pages_name_exist():
    listed = subprocess.run(
        ["make", "-C", ROOT, "-s", "help"], capture_output=True, text=True, check=True
    ).stdout
    targets = {line.split()[0] for line in listed.splitlines()}
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", page.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page):
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()}
    named = {re.sub("::.*", "", code) for code in re.findall(r"`([a-z]+/[\w./:-]+)`", page.read_text())}
    assert [name for name in named if name.partition("/")[0] in folders and not (ROOT / name).exists()] == []
