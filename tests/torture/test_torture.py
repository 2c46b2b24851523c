"""A short seeded run of the torture; `make torture` runs it at length."""

import pytest
from tests.support import kernel
from tests.support.cleanup import temporary_directory
from tests.torture.__main__ import torture


@pytest.mark.timeout(180)
def test_chain_survives_kills_and_faults_at_random() -> None:
    if not kernel.can_crash():
        pytest.skip("crashes real processes, needs root: sudo make test")
    with temporary_directory("cdh-", "/var/tmp") as directory:
        assert torture(rounds=20, seed=20, scratch=directory) == []
