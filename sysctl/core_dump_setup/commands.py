"""Owns the order of steps: install, activate, test, deactivate, uninstall.

Until the proof has succeeded every step can be undone. The kernel names the helper only while its files are complete,
and no file is removed before the kernel names something else.
"""

from __future__ import annotations

import os
import subprocess
import time
from dataclasses import dataclass

from core_dump_setup import (
    boot,
    cgroup,
    directory,
    kernel,
    listener,
    location,
    proof,
    reassert,
    release,
    systemd,
)
from core_dump_setup.disk import remove_any
from core_dump_setup.errors import SetupError, say, warn
from core_dump_setup.files import DIST, RECORD, STATE, Tree

CALIBRATION = STATE + "/compressor"
CONFIGURATION = {
    location.TMPFILES: "tmpfiles.conf",
    "/etc/security/limits.d/69-core-dump.conf": "limits.conf",
    directory.CONFIG: "helper.conf",
}
"""Files of /etc that an operator may edit, and where a checkout has them; boot.FILE is placed after the proof, and
location.TMPFILES when the directory is known."""
UNITS = (
    (cgroup.UNIT, cgroup.UNIT_NAME),
    *zip(reassert.UNITS, reassert.UNIT_NAMES),
    *zip(listener.UNITS, listener.UNIT_NAMES),
)
"""Files of systemd, and what a checkout calls them."""
CALIBRATION_SECONDS = 60
DRAIN_SECONDS = 30


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    force: bool = False
    test: bool = True
    keep_dump: bool = False
    purge: bool = False
    host: bool = False
    socket: bool = False
    watch_dir: str = ""


