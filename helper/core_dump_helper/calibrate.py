"""Owns `--calibrate`, which measures the compressors of a host once, when the helper is installed."""

from __future__ import annotations

import os
import time
from _struct import pack

from core_dump_helper.compress import COMPRESSORS, make_writer
from core_dump_helper.settings import Settings, calibration_path
from core_dump_helper.system import CHUNK, NEW_FILE, read_file, write_all


def calibrate(config: str) -> int:
    """Measure every compressor on data like a core's and remember the fastest; return the exit code."""
    path = calibration_path(config)
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    settings = Settings()
    settings.load(config)
    sample = make_sample()
    seconds = {}
    for name in COMPRESSORS:
        try:
            seconds[name] = measure(name, sample, path + ".new", settings)
            print("%s: %.0f MB/s" % (name, len(sample) / seconds[name] / 1e6))
        except (OSError, ImportError) as error:
            print("%s: cannot be used: %s" % (name, error))
    best = min(seconds, key=lambda name: seconds[name]) if seconds else "gzip"
    dump = os.open(path + ".new", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    write_all(dump, best.encode() + b"\n")
    os.close(dump)
    os.rename(path + ".new", path)
    print("%s is the fastest; COMPRESSOR=auto uses it (%s)" % (best, path))
    return 0


def make_sample() -> memoryview:
    """Return code, numbers, noise and zeros, as a process holds them."""
    program = read_file(os.path.realpath("/proc/self/exe"), 4 << 20)
    numbers = b"".join(pack("<QQ", 0x7F0000000000 + 48 * index, index) for index in range(CHUNK // 4))
    return memoryview((program + numbers + os.urandom(CHUNK) + bytes(4 * CHUNK)) * 2)


def measure(name: str, sample: memoryview, path: str, settings: Settings) -> float:
    """Return the seconds that a compressor takes; raises OSError, ImportError if it cannot be used."""
    dump = os.open(path, NEW_FILE | os.O_TRUNC, 0o644)
    try:
        started = time.monotonic()
        writer = make_writer(name, dump, settings)
        writer.start()
        for start in range(0, len(sample), CHUNK):
            writer.write(sample[start : start + CHUNK])
        failed = writer.close()
        if failed:
            raise OSError(5, failed)
        return time.monotonic() - started
    finally:
        os.close(dump)
