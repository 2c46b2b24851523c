"""Who may import whom: the shared format stands on nothing, the two readers of it do not stand on each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"core_dump_format", "core_dump_helper", "core_dump_collector", "core_dumps"}
ALLOWED = {
    "format/core_dump_format": {"core_dump_format"},
    "helper/core_dump_helper": {"core_dump_helper", "core_dump_format"},
    "collector/core_dump_collector": {"core_dump_collector", "core_dump_format"},
    "cli/core_dumps": {"core_dumps", "core_dump_format"},
}


def imported(path):
    """Return the top-level packages that a module imports, at its top or anywhere else."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_package_imports_only_the_packages_below_it(folder):
    modules = list((ROOT / folder).rglob("*.py"))
    assert modules
    for module in modules:
        assert imported(module) & OURS <= ALLOWED[folder], module


def test_the_format_needs_the_standard_library_and_isal_at_most():
    import sys

    for module in (ROOT / "format/core_dump_format").glob("*.py"):
        assert imported(module) <= set(sys.stdlib_module_names) | {"core_dump_format", "isal"}, module
