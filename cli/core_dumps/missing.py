"""Owns the messages about files that were not found, and the command that gets them."""

from __future__ import annotations

import re
import shlex
from typing import TYPE_CHECKING

from core_dump_format.text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from core_dumps.buildid import Module, Modules
    from core_dumps.dump import Dump

MOST_LISTED = 20
_DIGEST = re.compile(r"[a-z0-9]{1,16}:[0-9a-f]{32,128}")


def note_missing(modules: Modules, dump: Dump, note: Callable[[str], None]) -> None:
    """Tell the user which files were not found and how to get them."""
    for line in _lines(modules, dump):
        note(line)


def _lines(modules: Modules, dump: Dump) -> Iterator[str]:
    executable, missing = modules.executable, modules.missing
    if executable is None or executable.found is None:
        path, build_id = (executable.path, executable.build_id) if executable else (dump.program, None)
        yield f"the executable {path} (build ID {build_id or 'unknown'}) was not found; --exe FILE names it"
    if not modules.has_files:
        yield "the kernel left the list of mapped files out of this core, so libraries cannot be verified"
    for module in missing[:MOST_LISTED]:
        yield f"missing: {module.path} ({_identity(module)}){_reason(module)}"
    if len(missing) > MOST_LISTED:
        yield f"and {len(missing) - MOST_LISTED} more"
    if modules.left_out:
        yield f"{modules.left_out} files of this process are not in the list of modules, which had no room for them"
    if missing or (executable is not None and executable.found is None):
        yield _how(dump)


def _identity(module: Module) -> str:
    return f"build ID {module.build_id}" if module.build_id else f"SHA-256 {module.sha256[:16] or 'unknown'}"


def _reason(module: Module) -> str:
    if module.reason:
        return f": not kept on its node, {module.reason}"
    return ": not in the bucket (yet)" if module.sha256 else ""


def _how(dump: Dump) -> str:
    """Return advice on getting the files; with the command if the image is known."""
    image = image_of(dump)
    if image is None:
        return (
            "to get them: unpack the image that the process ran in and give --sysroot DIR, "
            "or set DEBUGINFOD_URLS to a server that has these build IDs"
        )
    return f"to get them: mkdir image && crane export {image} - | tar -xC image, then give --sysroot image"


def image_of(dump: Dump) -> str | None:
    """Return the image of the process as a word for a shell, by its digest if that is known."""
    image, digest = dump.text("image"), dump.text("image_digest")
    if not image:
        return None
    if digest and _DIGEST.fullmatch(digest) and "@" not in image:
        name, _, tag = image.rpartition(":")
        image = f"{name if name and '/' not in tag else image}@{digest}"
    return shlex.quote(printable(image, 500))
