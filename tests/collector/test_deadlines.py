"""Jobs have deadlines that grow with their size, counted from when they run."""

from core_dump_collector.deadlines import Deadlines, seconds_for


def test_deadline_leaves_time_for_the_slowest_upload_that_is_allowed_and_for_requests_that_hang():
    assert seconds_for(0, 70, 1000) == 700
    assert seconds_for(50_000, 70, 1000) == 750


def test_no_file_is_so_large_that_a_hanging_worker_goes_unnoticed_for_more_than_a_day():
    assert seconds_for(10 << 40, 70, 1250) == 86_400


def test_job_is_overdue_after_its_own_time():
    deadlines = Deadlines(workers=2)
    deadlines.add("short", 10, now=100)
    deadlines.add("long", 50, now=100)
    assert deadlines.overdue(110) == []
    assert deadlines.overdue(110.1) == ["short"]
    assert deadlines.overdue(150.1) == ["short", "long"]


def test_time_of_a_job_that_waits_for_a_worker_does_not_run():
    deadlines = Deadlines(workers=1)
    deadlines.add("first", 10, now=0)
    deadlines.add("second", 10, now=0)
    assert deadlines.overdue(1000) == ["first"]
    deadlines.remove("first", now=1000)
    assert len(deadlines) == 1
    assert deadlines.overdue(1009) == []
    assert deadlines.overdue(1011) == ["second"]
