"""Owns the configuration file helper.conf."""

from __future__ import annotations

import os

from core_dump_helper.system import check_owner, log, read_file

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from collections.abc import Callable

    from core_dump_helper.ownmemory import OwnMemory

CONFIG = "/etc/core-dump-handler/helper.conf"
CALIBRATION = "/var/lib/core-dump-handler/compressor"
HALF = "half"
"""Value of MAX_TOTAL_BYTES: half of the file system."""
COMPRESSORS = ("auto", "pigz", "isal", "gzip", "none")
BOUNDS = {
    "LEVEL": (1, 9),
    "KEEP_FREE_PERCENT": (0, 99),
    "DEADLINE_SECONDS": (1, 86400),
    "MAX_CONCURRENT": (0, 256),
    "VITAL_BYTES": (0, 256 << 20),
    "TRIM_BUDGET_BYTES": (0, 1 << 30),
    "VITAL_KEEP_FREE_PERCENT": (0, 99),
}


def are_numbers(texts: list[str], digits: int = 9) -> bool:
    """Return whether every text is a whole number of at most so many digits."""
    return all(text.isascii() and text.isdigit() and len(text) <= digits for text in texts)


def is_rate(text: str) -> bool:
    """Accept `dumps/seconds`, or 0 for no limit."""
    try:
        parse_rate(text)
    except ValueError:
        return False
    return True


def parse_rate(text: str) -> tuple[int, int]:
    """Return dumps and seconds of `dumps/seconds`, or zeros for 0; raises ValueError."""
    parts = ["0", "0"] if text == "0" else [part.strip() for part in text.split("/")]
    if len(parts) != 2 or not are_numbers(parts):
        raise ValueError(text)
    return int(parts[0]), int(parts[1])


YES_OR_NO = (lambda text: text in ("yes", "no"), "yes or no")
TEXTS: dict[str, tuple[Callable[[str], bool], str]] = {
    "COMPRESSOR": (lambda text: text in COMPRESSORS, "one of " + ", ".join(COMPRESSORS)),
    "RESPECT_RLIMIT": YES_OR_NO,
    "MODULES": YES_OR_NO,
    "REASSERT": YES_OR_NO,
    "RATE_LIMIT": (is_rate, "dumps/seconds like 5/600, or 0"),
    "VITAL_LIMIT": (is_rate, "dumps/seconds like 20/600, or 0"),
    "MAX_TOTAL_BYTES": (
        lambda text: text == HALF or (text != "" and are_numbers([text], 18)),
        "half (of the file system), or a whole number of bytes, or 0",
    ),
    "IGNORE_SIGNALS": (lambda text: are_numbers(text.replace(",", " ").split()), "signal numbers like 3,24"),
}
"""For each setting that is neither a number nor a path: what it accepts, in code and in words."""
PATH = (lambda text: text.startswith("/"), "an absolute path")


class Settings:
    """The settings and their defaults."""

    WATCH_DIR = "/core_dumps"
    COMPRESSOR = "auto"
    LEVEL = 1
    MAX_DUMP_BYTES = 0
    MAX_TOTAL_BYTES = HALF
    KEEP_FREE_PERCENT = 25
    DEADLINE_SECONDS = 300
    RATE_LIMIT = "5/600"
    MAX_CONCURRENT = 8
    BUFFER_BYTES = 1 << 30
    VITAL_BYTES = 32 << 20
    VITAL_LIMIT = "20/600"
    VITAL_KEEP_FREE_PERCENT = 5
    TRIM_ABOVE_BYTES = 64 << 30
    TRIM_BUDGET_BYTES = 64 << 20
    RULES = ""
    MODULES = "yes"
    MODULE_MAX_BYTES = 512 << 20
    IGNORE_SIGNALS = ""
    RESPECT_RLIMIT = "no"
    CGROUP = ""
    PYTHON_PATH = ""
    REASSERT = "no"

    own_memory: OwnMemory | None = None
    """Of a listener, which is in a cgroup of its own already."""

    def load(self, path: str, report: Callable[[str], None] = log) -> None:
        """Read the configuration file; report each line that is wrong and keep that setting's default."""
        try:
            check_owner(path)
            text = read_file(path, 1 << 16).decode("utf-8", "surrogateescape")
        except OSError as error:
            report("cannot use %a: %s; every setting has its default" % (path, error.strerror))
            return
        for line in text.splitlines():
            key, _, value = (part.strip() for part in line.partition("="))
            if not key or key.startswith("#"):
                continue
            try:
                setattr(self, key, self.parse(key, value))
            except ValueError as error:
                report("%a: ignoring %a: it must be %s" % (path, line[:100], error))

    @classmethod
    def defaults(cls) -> dict[str, str | int]:
        """Return every setting's name and default."""
        return {key: value for key, value in vars(cls).items() if key.isupper()}

    @classmethod
    def parse(cls, key: str, text: str) -> str | int:
        """Return a setting's value; raises ValueError with the accepted values."""
        default = cls.defaults().get(key)
        if default is None:
            raise ValueError("one of " + ", ".join(cls.defaults()))
        if isinstance(default, int):
            return cls._parse_number(key, text)
        if key == "RULES":
            from core_dump_helper.rules import parse_rules

            parse_rules(text)
            return text
        accepts, accepted = TEXTS.get(key, PATH)
        if text != default and not accepts(text):
            raise ValueError(accepted)
        return text

    @staticmethod
    def _parse_number(key: str, text: str) -> int:
        low, high = BOUNDS.get(key, (0, 1 << 60))
        if not (text and are_numbers([text], 19) and low <= int(text) <= high):
            raise ValueError("a whole number from %d to %d" % (low, high))
        return int(text)


def calibration_path(config: str) -> str:
    """Return the file that names the fastest compressor: for a configuration given by `-C`, it is beside that."""
    return CALIBRATION if config == CONFIG else os.path.join(os.path.dirname(config), "compressor")
