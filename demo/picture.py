"""`make picture`: the terminal picture of the README, from real crashes of real programs on this machine.

Three programs crash through the kernel, their dumps travel to an S3 server, and `core-dumps` lists them, explains one
and makes its backtrace. Its own output, with its colours, is drawn into docs/img/core-dumps.svg. Needs root, gcc, gdb.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import time
from pathlib import Path

from demo.__main__ import BUCKET, collecting, install_helper, s3_server, say
from rich.console import Console
from rich.text import Text
from tests.support import kernel
from tests.support.cleanup import exit_on_signals, temporary_directory
from tests.support.collector import wait_until

TARGET = Path(__file__).parents[1] / "docs" / "img" / "core-dumps.svg"
COLUMNS = 110
CHECKOUT = """
#include <stdlib.h>
struct order { const char *item; int *stock; };
static int reserve(struct order *order, int count) { return *order->stock -= count; }
static int place(struct order *order) { return reserve(order, 2); }
int main(void) { struct order order = { "blue lamp", NULL }; return place(&order); }
"""
THUMBNAIL = """
#include <stdlib.h>
static void scale(char *pixels, int width) { free(pixels); if (width) free(pixels); }
int main(void) { scale(malloc(100), 7); return 0; }
"""
SHOWN = (["list"], ["info", "checkout", "--no-core"], ["bt", "checkout"])


def crash_all(scratch: Path, directory: Path) -> None:
    """Compile the programs and let each crash; the newest is the one that the picture explains."""
    programs = []
    for name, source in (("thumbnail", THUMBNAIL), ("checkout", CHECKOUT)):
        (scratch / f"{name}.c").write_text(source)
        command = ["gcc", "-g", "-O0", "-fno-builtin", "-o", name, f"{name}.c"]
        subprocess.run(command, cwd=scratch, check=True)
        programs.append([str(scratch / name)])
    python = ["/usr/bin/python3", "-c", "import ctypes; ctypes.string_at(0)"]
    with kernel.core_pattern(install_helper(scratch, directory), say=say):
        for program in (programs[0], python, programs[1]):
            subprocess.run(program, check=False, stderr=subprocess.DEVNULL)
            time.sleep(1.1)  # dumps are listed by their second


def draw(scratch: Path) -> None:
    """Run the commands and draw what they print."""
    environ = os.environ | {
        "BUCKET_NAME": BUCKET, "COLUMNS": str(COLUMNS), "FORCE_COLOR": "1", "HOME": str(scratch), "TZ": "UTC",
    }  # fmt: skip
    with open(os.devnull, "w") as null:
        console = Console(record=True, width=COLUMNS, file=null, force_terminal=True)
        for words in SHOWN:
            program: list[str | Path] = [Path(sysconfig.get_path("scripts"), "core-dumps"), *words]
            done = subprocess.run(program, env=environ, capture_output=True, text=True, check=True)
            console.print(Text.assemble(("$ ", "bold green"), ("core-dumps " + " ".join(words), "bold")))
            lines = [
                line for line in done.stdout.splitlines() if "Control Group" not in line
            ]  # this terminal's
            console.print(Text.from_ansi("\n".join(lines) + "\n"))
    TARGET.write_text(console.export_svg(title="core-dumps"))
    say(f"wrote {TARGET}")


def main() -> None:
    """Make the picture."""
    exit_on_signals()
    if not kernel.can_crash():
        raise SystemExit("make picture: root is needed, to crash through the kernel")
    with temporary_directory("cdp-", "/var/tmp") as scratch:  # noqa: S108  a short path: patterns have 127 bytes
        directory = scratch / "core_dumps"
        directory.mkdir(mode=0o700)
        with s3_server(), collecting(directory, scratch) as collector:
            crash_all(scratch, directory)
            done = 'core_dump_uploads_total{result="uploaded"}'
            wait_until(lambda: collector.metric(done) == 3, 60, "three uploads")  # noqa: PLR2004
            draw(scratch)


if __name__ == "__main__":
    main()
