"""The collector knows the memory that it may use, and what fits into it."""

from __future__ import annotations

import pytest

from core_dump_collector.budget import LEAST_BUFFERS, MOST_BUFFERS, plan
from core_dump_collector.node.memory import find_limit

MEBIBYTE = 1 << 20


def put(directory, **files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".", 1)).write_text(text)


def find(tmp_path, groups):
    (tmp_path / "own").write_text(groups)
    return find_limit(str(tmp_path / "fs"), str(tmp_path / "own"))


def test_limit_is_the_tightest_of_the_group_and_those_above_it(tmp_path):
    put(tmp_path / "fs/kubepods/pod1", memory__max="134217728\n", memory__current="67108864\n")
    put(tmp_path / "fs/kubepods/pod1", memory__stat="anon 1\ninactive_file 33554432\n")
    put(tmp_path / "fs/kubepods/pod1/c1", memory__max="max\n", memory__current="1\n")
    limit = find(tmp_path, "0::/kubepods/pod1/c1\n")
    assert limit.limit_bytes == 128 * MEBIBYTE
    assert limit.used_share() == 0.25


def test_limit_of_a_container_is_at_the_root_of_what_it_sees(tmp_path):
    put(tmp_path / "fs", memory__max="134217728\n", memory__current="1\n")
    assert find(tmp_path, "0::/\n").limit_bytes == 128 * MEBIBYTE


def test_limit_of_version_1_counts(tmp_path):
    put(tmp_path / "fs/memory/g", memory__limit_in_bytes="1000\n", memory__usage_in_bytes="900\n")
    put(tmp_path / "fs/memory/g", memory__stat="total_inactive_file 400\n")
    limit = find(tmp_path, "12:cpu:/g\n4:memory:/g\n0::/\n")
    assert (limit.limit_bytes, limit.used_share()) == (1000, 0.5)


@pytest.mark.parametrize("text", ["max\n", "9223372036854771712\n", "", "a\n", "0\n", "-5\n"])
def test_what_is_no_limit_is_none(tmp_path, text):
    put(tmp_path / "fs", memory__max=text, memory__current="1\n")
    assert find(tmp_path, "0::/\n") is None


def test_limit_whose_use_cannot_be_read_says_so(tmp_path):
    put(tmp_path / "fs", memory__max="1000\n")
    assert find(tmp_path, "0::/../../x\n").used_share() is None


def test_nothing_tells_where_there_are_no_groups(tmp_path):
    assert find_limit(str(tmp_path), str(tmp_path / "absent")) is None


def test_budget_starts_fewer_workers_under_a_small_limit_and_all_without_one():
    assert plan(128 * MEBIBYTE, 4, 16 * MEBIBYTE).workers == 1
    assert plan(128 * MEBIBYTE, 4, 16 * MEBIBYTE).small_parts
    assert plan(1024 * MEBIBYTE, 4, 16 * MEBIBYTE).workers == 4
    assert plan(None, 64, 16 * MEBIBYTE).workers == 64


@pytest.mark.parametrize("limit", [None, 1, 64 * MEBIBYTE, 1 << 30, 1 << 40])
def test_budget_is_never_less_than_what_is_needed_to_go_on(limit):
    budget = plan(limit, 4, 16 * MEBIBYTE)
    assert 1 <= budget.workers <= 4
    assert LEAST_BUFFERS <= budget.buffers <= MOST_BUFFERS
