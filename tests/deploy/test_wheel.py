"""What `pip install core-dump-handler` brings: the format, the collector and core-dumps; the helper comes as files."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_wheel_holds_every_module_of_its_three_packages_and_no_helper(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "-w",
        tmp_path,
    ]
    subprocess.run([*command, ROOT], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("core_dump_handler-*.whl")
    content = zipfile.ZipFile(wheel).namelist()
    names = {name for name in content if not name.split("/")[0].endswith((".dist-info", ".data"))}
    folders = ("format/core_dump_format", "collector/core_dump_collector", "cli/core_dumps")
    expected = {
        str(path.relative_to(ROOT / folder.partition("/")[0]))
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert names == expected
    pages = {name.partition(".data/")[2] for name in content if ".data/" in name}
    assert pages == {"data/share/man/man1/core-dumps.1", "data/share/man/man8/core-dump-collector.8"}
