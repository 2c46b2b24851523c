"""What one line of the kernel log tells, and which lines nobody but the kernel can have caused."""

import pytest

from core_dump_collector.losses.messages import (
    DAEMON,
    KERNEL,
    Drop,
    Dropped,
    Fault,
    HelperCannotCount,
    HelperFailed,
    HelperRefused,
    HelperTold,
    OomKilled,
    Suppressed,
    parse,
)

OF_KERNEL = {
    # Linux 6.18, as it printed them
    b"coredump: 25347(nsegv): |/nonexistent/helper pipe failed": Dropped(
        Drop.HELPER_NOT_STARTED, b"nsegv", 25347, b"/nonexistent/helper"
    ),
    b"coredump: 7(a): |/x/h -P7 -- %e pipe failed": Dropped(Drop.HELPER_NOT_STARTED, b"a", 7, b"/x/h"),
    rb"coredump: 25364(a b\nc)): |/nonexistent/helper pipe failed": Dropped(
        Drop.HELPER_NOT_STARTED, b"a b\nc)", 25364, b"/nonexistent/helper"
    ),
    b"coredump: 25370(lim1): over core_pipe_limit, skipping core dump": Dropped(
        Drop.PIPE_LIMIT, b"lim1", 25370
    ),
    b"coredump: 5(s): Coredump socket connection /nonexistent/s failed -2": Dropped(
        Drop.SOCKET_MISSING, b"s", 5
    ),
    b"coredump: 5(s): Coredump socket connection /run/s failed -111": Dropped(Drop.NO_LISTENER, b"s", 5),
    b"coredump: 5(s): Coredump socket connection /var/run/s failed -40": Dropped(
        Drop.SOCKET_SYMLINK, b"s", 5
    ),
    b"coredump: 5(s): Coredump socket connection /run/s failed -13": Dropped(Drop.SOCKET_FAILED, b"s", 5),
    b"coredump: 5(s): Coredump socket /run/s receive queue full": Dropped(Drop.SOCKET_FULL, b"s", 5),
    b"coredump: 5(s): RLIMIT_CORE is set to 1, aborting core": Dropped(Drop.HELPER_CRASHED, b"s", 5),
    b"coredump: 5(s): format_corename failed, aborting core": Dropped(Drop.PATTERN, b"s", 5),
    b"coredump: 5(s): Core dump to /mnt/core aborted: cannot preserve file owner": Dropped(
        Drop.FILE, b"s", 5
    ),
    b"coredump_pipe: 15 callbacks suppressed": Suppressed(15, faults=False),
    b"do_coredump: 3 callbacks suppressed": Suppressed(3, faults=False),
    b"show_signal_msg: 13 callbacks suppressed": Suppressed(13, faults=True),
    b"nsegv[25347]: segfault at 8 ip 000055ae8bdc918f sp 00007ffebcb78e90 error 6 in "
    b"crash[118f,55ae8bdc9000+1000] likely on CPU 0 (core 0, socket 0)": Fault(b"nsegv", 25347, 11),
    b"a b\nc)[25364]: segfault at 8 ip 00005577ac22118f sp 00007ffe6dbd0ac0 error 6": Fault(
        b"a b\nc)", 25364, 11
    ),
    b"traps: nill[25349] trap invalid opcode ip:55df618c2278 sp:7ffec90fafe0 error:0 in "
    b"crash[1278,55df618c2000+1000]": Fault(b"nill", 25349, 4),
    b"traps: ngp[25353] general protection fault ip:5573d0d4e203 sp:7fff120a04c0 error:0 in x[1,2+3]": Fault(
        b"ngp", 25353, 11
    ),
    b"traps: nde[25357] trap divide error ip:55d273bc123b sp:7ffdc55e36a0 error:0": Fault(b"nde", 25357, 8),
    b"traps: nbp[25355] trap int3 ip:555f2440c21e sp:7ffe055d4d70 error:0": Fault(b"nbp", 25355, 5),
    b"Out of memory: Killed process 4242 (hog) total-vm:2101956kB, anon-rss:1kB, UID:0": OomKilled(
        b"hog", 4242
    ),
    b"Memory cgroup out of memory: Killed process 4242 (hog) total-vm:2101956kB, anon-rss:1kB": OomKilled(
        b"hog", 4242
    ),
    # Linux 5.10 and 4.14, from their sources
    b"Pid 12(app) over core_pipe_limit": Dropped(Drop.PIPE_LIMIT, b"app", 12),
    b"Skipping core dump": None,
    b"Process 12(app) has RLIMIT_CORE set to 1": Dropped(Drop.HELPER_CRASHED, b"app", 12),
    b"Aborting core": None,
    b"Core dump to |/usr/libexec/h -P12 -- a b pipe failed": Dropped(
        Drop.HELPER_NOT_STARTED, program=b"/usr/libexec/h"
    ),
    b"format_corename failed": Dropped(Drop.PATTERN),
    b"Pid 12(app) can only dump core to fully qualified path!": Dropped(Drop.PATTERN, b"app", 12),
    b"Killed process 4242 (hog) total-vm:2101956kB, anon-rss:1kB, file-rss:0kB": OomKilled(b"hog", 4242),
    b"traps: x[9] general protection ip:400d sp:7fff error:0 in x[400000+1000]": Fault(b"x", 9, 11),
    b"app[77]: unhandled exception: DABT (lower EL), ESR 0x92000046, level 2 translation fault in app[1+2]": Fault(
        b"app", 77, 0
    ),
    b"EXT4-fs (loop0): mounted filesystem": None,
    b"": None,
}


