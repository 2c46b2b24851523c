"""Owns `core-dump-collector configure-host`: installs the helper on a Kubernetes node that takes no user data.

Runs in a privileged init container with the host's root mounted. All that is done on the host is done by
sysctl/install.sh, which the image carries; this module copies it there and runs it in the host's root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from typing import TYPE_CHECKING

from core_dump_collector.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = "/usr/share/core-dump-handler"
"""Where the image keeps `sysctl/` and `helper/`."""
STATE = "var/lib/core-dump-handler"
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def configure(root: str, *, restore: bool = False, options: Sequence[str] = (), source: str = SOURCE) -> int:
    """Run install.sh (or uninstall.sh to restore) in the host's root; return its exit code.

    Args:
        root: where the host's root is mounted.
        restore: put the host's own core pattern back, if ours is in use, and remove the helper.
        options: for the script, e.g. `--force`.
        source: directory with `sysctl/` and `helper/`.

    Raises:
        ConfigError: the directory is not a host's root, the scripts are missing, or it may not be entered.
    """
    if not os.path.isdir(os.path.join(source, "sysctl")):
        raise ConfigError(f"{source}/sysctl is missing: configure-host runs from the container image only")
    if not os.path.isfile(os.path.join(root, "bin/sh")):
        raise ConfigError(
            f"{root} holds no /bin/sh: mount the host's / there (Bottlerocket has none: see its page)"
        )
    state = os.path.join(root, STATE)
    script = "uninstall.sh" if restore else "install.sh"
    try:
        os.makedirs(state, 0o755, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="install-", dir=state) as copy:
            for name in ("sysctl", "helper"):
                shutil.copytree(os.path.join(source, name), os.path.join(copy, name))
            inside = f"/{STATE}/{os.path.basename(copy)}/sysctl/{script}"
            command = ["/bin/sh", inside, *options]
            return _run_inside(root, command)
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"{root}: {error}: configure-host needs a privileged container") from error


def _run_inside(root: str, command: list[str]) -> int:
    """Run a program of another root; return its exit code."""

    def enter() -> None:
        os.chroot(root)
        os.chdir("/")

    return subprocess.run(  # noqa: S603  the image's own script
        command,
        check=False,
        env={"PATH": PATH},
        preexec_fn=enter,
    ).returncode
