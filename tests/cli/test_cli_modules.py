"""Backtraces from the bucket alone: the files of the process are gone, and objects in the bucket are not trusted."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import modules as support
from tests.support.gdb import crash
from tests.support.s3 import BUCKET

from core_dump_format.core import read_core
from core_dump_format.modules import Module, ModuleList, render_list
from core_dump_format.stream import Seekable
from core_dumps import buildid, cache, wanted
from core_dumps.buildid import read_build_id
from core_dumps.loader import read_loaded
from core_dumps.tree import Tree, inside

NAME = "node-7/core-app-1700000001-1-11.gz"
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb: apt-get install gdb")
LIBRARY = "void die(volatile int *at) { *at = 1; }\n"
PROGRAM = "void die(volatile int *);\nint main() { die(0); }\n"


class Crashed:
    """A core, and the files of its process, which were removed from their paths."""

    def __init__(self, folder: Path, *options: str) -> None:
        built = folder / "app"
        built.mkdir()
        (built / "lib.c").write_text(LIBRARY)
        (built / "main.c").write_text(PROGRAM)
        compile_ = ["gcc", "-g", "-O0", *options, "-o"]
        real, self.library = built / "libdie-2.31.so", built / "libdie.so.2"
        self.program = built / "app"
        subprocess.run([*compile_, real, built / "lib.c", "-shared", "-fPIC"], check=True)
        self.library.symlink_to(real.name)  # the loader's name is not the kernel's
        link = [self.program, built / "main.c", self.library, f"-Wl,-rpath,{built}"]
        subprocess.run([*compile_, *link], check=True)
        self.core = folder / "core"
        crash(self.program, self.core)
        self.backtrace = self.of_gdb(self.program)
        with self.core.open("rb") as file:
            files = read_core(Seekable(file.fileno())).files
        self.modules = []
        self.contents = {}
        for path in dict.fromkeys(file.path for file in files):
            content = Path(path).read_bytes()
            if content.startswith(b"\x7fELF"):
                self.contents[support.digest(content)] = content
                start = next(file.start for file in files if file.path == path)
                row = support.module(content, os.fsencode(path), start, read_build_id(path) or "")
                self.modules.append(row)
        shutil.rmtree(built)

    def of_gdb(self, program: Path) -> list[str]:
        """Return gdb's own frames."""
        command = ["gdb", "-nx", "-q", "-batch", "-ex", "thread apply all bt", program, self.core]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return frames(said.partition("\nThread ")[2])

    def put(self, cli, *, modules: bool = True, rows=None) -> str:
        """Put the dump, its list and its modules into the bucket."""
        key = cli.put(NAME, gzip.compress(self.core.read_bytes(), 1), {"bytes": self.core.stat().st_size})
        cli.put_raw(f"{NAME}.modules.json", render_list(ModuleList("x.gz", tuple(rows or self.modules))))
        for digest, content in self.contents.items() if modules else ():
            cli.put_raw(f"_modules/sha256/{digest}", gzip.compress(content, 1))
        return key


def frames(text):
    return [line.strip() for line in text.splitlines() if re.match(r"#\d", line)]


@pytest.fixture(scope="module")
def crashed(tmp_path_factory):
    if shutil.which("gdb") is None:
        pytest.skip("needs gdb: apt-get install gdb")
    return Crashed(tmp_path_factory.mktemp("crashed"))


def test_backtrace_equals_that_of_the_original_files_which_are_gone(crashed, cli):
    crashed.put(cli)
    assert not crashed.program.exists()
    done = cli.run("bt")
    assert frames(done.stdout) == crashed.backtrace
    assert "die" in crashed.backtrace[0]
    assert "missing" not in done.stderr
    cache = cli.home / ".cache" / "core-dumps"
    assert not list(cache.glob("tree-*")), "the tree is removed"
    assert {path.stem for path in cache.glob("*.module")} <= set(crashed.contents)
    for digest in crashed.contents:
        cli.put_raw(f"_modules/sha256/{digest}", b"junk")
    assert frames(cli.run("bt").stdout) == crashed.backtrace, "from the cache"


@pytest.mark.skipif(shutil.which("lldb") is None, reason="needs lldb: apt-get install lldb")
def test_lldb_opens_the_tree(crashed, cli):
    crashed.put(cli)
    done = cli.run("bt", "--debugger", "lldb")
    assert re.search(r"frame #0: .*die.*lib\.c:1", done.stdout)
    assert re.search(r"frame #1: .*main.*main\.c:2", done.stdout)