class Setup:
    """One run: the files, the options, and where the files come from."""

    def __init__(self, tree: Tree, source: str, options: Options) -> None:
        """Take a checkout as `source`, or "" for an installed copy.

        Raises:
            SetupError: the running kernel was asked for and is out of reach.
        """
        self.tree, self.source, self.options = tree, source, options
        self.live = not tree.root and kernel.is_host()
        if options.host and not self.live:
            raise SetupError(
                "the kernel cannot be reached from here: is the host's /proc mounted below its root?"
            )

    def shipped(self, name: str) -> bytes:
        """Return a configuration file as we ship it."""
        path = (
            os.path.join(self.source, "sysctl", name)
            if self.source
            else self.tree.path(boot.SHARE + "/" + name)
        )
        try:
            with open(path, "rb") as file:
                return file.read()
        except OSError as error:
            raise SetupError("%s: %s: run install.sh" % (path, error.strerror)) from error

    def install(self) -> None:
        """Install the files, then activate."""
        if not self.source:
            raise SetupError(
                "an installed copy holds no files to install: run sysctl/install.sh of a checkout"
            )
        self._choose()
        self._check()
        release.install(self.tree, self.source)
        self.tree.place(boot.SHARE + "/" + boot.NAME, self.shipped(boot.NAME))
        for path, name in UNITS:
            self.tree.place(path, self.shipped(name))
        for name, shipped in CONFIGURATION.items():
            if name != location.TMPFILES:
                self.tree.configure(name, self.shipped(shipped))
        self._activate()
        release.remove_replaced(self.tree)

    def activate(self) -> None:
        """Make the kernel start the helper that is installed, now and at every boot, and prove it with a crash."""
        self._choose()
        self._check()
        self._activate()

    def _choose(self) -> None:
        """Move the watch directory, if --watch-dir says so."""
        if self.options.watch_dir:
            location.choose(self.tree, self.options.watch_dir, self._shipped_or_nothing("helper.conf"))

    def _check(self) -> None:
        """Stop before anything is changed if a configuration file or the handler in use forbids the installation."""
        if self.options.socket:
            listener.check(live=self.live)
        boot.ours(self.tree, self.shipped(boot.NAME))
        directory.check(self.tree)
        self._check_foreign()

    def _activate(self) -> None:
        if not (self.tree.exists(release.HELPER) or self.tree.dry_run):
            raise SetupError(self.tree.path(release.HELPER) + " is missing: run install.sh")
        if not any(os.access(path, os.X_OK) for path in ("/usr/bin/pigz", "/usr/local/bin/pigz")):
            say("pigz is not installed: without it (or isal) dumps are compressed several times slower")
        pattern, limit = boot.ours(self.tree, self.shipped(boot.NAME))
        watched = directory.make(self.tree)
        if self.live:
            self.tree.on_failure(self._reload_systemd)
        before = location.follow(self.tree, watched, self._shipped_or_nothing("tmpfiles.conf"))
        boot.warn_of_later_files(self.tree)
        boot.mask_services(self.tree)
        if not self.tree.exists(cgroup.WANTED):
            self.tree.link(cgroup.WANTED, cgroup.UNIT)
        if self.options.socket:
            listener.switch(self.tree, on=True)
        wanted = directory.settings(self.tree).REASSERT == "yes"
        reassert.switch(self.tree, on=wanted)
        if self.live:
            self._reload_systemd()
            self._use(pattern, limit, watched)
            if not self.tree.dry_run:
                reassert.apply_now(on=wanted)
        self.tree.configure(boot.FILE, self.shipped(boot.NAME))
        self.tree.keep()
        location.finish(self.tree, before, watched, live=self.live)
        when = "now and at every boot" if self.live else "at the next boot; the running kernel is left alone"
        if not self.tree.dry_run:
            say("kernel.core_pattern is set " + when)

    def _use(self, pattern: str, limit: str, watched: str) -> None:
        kernel.save(self.tree)
        self._calibrate()
        cgroup.use(self.tree)
        kernel.use(self.tree, pattern, limit)
        if listener.is_wanted(self.tree) or self.options.socket:
            listener.start(self.tree)
        if self.options.test and not self.tree.dry_run:
            proof.prove(watched, keep=self.options.keep_dump)

    def _check_foreign(self) -> None:
        """Stop at a handler that the distribution does not bring, unless --force is given."""
        if not self.live:
            boot.check_image(self.tree, force=self.options.force)
            return
        now = kernel.current("core_pattern")
        if kernel.is_ours(now) or kernel.is_default(now):
            return
        if kernel.is_foreign(now) and not self.options.force:
            boot.refuse_foreign(self.tree, "kernel.core_pattern is not ours: " + kernel.describe(now))
        else:
            replacing = "would replace " if self.tree.dry_run else "replacing "
            say(replacing + kernel.describe(now) + "; uninstalling restores it")

    def _calibrate(self) -> None:
        """Let the helper measure which compressor is fastest here, if it may choose one."""
        if directory.settings(self.tree).COMPRESSOR != "auto":
            return
        if self.tree.dry_run:
            say("would run " + release.HELPER + " --calibrate")
            return
        if not self.tree.exists(CALIBRATION):
            self.tree.on_failure(lambda: remove_any(self.tree.path(CALIBRATION)))
        try:
            done = subprocess.run(
                [release.HELPER, "--calibrate"],
                check=True,
                env={},
                timeout=CALIBRATION_SECONDS,
                stdout=subprocess.PIPE,
            )
        except (OSError, subprocess.SubprocessError):
            warn("the compressors could not be measured: pigz is used, then isal, then gzip")
        else:
            for line in done.stdout.decode("utf-8", "replace").splitlines():
                say(line)

    def _reload_systemd(self) -> None:
        """Tell systemd of units that were masked or unmasked."""
        if systemd.is_running() and not self.tree.dry_run:
            subprocess.run([systemd.SYSTEMCTL, "daemon-reload"], check=False)

    def prove(self) -> None:
        """Crash a process and find its dump, with the pattern in use."""
        if not self.live:
            raise SetupError("no crash can be tested here: the kernel starts its helpers in another root")
        proof.prove(directory.watch_directory(self.tree), keep=self.options.keep_dump)

    def prepare_cgroup(self) -> None:
        """Make the cgroup that helpers move into, as at every boot."""
        if not self.live:
            raise SetupError("no cgroup is made here: the kernel starts its helpers in another root")
        say("%s leads to %s" % (cgroup.LINK, cgroup.prepare()))

    def reassert(self) -> None:
        """Give the pattern back to the helper if something else has taken it, where REASSERT=yes allows that."""
        if not self.live:
            raise SetupError("the pattern is not set here: the kernel starts its helpers in another root")
        if directory.settings(self.tree).REASSERT == "yes":
            pattern, limit = boot.ours(self.tree, self.shipped(boot.NAME))
            reassert.reassert(self.tree, pattern, limit)
            if kernel.starts_helper(kernel.current("core_pattern")) and listener.is_open():
                listener.use_socket()

    def deactivate(self) -> None:
        """Give the kernel its former pattern and remove what sets ours at boot.

        Raises:
            SetupError: the kernel still starts the helper; nothing was removed.
        """
        reassert.switch(self.tree, on=False)
        if self.live:
            if not self.tree.dry_run:
                reassert.apply_now(on=False)
                if listener.is_wanted(self.tree):
                    listener.stop()
            kernel.restore(self.tree)
        elif kernel.starts_helper_in(self.tree.root or "/"):
            raise SetupError(
                "the kernel still starts %s: uninstall on the host itself, without --root"
                % self.tree.path(release.HELPER)
            )
        self.tree.discard(boot.FILE, self._shipped_or_nothing(boot.NAME), purge=self.options.purge)
        boot.warn_of_kept_file(self.tree)
        boot.unmask_services(self.tree)
        listener.switch(self.tree, on=False)
        self.tree.remove(cgroup.WANTED)
        if self.live and not self.tree.dry_run:
            self._reload_systemd()
            _wait_for_helpers()
            cgroup.remove()
        self.tree.remove(kernel.SAVED)
        self.tree.remove(reassert.TIMES)

    def _shipped_or_nothing(self, name: str) -> bytes:
        try:
            return self.shipped(name)
        except SetupError:
            return b""

    def uninstall(self) -> None:
        """Deactivate and remove the files; dumps and helper.conf stay unless `purge` is given."""
        purge, watched = self.options.purge, self._watched()
        self.deactivate()
        for name, shipped in CONFIGURATION.items():
            if purge or name != directory.CONFIG:
                self.tree.discard(name, self._shipped_or_nothing(shipped), purge=purge)
        self.tree.remove(directory.CONFIG + DIST)
        if purge:
            self._remove_directory(watched)
        self.tree.remove(boot.SHARE + "/" + boot.NAME)
        for path, _ in UNITS:
            self.tree.remove(path)
        location.remove(self.tree)
        self.tree.remove(CALIBRATION)
        release.remove(self.tree)
        self.tree.remove(RECORD)
        self.tree.remove_empty(boot.SHARE, os.path.dirname(directory.CONFIG))
        self.tree.keep()
        self._say_what_remains(watched)

    def _say_what_remains(self, watched: str) -> None:
        """Name the files that an uninstallation leaves."""
        remaining = [name for name in (directory.CONFIG, watched) if name and self.tree.exists(name)]
        if remaining and not self.tree.dry_run:
            advice = (
                ""
                if self.options.purge
                else " (--purge removes the configuration, and the directory if it is empty)"
            )
            say("what remains: " + " and ".join(map(self.tree.path, remaining)) + advice)

    def _watched(self) -> str:
        """Return the watch directory; a configuration that names none that is possible is no reason to stay."""
        try:
            return directory.watch_directory(self.tree)
        except SetupError as error:
            warn(str(error))
            return ""

    def _remove_directory(self, name: str) -> None:
        path = self.tree.path(name)
        if not name or not os.path.isdir(path) or os.path.islink(path):
            return
        if self.tree.dry_run:
            say("would remove %s unless it holds dumps" % path)
            return
        directory.remove_state(path)
        self.tree.remove_empty(name)
        if os.path.isdir(path):
            say(path + " still holds dumps")


def _wait_for_helpers() -> None:
    """Wait until no helper runs: it may import a module of its release until it ends."""
    end = time.monotonic() + DRAIN_SECONDS
    while release.is_running():
        if time.monotonic() > end:
            warn("a dump is still being written; the program is removed nevertheless")
            return
        time.sleep(0.1)
