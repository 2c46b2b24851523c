"""Owns what the command line and helper.conf say."""

from __future__ import annotations

import os

from core_dump_helper.system import check_owner, log, read_file

CONFIG = "/etc/core-dump-handler/helper.conf"
CALIBRATION = "/var/lib/core-dump-handler/compressor"
COMPRESSORS = ("auto", "pigz", "isal", "gzip", "none")
BOUNDS = {
    "LEVEL": (1, 9),
    "KEEP_FREE_PERCENT": (0, 99),
    "DEADLINE_SECONDS": (1, 86400),
    "MAX_CONCURRENT": (0, 256),
}


def parse_arguments(argv: list[str]) -> dict[str, str]:
    """Split `-Xvalue` arguments; the first of a kind wins, what follows `-h` belongs to the host name until `--`.

    Kernels before 5.3 split after expansion: host name and name may come in pieces, values may be missing.
    """
    values = {"e": ""}
    for index, argument in enumerate(argv):
        if argument == "--":
            values["e"] = " ".join(argv[index + 1 :])
            break
        if "h" in values:
            values["h"] += " " + argument
        elif argument[:1] == "-" and argument[1:2] in tuple("CPpiugstcdFh"):
            values.setdefault(argument[1], argument[2:])
    for key in "PpiugstcdF":
        text = values.get(key, "")
        values[key] = text if text.isascii() and text.isdigit() and len(text) <= 20 else ""
    values["d"] = values["d"] or "2"  # the safest meaning
    return values


class Settings:
    """What helper.conf may say, and what holds where it says nothing or something wrong."""

    WATCH_DIR = "/core_dumps"
    COMPRESSOR = "auto"
    LEVEL = 1
    MAX_DUMP_BYTES = 0
    MAX_TOTAL_BYTES = 0
    KEEP_FREE_PERCENT = 15
    DEADLINE_SECONDS = 300
    RATE_LIMIT = "5/600"
    MAX_CONCURRENT = 8
    BUFFER_BYTES = 1 << 30
    IGNORE_SIGNALS = ""
    RESPECT_RLIMIT = "no"
    CGROUP = ""
    PYTHON_PATH = ""

    def __init__(self, path: str) -> None:
        """Read the file; whatever is wrong in it is logged and has its default."""
        try:
            check_owner(path)
            text = read_file(path, 1 << 16).decode("utf-8", "surrogateescape")
        except OSError as error:
            log("%a: %s: every setting has its default" % (path, error.strerror))
            return
        for line in text.splitlines():
            key, _, value = (part.strip() for part in line.partition("="))
            if key and not key.startswith("#"):
                try:
                    setattr(self, key, self.parse(key, value))
                except ValueError as error:
                    log("%a: %a is ignored, it must be %s" % (path, line[:100], error))

    @classmethod
    def defaults(cls) -> dict[str, str | int]:
        """Return every key and its default."""
        return {key: value for key, value in vars(cls).items() if key.isupper()}

    @classmethod
    def parse(cls, key: str, text: str) -> str | int:
        """Return a setting's value; raises ValueError that says what is accepted."""
        default = cls.defaults().get(key)
        if default is None:
            raise ValueError("one of " + ", ".join(cls.defaults()))
        if isinstance(default, int):
            low, high = BOUNDS.get(key, (0, 1 << 60))
            if not (text.isascii() and text.isdigit() and len(text) < 20 and low <= int(text) <= high):
                raise ValueError("a whole number from %d to %d" % (low, high))
            return int(text)
        parts = text.replace("/" if key == "RATE_LIMIT" else ",", " ").split()
        numbers = all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts)
        right, accepted = {
            "COMPRESSOR": (text in COMPRESSORS, "one of " + ", ".join(COMPRESSORS)),
            "RESPECT_RLIMIT": (text in ("yes", "no"), "yes or no"),
            "RATE_LIMIT": (text == "0" or (numbers and len(parts) == 2), "dumps/seconds like 5/600, or 0"),
            "IGNORE_SIGNALS": (numbers, "signal numbers like 3,24"),
        }.get(key, (text == default or text.startswith("/"), "an absolute path"))
        if not right:
            raise ValueError(accepted)
        return text


def calibration_path(config: str) -> str:
    """Return where the fastest compressor's name is kept: beside a configuration that -C names."""
    return CALIBRATION if config == CONFIG else os.path.join(os.path.dirname(config), "compressor")
