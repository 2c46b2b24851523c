"""Pages list every setting with its default, and name no setting that does not exist."""

import re

import pytest
from tests.support.pages import ROOT, codes, column, rows, section

from core_dump_collector.cli import main
from core_dump_collector.config import Settings, names_of
from core_dump_helper.settings import Settings as HelperSettings

COLLECTOR = {name.upper() for field in Settings.model_fields for name in names_of(field)}
HELPER = set(HelperSettings.defaults())
OTHERS = re.compile(
    "AWS_[A-Z0-9_]+|CORE_DUMPS_CACHE|CORE_DUMP_ROOT|DEBUGINFOD_URLS|MALLOC_ARENA_MAX|NO_COLOR|PYTHON[A-Z]*"
)
"""Variables of boto3, of `core-dumps`, of the bootstrap script, of debuggers and of Python."""
NOT_SETTINGS = re.compile(
    "RLIMIT_CORE|O_[A-Z]+|IN_[A-Z_]+|F_[A-Z]+|PR_[A-Z_]+|CAP_[A-Z_]+|NT_[A-Z]+|PN_XNUM|MADV_[A-Z_]+|DAC_OVERRIDE|[A-Z]+_IA|TRUNCATED_REASONS"
)
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_configuration_lists_every_setting_of_the_collector():
    current = {names_of(field)[0].upper() for field in Settings.model_fields}
    assert set(column(section("configuration.md"), "setting")) == current


def test_help_of_the_collector_shows_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    flags = set(re.findall(r"^ +--([a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {name.replace("-", "_") for name in flags} >= {
        names_of(field)[0] for field in Settings.model_fields
    }


def test_page_of_the_helper_lists_every_setting_with_its_default():
    listed = {codes(key)[0]: default.strip("`") for key, default, *_ in rows(section("helper.md"), "key")}
    assert listed == {key: str(value) for key, value in HelperSettings.defaults().items()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_exists(page):
    words = {word for code in codes(page.read_text()) for word in re.findall(r"^[A-Z]+_[A-Z_]+(?==|$)", code)}
    unknown = {word for word in words if not OTHERS.fullmatch(word) and not NOT_SETTINGS.fullmatch(word)}
    assert unknown - {"BUCKET_NAME", "KEY_TEMPLATE"} <= COLLECTOR | HELPER
