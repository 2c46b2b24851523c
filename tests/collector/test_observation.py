import pytest
import structlog
from prometheus_client import CollectorRegistry, Counter

from core_dump_collector.observation import Look, Observer


@pytest.fixture
def observer():
    return Observer(Counter("failures", "Failures.", ["what"], registry=CollectorRegistry()))


def failing(error):
    def call():
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), ValueError("not a valid flag"), KeyError("x"), OverflowError()],
)
def test_whatever_a_look_raises_ends_nothing_and_is_counted(observer, error):
    for _ in range(3):
        assert observer.look(Look.CORE_PATTERN, failing(error)) is None
    assert observer._failures.labels(Look.CORE_PATTERN)._value.get() == 3
    assert observer.look(Look.CORE_PATTERN, lambda: 7) == 7


def test_failure_is_logged_once_until_it_changes_or_ends(observer):
    with structlog.testing.capture_logs() as log:
        for _ in range(3):
            observer.look(Look.FREE_SPACE, failing(OSError(5, "Input/output error")))
        observer.look(Look.QUARANTINE, lambda: 0)
        observer.look(Look.FREE_SPACE, failing(OSError(2, "No such file or directory")))
        for _ in range(2):
            observer.look(Look.FREE_SPACE, lambda: 1)
    assert [(e["event"], e.get("error")) for e in log] == [
        ("cannot observe", "Input/output error"),
        ("cannot observe", "No such file or directory"),
        ("can observe again", None),
    ]
