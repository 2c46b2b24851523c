"""A function fits a screen, and a module is one idea: the limits that keep the code readable."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["format", "helper", "collector", "cli", "sysctl"]
MOST_FUNCTION_LINES = 40
MOST_MODULE_LINES = 350


def modules(folder):
    return [path for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts]


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_function_is_longer_than_a_screen(folder):
    found = modules(folder)
    assert found
    for path in found:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < MOST_FUNCTION_LINES, f"{path}: {node.name}"


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_module_is_longer_than_its_limit(folder):
    for path in modules(folder):
        assert len(path.read_text().splitlines()) <= MOST_MODULE_LINES, path