@pytest.mark.skipif(shutil.which("eu-stack") is None, reason="needs eu-stack: apt-get install elfutils")
def test_eu_stack_gets_the_files_too(crashed, cli):
    crashed.put(cli)
    done = cli.run("bt", "--debugger", "eu-stack")
    assert re.search(r"#0 .* die", done.stdout)
    assert re.search(r"#1 .* main", done.stdout)


def test_module_with_other_content_than_its_name_says_is_refused(crashed, cli, monkeypatch):
    monkeypatch.setattr(buildid.Search, "find", lambda _, module: module)  # this machine has the C library
    crashed.put(cli, modules=False)
    junk = [b"junk", gzip.compress(b"\x7fELF junk"), b"\x1f\x8b", b""]
    assert len(crashed.contents) == len(junk)
    for digest, content in zip(crashed.contents, junk, strict=True):
        cli.put_raw(f"_modules/sha256/{digest}", content)
    told = cli.run("bt", code=1).stderr
    assert len(re.findall("another SHA-256|gzip data", told)) == len(junk)
    assert f"missing: {crashed.program}" in told
    assert not list((cli.home / ".cache" / "core-dumps").glob("*.module"))


def test_bomb_ends_at_the_size_that_the_list_says(crashed, cli):
    crashed.put(cli, modules=False)
    bomb = gzip.compress(bytes(8 << 20), 1)
    assert max(map(len, crashed.contents.values())) < 8 << 20
    for digest in crashed.contents:
        cli.put_raw(f"_modules/sha256/{digest}", bomb)
    assert "it has more than" in cli.run("bt", code=1).stderr


def test_what_is_missing_is_said_once_with_the_command_that_gets_it(crashed, cli):
    gone = [row._replace(sha256="", size_bytes=0, missing="not_readable") for row in crashed.modules]
    crashed.put(cli, rows=gone)
    fields = {"image": "shop.example:5000/app:1.2;rm", "image_digest": f"sha256:{'ab' * 32}"}
    cli.put(
        NAME, gzip.compress(crashed.core.read_bytes(), 1), {"bytes": crashed.core.stat().st_size} | fields
    )
    told = cli.run("bt", code=1).stderr
    (line,) = [line for line in told.splitlines() if f"missing: {crashed.program} " in line]
    assert "not kept on its node, not_readable" in line
    assert f"crane export shop.example:5000/app@sha256:{'ab' * 32} - | tar" in told
    del fields["image_digest"]
    cli.put(
        NAME, gzip.compress(crashed.core.read_bytes(), 1), {"bytes": crashed.core.stat().st_size} | fields
    )
    assert "crane export 'shop.example:5000/app:1.2;rm' - | tar" in cli.run("bt", code=1).stderr


def test_list_that_is_none_costs_no_backtrace(crashed, cli):
    crashed.put(cli, modules=False)
    for damage in (b"junk", b"[" * 1000, b'{"version": 2}', b"x" * ((4 << 20) + 1)):
        cli.put_raw(f"{NAME}.modules.json", damage)
        assert "is not a list of modules" in cli.run("modules", code=1).stderr
    done = cli.run("bt", code=1)
    assert "is not a list of modules" in done.stderr
    assert "missing: " in done.stderr


def test_list_of_another_process_is_not_believed(crashed, cli, tmp_path):
    """Its build IDs are not those in the core."""
    content = b"\x7fELF of another program"
    row = support.module(content, b"/app", crashed.modules[0].start, "ab" * 20)
    modules = wanted.read_modules(str(crashed.core), None, [], ModuleList("x", (row,)))
    assert not any(module.sha256 for module in modules.every)


def test_file_with_another_build_id_than_the_core_has_is_not_used(crashed, cli):
    """The list can omit build IDs and name any file in the bucket."""
    (first, second, *_) = [row for row in crashed.modules if row.build_id]
    swapped = [
        row._replace(build_id="", sha256=second.sha256, size_bytes=second.size_bytes) if row is first else row
        for row in crashed.modules
    ]
    crashed.put(cli, rows=swapped)
    assert "a file with another build ID: not used" in cli.run("bt", code=1).stderr


