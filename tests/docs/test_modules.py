"""Every module of a package has its place in the page that explains the package, and the page names no others."""

import pytest
from tests.support.pages import ROOT, column, section

PAGES = {
    "collector/core_dump_collector": "architecture.md",
    "helper/core_dump_helper": "helper.md",
}


def modules(package):
    """Return the modules of a package as tables name them: `node/watch`."""
    paths = (path.relative_to(ROOT / package) for path in (ROOT / package).rglob("*.py"))
    return {str(path.with_suffix("")) for path in paths if path.name not in {"__init__.py", "__main__.py"}}


@pytest.mark.parametrize("package", PAGES)
def test_module_table_lists_every_module_once(package):
    named = column(section(PAGES[package]), "module")
    assert sorted(named) == sorted(modules(package))


def test_folder_table_lists_every_folder():
    named = column(section("architecture.md"), "folder")
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "._"}
    assert {name.partition("/")[0] for name in named} == folders - {"build", "dist"}
    assert all((ROOT / name).is_dir() for name in named)
