"""Owns `--calibrate`, which is never needed at a crash."""

from __future__ import annotations

import os
import struct
import time

from core_dump_helper.compress import Child, Stream
from core_dump_helper.settings import Settings, calibration_path
from core_dump_helper.system import CHUNK, NEW_FILE, read_file, write_all


def calibrate(config: str) -> int:
    """Measure every compressor on data like a core's and remember the fastest; return the exit code."""
    path = calibration_path(config)
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    settings = Settings(config)
    numbers = b"".join(struct.pack("<QQ", 0x7F0000000000 + 48 * index, index) for index in range(CHUNK // 4))
    sample = memoryview(
        (
            read_file(os.path.realpath("/proc/self/exe"), 4 << 20)
            + numbers
            + os.urandom(CHUNK)
            + bytes(4 * CHUNK)
        )
        * 2
    )
    best, least = "gzip", float("inf")
    for name in ("pigz", "isal", "gzip"):
        dump = os.open(path + ".new", NEW_FILE | os.O_TRUNC, 0o644)
        try:
            began = time.monotonic()
            sink = Child(dump, settings) if name == "pigz" else Stream(dump, name, settings)
            for start in range(0, len(sample), CHUNK):
                sink.write(sample[start : start + CHUNK])
            failed = sink.close()
            took = time.monotonic() - began
            print("%s: %s" % (name, failed or "%.0f MB/s" % (len(sample) / took / 1e6)))
            if not failed and took < least:
                best, least = name, took
        except (OSError, ImportError) as error:
            print("%s: cannot be used: %s" % (name, error))
        finally:
            os.close(dump)
    dump = os.open(path + ".new", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    write_all(dump, best.encode() + b"\n")
    os.close(dump)
    os.rename(path + ".new", path)
    print("%s is the fastest; COMPRESSOR=auto uses it (%s)" % (best, path))
    return 0