def test_modules_that_would_fill_the_disk_are_not_fetched(crashed, cli):
    huge = [row._replace(size_bytes=1 << 40) for row in crashed.modules]
    crashed.put(cli, rows=huge)
    told = cli.run("bt", code=1).stderr
    assert "modules are not fetched: they need" in told


def test_file_of_symbols_that_the_user_names_is_used(cli, tmp_path):
    crashed = Crashed(tmp_path)
    stripped, symbols = {}, tmp_path / "app.debug"
    for digest, content in crashed.contents.items():
        path = tmp_path / "one"
        path.write_bytes(content)
        if b"main.c" in content:
            subprocess.run(["objcopy", "--only-keep-debug", path, symbols], check=True)
            subprocess.run(["strip", path], check=True)
        stripped[digest] = path.read_bytes()
    rows = []
    for row in crashed.modules:
        content = stripped[row.sha256]
        rows.append(row._replace(sha256=support.digest(content), size_bytes=len(content)))
    crashed.contents = {support.digest(content): content for content in stripped.values()}
    crashed.put(cli, rows=rows)
    assert "main.c:2" not in cli.run("bt").stdout
    assert "main.c:2" in cli.run("bt", "--symbols", symbols).stdout
    assert "--symbols" in cli.run("bt", "--symbols", tmp_path / "none", code=2).stderr


def test_program_without_build_id_is_found_by_its_content(cli, tmp_path):
    crashed = Crashed(tmp_path, "-Wl,--build-id=none")
    assert not [row for row in crashed.modules if row.path.endswith(b"app") and row.build_id]
    crashed.put(cli)
    assert frames(cli.run("bt").stdout) == crashed.backtrace


HOSTILE = [
    b"/../../../../etc/shadow", b"..", b"/", b"", b"/a/../../b", b"/\xff\xfe\n", b"x" * 256, b"/a/" * 2000, b"/a\0b",
    b"./x", b"//y", b"/proc/self/mem", b"/" + b"a/" * 500 + b"z",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_path_does_not_leave_the_tree(tmp_path, name):
    target = tmp_path / "file"
    target.write_bytes(b"x")
    (tmp_path / "cache").mkdir()
    with Tree(str(tmp_path / "cache")) as tree:
        place = tree.add(name, str(target))
        assert place is None or os.path.realpath(os.path.dirname(place)).startswith(tree.root)
        assert sorted(os.listdir(tmp_path)) == ["cache", "file"]
    assert os.listdir(tmp_path / "cache") == []
    assert target.read_bytes() == b"x"


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.binary(max_size=40) | st.sampled_from([b"/a", b"/a/b", b"/a/b/c", b"/lib/x", b"/usr/lib/x"]))
)
def test_no_names_together_leave_the_tree(tmp_path_factory, names):
    cache = tmp_path_factory.mktemp("cache")
    target = cache.with_suffix(".file")
    target.write_bytes(b"x")
    with Tree(str(cache)) as tree:
        for name in names:
            tree.add(name, str(target))
        tree.merge_usr()
        for folder, _, files in os.walk(tree.root):
            assert os.path.realpath(folder).startswith(tree.root)
            assert all(os.readlink(os.path.join(folder, file)) == str(target) for file in files)
    assert target.read_bytes() == b"x"
    assert os.listdir(cache) == []


def test_first_file_of_a_name_stays(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    with Tree(str(tmp_path)) as tree:
        place = tree.add("/lib/x.so", str(one))
        assert tree.add("/lib/x.so", str(two)) == place
        assert tree.add("/lib/x.so/y", str(two)) is None
        assert Path(place).read_bytes() == b"1"


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=200))
def test_path_is_below_the_root_or_none(name):
    found = inside(name)
    assert found is None or not found.startswith(b"/")
    assert found is None or not {b"", b".", b".."} & set(found.split(b"/"))


def test_names_of_the_loader_are_those_of_the_process(crashed):
    with crashed.core.open("rb") as file:
        source = Seekable(file.fileno())
        names = [loaded.name for loaded in read_loaded(read_core(source), source)]
    assert os.fsencode(crashed.library) in names


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_lying_loader_list_is_not_fatal(crashed, tmp_path_factory, data):
    content = bytearray(crashed.core.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 8))
        content[at : at + 8] = data.draw(
            st.sampled_from([b"\xff" * 8, bytes(8)]) | st.binary(min_size=8, max_size=8)
        )
    path = tmp_path_factory.mktemp("lying") / "core"
    path.write_bytes(content)
    wanted.read_modules(str(path), None, [])
    path.unlink()


