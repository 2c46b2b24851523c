"""Owns the value of kernel.core_pattern at boot: our file in sysctl.d, the files of others, services."""

from __future__ import annotations

import fnmatch
import os

from core_dump_setup import kernel
from core_dump_setup.errors import SetupError, say, warn
from core_dump_setup.files import STATE, Tree

NAME = "69-core-dump.conf"
FILE = "/etc/sysctl.d/" + NAME
SHARE = "/usr/share/core-dump-handler"
DIRECTORIES = (
    "/etc/sysctl.d",
    "/run/sysctl.d",
    "/usr/local/lib/sysctl.d",
    "/usr/lib/sysctl.d",
    "/lib/sysctl.d",
)
"""sysctl.d(5), strongest first: a file hides those of its name in later directories."""
LAST_FILE = "/etc/sysctl.conf"
"""Read after all others by sysctl(8) --system, and by systemd where a link in sysctl.d leads to it."""
UNITS = ("/usr/lib/systemd/system/", "/lib/systemd/system/")
SERVICES = {
    "systemd-coredump-register.service": (),  # from systemd 262 on
    "apport.service": ("/etc/init.d/apport",),  # the unit is generated from this script before Ubuntu 23.10
    "abrt-ccpp.service": (),
}
"""Services of distributions that set kernel.core_pattern after sysctl.d was read, and scripts that generate them."""
MASKS = "/etc/systemd/system/"
MASKED = STATE + "/masked-"


def values(text: bytes) -> dict[str, str]:
    """Return the assignments of a sysctl.d file; the last of a key wins."""
    found = {}
    for line in os.fsdecode(text).splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and key[:1] not in ("#", ";"):
            found[key.strip().lstrip("-").replace("/", ".")] = value.strip()
    return found


def ours(tree: Tree, shipped: bytes) -> tuple[str, str]:
    """Return pattern and pipe limit that boot will set: of our file as it was edited, else as we ship it.

    Raises:
        SetupError: they would not start the helper.
    """
    found = values(shipped)
    path = SHARE + "/" + NAME
    if tree.is_edited(FILE, shipped):
        path = FILE
        found.update(values(tree.read(FILE) or b""))
    pattern, limit = found.get("kernel.core_pattern", ""), found.get("kernel.core_pipe_limit", "")
    if not kernel.starts_helper(pattern):
        raise SetupError("%s: kernel.core_pattern=%s does not start the helper" % (tree.path(path), pattern))
    if len(os.fsencode(pattern)) > kernel.LIMIT:
        size = len(os.fsencode(pattern))
        raise SetupError(
            "%s: the pattern has %d bytes, the kernel takes %d" % (tree.path(path), size, kernel.LIMIT)
        )
    if not limit.isdigit():
        raise SetupError("%s: kernel.core_pipe_limit=%s is not a number" % (tree.path(path), limit))
    return pattern, limit


def others(tree: Tree) -> list[tuple[str, str]]:
    """Return each file of others that sets the pattern, with its value, in the order in which boot reads them."""
    names: dict[str, str] = {}
    for directory in DIRECTORIES:
        folder = tree.path(directory + "/")
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if name.endswith(".conf"):
                names.setdefault(name, directory + "/" + name)
    ordered = [names[name] for name in sorted(names, key=os.fsencode) if name != NAME]
    if not any(os.path.realpath(tree.path(path)) == tree.path(LAST_FILE) for path in ordered):
        ordered.append(LAST_FILE)
    found = []
    for path in ordered:
        for key, value in values(_content(tree.path(path))).items():
            if fnmatch.fnmatchcase("kernel.core_pattern", key):
                found.append((path, value))
    return found


def _content(path: str) -> bytes:
    """Return what boot reads; links are followed, as boot follows them."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20)
    except OSError:
        return b""


def check_image(tree: Tree, *, force: bool) -> None:
    """Stop at a handler that an operator configured for the boot of this image, unless `force` is given."""
    foreign = [item for item in others(tree) if kernel.is_foreign(item[1])]
    if foreign and not force:
        path, pattern = foreign[-1]
        refuse_foreign(
            tree, "%s sets kernel.core_pattern to %s" % (tree.path(path), kernel.describe(pattern))
        )


def refuse_foreign(tree: Tree, text: str) -> None:
    """Raise SetupError over the handler of somebody else, or only say so in a dry run."""
    if not tree.dry_run:
        raise SetupError(
            text + "\nNothing was changed. To replace it (uninstalling restores it), give --force"
        )
    say("would stop: " + text)


def warn_of_later_files(tree: Tree) -> None:
    """Name each file that wins over ours at boot."""
    for path, value in others(tree):
        later = path == LAST_FILE or os.fsencode(os.path.basename(path)) > os.fsencode(NAME)
        if later and not kernel.is_ours(value):
            warn("%s also sets kernel.core_pattern and wins at boot: remove that line" % tree.path(path))


def warn_of_kept_file(tree: Tree) -> None:
    """Say so if the file of our name still starts the helper at boot, after a removal."""
    path = tree.path(FILE)
    if not tree.dry_run and kernel.is_ours(values(_content(path)).get("kernel.core_pattern", "")):
        warn("%s still sets kernel.core_pattern to the helper at boot: remove it" % path)


def mask_services(tree: Tree) -> None:
    """Keep each service of a distribution from replacing our pattern at boot."""
    for name, scripts in SERVICES.items():
        files = [folder + name for folder in UNITS] + list(scripts)
        if tree.exists(MASKS + name) or not any(map(tree.exists, files)):
            continue
        tree.place(MASKED + name, b"", 0o600)
        tree.link(MASKS + name, "/dev/null")
        if not tree.dry_run:
            say("masked %s, which sets kernel.core_pattern at boot; uninstalling unmasks it" % name)


def unmask_services(tree: Tree) -> None:
    """Let the services that we masked set their pattern again."""
    for name in SERVICES:
        if not tree.exists(MASKED + name):
            continue
        path = tree.path(MASKS + name)
        if os.path.islink(path) and os.readlink(path) == "/dev/null":
            tree.remove(MASKS + name)
            say("unmasked " + name)
        tree.remove(MASKED + name)
