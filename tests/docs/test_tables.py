import pytest
from tests.support import tables


@pytest.mark.parametrize("page", sorted(tables.TABLES))
def test_table_in_docs_is_what_the_code_says(page):
    assert (tables.DOCS / page).read_text() == tables.expected(page), "run make docs"