def test_modules_are_listed_with_what_became_of_them(crashed, cli):
    rows = [*crashed.modules, Module(b"/gone\x1b", 1, 2, 0, "", 0, "", "file_system")]
    crashed.put(cli, rows=rows)
    shown = cli.run("modules")
    assert "\x1b" not in shown.stdout
    assert re.search(rf"stored .*{crashed.program}$", shown.stdout, re.MULTILINE)
    assert "file_system" in shown.stdout
    told = json.loads(cli.run("modules", "--json=short").stdout)
    assert {row["state"] for row in told} == {"stored", "file_system"}
    assert {row["sha256"] for row in told} == {*crashed.contents, None}


def test_wrong_modules_are_found_and_removed_after_a_yes(crashed, cli):
    crashed.put(cli)
    wrong = min(crashed.contents)
    cli.put_raw(f"_modules/sha256/{wrong}", gzip.compress(b"junk"))
    assert "--yes" in cli.run("modules", "--verify", code=2, stdin=subprocess.DEVNULL).stderr
    done = cli.run("modules", "--verify", "--yes", code=1)
    assert wrong in done.stdout
    assert "removed 1 of 1" in done.stdout
    assert "verified" in cli.run("modules", "--verify", "--yes").stdout
    with cli.server.client() as client:
        page = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{cli.prefix}/_modules/")
    assert len(page["Contents"]) == len(crashed.contents) - 1


def test_modules_that_no_list_names_are_pruned_unless_they_are_young(crashed, cli, monkeypatch):
    from core_dumps import keeping

    crashed.put(cli)
    cli.put_raw(f"_modules/sha256/{'ab' * 32}", b"x")
    age = f"over {keeping.YOUNG_SECONDS // 86400} days old"
    assert age in " ".join(cli.run("modules", "--help").stdout.split())
    done = cli.run("modules", "--prune", "--yes")
    assert "0 of" in done.stdout, "it is young"
    assert age in done.stdout
    monkeypatch.setattr(keeping, "YOUNG_SECONDS", -10)
    assert "removed 1 of 1" in cli.run("modules", "--prune", "--yes").stdout
    cli.run("rm", "1", "--yes")
    assert f"removed {len(crashed.contents)}" in cli.run("modules", "--prune", "--yes").stdout


def test_list_that_is_published_during_the_question_keeps_its_modules(cli, monkeypatch):
    from core_dumps import filing, keeping

    content = b"\x7fELF library"
    cli.put_raw(f"_modules/sha256/{support.digest(content)}", gzip.compress(content))
    monkeypatch.setattr(keeping, "YOUNG_SECONDS", -10)

    def answer(_count, *, yes):
        assert yes
        cli.put_raw(f"dumps/{NAME}.modules.json", render_list(ModuleList("x.gz", (support.module(content),))))

    monkeypatch.setattr(filing, "_confirm", answer)
    assert "removed 0 of 0" in cli.run("modules", "--prune", "--yes").stdout


def test_files_of_a_dump_that_has_no_list_are_said_to_be_unknown_if_it_is_no_core(cli):
    cli.put(NAME, gzip.compress(b"no core"))
    done = cli.run("modules", code=1)
    assert "its files are not known" in done.stderr
    assert not done.stdout
    cli.put_raw("node-8/storm-ab-1700000001.json", b'{"state": "suppressed"}')
    assert "a record without a dump" in cli.run("modules", "--node", "node-8", code=1).stderr


def test_two_commands_clean_the_cache_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CORE_DUMPS_CACHE", str(tmp_path))
    for number in range(3):
        old = tmp_path / f"{number}.module"
        old.touch()
        os.utime(old, (1, 1))
    real, seen = os.scandir, []

    @contextlib.contextmanager
    def scandir(path):
        with real(path) as entries:
            seen.extend(sorted(entries, key=lambda entry: entry.name))
            os.unlink(seen[1].path)
            yield iter(seen)

    monkeypatch.setattr(cache.os, "scandir", scandir)
    cache.cache_directory()
    assert len(seen) == 3
    assert list(tmp_path.iterdir()) == []