@pytest.mark.parametrize("text", OF_KERNEL)
def test_line_of_the_kernel_is_understood(text):
    assert parse(KERNEL, text) == OF_KERNEL[text]


@pytest.mark.parametrize("text", OF_KERNEL)
@pytest.mark.parametrize("facility", [1, 3, 4, 23])
def test_line_of_the_kernel_counts_only_if_the_kernel_wrote_it(text, facility):
    assert parse(facility, text) is None


FORGED = [
    # names of threads and files that look like messages: 15 bytes, and 255 without a slash
    (
        b"coredump: 12(x)[1234]: segfault at 0 ip 000055ae8bdc918f sp 00007ffebcb78e90 error 4 in "
        b"y): over core_pipe_limit, skipping core dump[118f,55ae8bdc9000+1000] likely on CPU 0 (core 0, socket 0)"
    ),
    (
        b"coredump: 12(x)[1234]: segfault at 0 ip 000055ae8bdc918f sp 00007ffebcb78e90 error 4 in "
        b"\ncoredump: 1(y): over core_pipe_limit, skipping core dump\n[118f,55ae8bdc9000+1000]"
    ),
    b"x\ncoredump: 1(y): over core_pipe_limit, skipping core dump",
    b"Pid 1(0123456789abcdef) over core_pipe_limit",
    rb"coredump: 1(0123456789abcdef): over core_pipe_limit, skipping core dump",
    b"coredump: 99999999999(x): over core_pipe_limit, skipping core dump",
    b"core-dump-helper[1]: Process 12 (app) of user 33 terminated by signal 11 (SIGSEGV); dumping",
]


@pytest.mark.parametrize("text", FORGED)
def test_names_chosen_by_a_process_forge_no_dropped_dump(text):
    event = parse(KERNEL, text)
    assert event is None or isinstance(event, Fault)


CRASH = b"core-dump-helper[55]: Process 12 (a\\tb) of user 33 terminated by signal 11 (SIGSEGV); "
OF_HELPER = {
    b"dumping": HelperTold(b"a\tb", 12, 11),
    b"no dump: pigz failed; core-a-1-2-3.gz.partial holds what it wrote": HelperTold(b"a\tb", 12, 11),
    b"no dump: rate_limit: 5 dumps in 600 s": HelperRefused(55, "rate_limit", b"a\tb", 12, 11),
    b"no dump: disk_full: nothing was written: disk_full": HelperRefused(55, "disk_full", b"a\tb", 12, 11),
    b"no dump: nothing was written: killed": HelperFailed("nothing_read", b"a\tb", 12, 11),
    b"no dump: FileNotFoundError: [Errno 2] No such file or directory: '/core_dumps'": HelperFailed(
        "directory", b"a\tb", 12, 11
    ),
    b"no dump: OSError: [Errno 40] Too many levels of symbolic links: '/x'": HelperFailed(
        "directory", b"a\tb", 12, 11
    ),
    b"no dump: MemoryError: ": HelperFailed("memory", b"a\tb", 12, 11),
    b"no dump: not_started: ModuleNotFoundError: No module named 'core_dump_helper'": HelperFailed(
        "not_started", b"a\tb", 12, 11
    ),
    b"no dump: ZeroDivisionError: division by zero": HelperFailed("error", b"a\tb", 12, 11),
}


@pytest.mark.parametrize("end", OF_HELPER)
def test_line_of_the_helper_is_understood(end):
    assert parse(DAEMON, CRASH + end) == OF_HELPER[end]
    assert parse(1, CRASH + end) is None, "a user's program"


@pytest.mark.parametrize(
    "text",
    [
        b"core-dump-helper[55]: cannot count directory in .helper: [Errno 30] Read-only file system",
        b"core-dump-helper[55]: cannot use .helper: Read-only file system; RATE_LIMIT and MAX_CONCURRENT are off",
    ],
)
def test_refusal_that_cannot_be_recorded_is_told_before_it(text):
    assert parse(DAEMON, text) == HelperCannotCount(55)


def test_unknown_process_is_told_without_pid():
    line = b"core-dump-helper[5]: Process ? (x) of user ? terminated by signal ?; dumping"
    assert parse(DAEMON, line) == HelperTold(b"x", 0, 0)
