"""Owns receiving cores over a socket: accepts connections, and forks a child with the pipe's Handler for each.

The differences from the pipe are in `listen`, `peer`, `request`, `socketpath`, `turns` and here. See docs/helper.md.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import fcntl
import gc
import os
import select
import time
from _socket import socket
from resource import RLIMIT_NOFILE, getrlimit

from core_dump_helper import socketpath
from core_dump_helper.handler import Handler
from core_dump_helper.peer import Peer
from core_dump_helper.request import ask_for_core
from core_dump_helper.settings import CONFIG, Settings
from core_dump_helper.system import Refused, log, set_alarm
from core_dump_helper.turns import Turns, Waiting

TYPE_CHECKING = False  # `typing` costs 3 ms
if TYPE_CHECKING:
    from core_dump_helper.corecopy import CoreCopy
    from core_dump_helper.ownmemory import OwnMemory

MAX_WAITING = 2048
"""Connections that wait in this process; further ones wait in the socket's backlog."""
OTHER_DESCRIPTORS = 600
"""In addition to those of the connections that wait, two for each."""
LOOK_SECONDS = 0.1
"""Between two looks at connections that wait."""
IDLE_SECONDS = 0.5
"""A listener that the core pattern no longer names ends after so long without a connection."""
DRAIN_SECONDS = 10
"""A listener that nothing replaces ends after so long, however many crashes come."""
COMPLAINT_SECONDS = 60


class SocketHandler(Handler):
    """Turns the crash behind one connection into a published dump."""

    def __init__(self, waiting: Waiting, config: str, memory: OwnMemory, released: int) -> None:
        """Store the connection, and the descriptor that tells the listener when the slot is free."""
        super().__init__(waiting.peer.crash(config), waiting.connection.fileno())
        self._connection, self._memory, self._released = waiting.connection, memory, released
        self.started = waiting.since

    def load_settings(self) -> None:
        """Read helper.conf; without a prepared cgroup, that of the listener limits the memory."""
        super().load_settings()
        self.settings.own_memory = self._memory

    def prepare(self) -> None:
        """Refuse the crash of a program that a handler started, as the kernel refuses to pipe it."""
        if self.crash.rlimit == "1":
            raise Refused("", "RLIMIT_CORE is 1, as in the programs that handle crashes")
        super().prepare()

    def let_go(self, directory: int) -> None:
        """Let the kernel send the core; read a small one at once, which releases the process."""
        try:
            ask_for_core(self._connection)
        except OSError as error:
            raise Refused("", "the process was killed before its core began: %s" % error.strerror) from error
        self.held.core = self._connection.detach()
        if self.held.read_small(directory, self.container(), self.owns_proc()):
            self._end_turn()

    def record_result(self, dump: int, copy: CoreCopy, truncated: str, took_ms: int) -> None:
        """Tell the listener that the core is read."""
        if not self.held.was_let_go:
            self._end_turn()
        super().record_result(dump, copy, truncated, took_ms)

    def _end_turn(self) -> None:
        try:
            os.write(self._released, b".")
        except BrokenPipeError:  # the listener was killed
            pass


