"""Jobs have deadlines that grow with their size."""

from core_dump_collector.deadlines import seconds_for


def test_deadline_leaves_time_for_the_slowest_upload_that_is_allowed_and_for_requests_that_hang():
    assert seconds_for(0, 70, 1000) == 700
    assert seconds_for(50_000, 70, 1000) == 750


def test_no_file_is_so_large_that_a_hanging_worker_goes_unnoticed_for_more_than_a_day():
    assert seconds_for(10 << 40, 70, 1250) == 86_400
