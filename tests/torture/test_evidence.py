"""The neighbour's acts are told from faults of the product exactly: only what it touched is not counted."""

import gzip
import json
import random
from pathlib import Path

import pytest
from tests.torture.evidence import Journal, changed_outside, is_planted
from tests.torture.neighbour import MARK, SECRET, Neighbour, is_own_name

DUMP = "core-app-1700000000-42-11.gz"
OTHER = "core-app-1700000000-43-11.gz"


def journal_of(path: Path, *acts: list[object]) -> Journal:
    path.write_text("".join(json.dumps(act) + "\n" for act in acts))
    return Journal(path)


def test_dump_counts_as_touched_unless_the_act_failed(tmp_path: Path) -> None:
    begun, partial = [1, "delete", [DUMP], "begun"], [1, "delete", [DUMP + ".partial"], "begun"]
    assert journal_of(tmp_path / "a", begun).pids() == {42}
    assert journal_of(tmp_path / "b", partial, [1, "delete", [DUMP + ".partial"], "done"]).pids() == {42}
    assert journal_of(tmp_path / "c", begun, [1, "delete", [DUMP], "EPERM"]).pids() == set()
    assert journal_of(tmp_path / "d", [2, "swap", [DUMP, OTHER], "done"]).pids() == {42, 43}


def test_neighbour_notes_an_act_before_it_and_its_outcome_after_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with path.open("wb", buffering=0) as file:
        neighbour = Neighbour(random.Random(1), tmp_path, file.fileno())
        seen: list[str] = []
        neighbour.touch("delete", [DUMP], lambda: seen.append(path.read_text()))
        neighbour.touch("delete", [OTHER], (tmp_path / "none").unlink)
    assert seen == [json.dumps([0, "delete", [DUMP], "begun"]) + "\n"]
    assert path.read_text().splitlines()[-1] == json.dumps([0, "delete", [OTHER], "ENOENT"])


@pytest.mark.parametrize("content", [MARK, MARK * 9, MARK[:3], b"", gzip.compress(MARK * 9)])
def test_planted_content_is_known_even_truncated_and_compressed_once_more(content: bytes) -> None:
    assert all(is_planted(content[:length]) for length in range(len(content) + 1))
    assert is_planted(gzip.compress(content))


@pytest.mark.parametrize("content", [b"\x7fELF", b"\0" * 64, gzip.compress(b"\x7fELF" * 99), SECRET])
def test_other_content_is_not_taken_for_planted(content: bytes) -> None:
    assert not is_planted(content)


def test_names_of_the_neighbour_are_told_from_those_of_dumps(tmp_path: Path) -> None:
    assert is_own_name("core-app-1700000000-9000000001-11.gz.partial")
    assert is_own_name("core.7.gz")
    assert not any(is_own_name(name) for name in (DUMP, DUMP + ".partial", ".helper", "quarantine"))


@pytest.mark.parametrize("name", ["secret", "own"])
def test_change_outside_the_directory_is_noticed(tmp_path: Path, name: str) -> None:
    for present in ("secret", "own"):
        (tmp_path / present).write_bytes(SECRET)
    assert changed_outside(tmp_path) == []
    (tmp_path / name).write_bytes(b"")
    assert changed_outside(tmp_path) == [f"outside/{name} was changed or deleted"]
    (tmp_path / name).unlink()
    assert changed_outside(tmp_path) == [f"outside/{name} was changed or deleted"]