class Listener:
    """Accepts connections and gives each a child when it is its turn."""

    def __init__(
        self, connections: socket, path: str, config: str, memory: OwnMemory, *, is_kept: bool
    ) -> None:
        """Store the socket; `is_kept` says that somebody else keeps it open when this process ends."""
        self._connections, self._path, self._config, self._is_kept = connections, path, config, is_kept
        status = os.stat(path)
        self._inode = status.st_dev, status.st_ino
        self._turns, self._settings = Turns(), Settings()
        self._memory = memory
        self._settings_file: tuple[int, int] | None = None
        self._stopped = 0.0
        """When the listener was told to stop (monotonic); 0 while it was not."""
        self._last_accepted = time.monotonic()
        self._complained, self._strangers = 0.0, 0
        self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._may_accept = True
        most, _ = getrlimit(RLIMIT_NOFILE)
        self._most_waiting = max(1, min(MAX_WAITING, (most - OTHER_DESCRIPTORS) // 2))
        connections.setblocking(False)

    def run(self) -> None:
        """Listen until the process is told to stop and every crash is handled."""
        _signal.signal(_signal.SIGTERM, self._stop)
        _signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        _signal.signal(_signal.SIGCHLD, _signal.SIG_IGN)  # nobody waits for the children
        gc.collect()
        gc.freeze()  # a child that collects garbage would copy every page
        while not self._is_done():
            self._load_settings()
            self._wait()
            if self._may_accept:
                self._accept()
            self._start_children()

    def _stop(self, *_: object) -> None:
        self._stopped = self._stopped or time.monotonic()

    def _is_done(self) -> bool:
        """Return whether this process may end; stop accepting as soon as nothing can come any more."""
        if self._stopped and self._may_accept:
            now = time.monotonic()
            leads_here = socketpath.is_in_pattern(self._path) and socketpath.has_name(self._path, self._inode)
            is_idle = now - max(self._stopped, self._last_accepted) > IDLE_SECONDS
            is_over = self._is_kept if leads_here else is_idle
            if is_over or now - self._stopped > DRAIN_SECONDS:
                self._may_accept = False
                self._connections.close()
        return not (self._may_accept or self._turns.waiting or self._turns.children)

    def _load_settings(self) -> None:
        """Read the limits again if helper.conf has changed; each child reads all of it."""
        try:
            status = os.stat(self._config or CONFIG)
            version = status.st_mtime_ns, status.st_ino
        except OSError:
            version = 0, 0
        if version == self._settings_file:
            return
        self._settings_file = version
        settings = self._settings = Settings()
        settings.load(self._config or CONFIG, lambda _: None)  # each child logs the lines that are wrong
        most = self._memory.most_children(settings.MAX_CONCURRENT)
        has_vital = settings.VITAL_LIMIT != "0" and settings.VITAL_BYTES > 0
        self._turns.set_limits(
            most, self._memory.most_processes(), settings.DEADLINE_SECONDS, has_vital=has_vital
        )

    def _wait(self) -> None:
        """Wait for a connection, a child or a signal; note whose turn is over and which children have ended."""
        turns, poll = self._turns, select.poll()
        poll.register(self._wakeup[0], select.POLLIN)
        if self._may_accept and len(turns.waiting) < self._most_waiting:
            poll.register(self._connections.fileno(), select.POLLIN)
        for descriptor in turns.children:
            poll.register(descriptor, select.POLLIN)
        seconds = LOOK_SECONDS if turns.waiting or self._stopped else None
        for descriptor, _ in poll.poll(seconds and seconds * 1000):
            if descriptor == self._wakeup[0]:
                os.read(descriptor, 4096)
            elif descriptor in turns.children:
                if os.read(descriptor, 1):
                    turns.children[descriptor].has_turn = False
                else:
                    os.close(descriptor)
                    del turns.children[descriptor]

    def _accept(self) -> None:
        """Take connections off the backlog; close those that do not come from the kernel."""
        while len(self._turns.waiting) < self._most_waiting:
            try:
                descriptor, _ = self._connections._accept()  # type: ignore[attr-defined]  # noqa: SLF001
            except BlockingIOError:
                return
            except OSError as error:  # no descriptor, or no memory, until a child ends
                self._complain("cannot accept a connection: %s" % error.strerror)
                time.sleep(LOOK_SECONDS)
                return
            connection = socket(fileno=descriptor)
            self._last_accepted = time.monotonic()
            try:
                fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
                peer = Peer(connection)
            except (Refused, OSError) as error:
                connection.close()
                self._strangers += 1
                self._complain("%s; %d connections were closed" % (error, self._strangers))
            else:
                waiting = Waiting(connection, peer, peer.origin(), self._last_accepted)
                self._turns.add(waiting, self._most_waiting)

    def _complain(self, text: str) -> None:
        """Log a line at most once in COMPLAINT_SECONDS."""
        now = time.monotonic()
        if not self._complained or now - self._complained > COMPLAINT_SECONDS:
            self._complained = now
            log(text)

    def _start_children(self) -> None:
        for waiting, child in self._turns.ready(time.monotonic()):
            pipe: tuple[int, ...] = ()
            try:
                pipe = ended, released = os.pipe2(os.O_CLOEXEC)
                pid = os.fork()
            except OSError as error:
                self._complain("cannot start a child: %s" % error.strerror)
                self._turns.waiting.insert(0, waiting)
                for descriptor in pipe:
                    os.close(descriptor)
                return
            if not pid:
                self._run_child(waiting, ended, released)
            self._turns.children[ended] = child
            os.close(released)
            waiting.close()

    def _run_child(self, waiting: Waiting, ended: int, released: int) -> None:
        """Handle one crash and end this process."""
        code = 1
        try:
            _signal.set_wakeup_fd(-1)
            for number in (_signal.SIGTERM, _signal.SIGCHLD):
                _signal.signal(number, _signal.SIG_DFL)
            if self._may_accept:
                self._connections.close()
            others = [*self._turns.children, *self._wakeup, ended]
            for descriptor in others:
                os.close(descriptor)
            for other in self._turns.waiting:
                other.close()
            set_alarm(self._settings.DEADLINE_SECONDS)
            self._memory.sacrifice()
            waiting.connection.setblocking(True)
            code = SocketHandler(waiting, self._config, self._memory, released).handle()
        except BaseException as error:  # noqa: BLE001 - nobody reads a traceback here
            log("a crash is not handled: %s: %s" % (type(error).__name__, error), 3)
        finally:
            os._exit(code)
