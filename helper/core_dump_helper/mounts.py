"""Owns which file systems a crash's files may be read from: local ones, which need no other process or host."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_MOUNTS_BYTES = 16 << 20
"""Of the helper's own mountinfo."""
LOCAL = frozenset(
    (b"ext2 ext3 ext4 xfs btrfs zfs f2fs jfs bcachefs reiserfs overlay aufs tmpfs ramfs rootfs").split()
    + (b"squashfs erofs romfs cramfs iso9660 udf vfat exfat").split()
)
"""Types in mountinfo. FUSE may be served by the crashed process itself; a file server may never answer."""


def parse_mounts(text: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yield id, device and type of file system of each mount in a mountinfo: proc_pid_mountinfo(5).

    Damaged lines are left out. The kernel escapes no other line end than the newline in the path of a mount.
    """
    for line in text.split(b"\n"):
        mount, _, rest = line.partition(b" - ")
        words = mount.split(b" ", 3)
        if len(words) == 4 and rest:
            yield words[0], words[2], rest.partition(b" ")[0]


def device_numbers(device: bytes, base: int = 16) -> tuple[int, int]:
    """Return the numbers in `major:minor`, which are hexadecimal in maps, decimal (`base` 10) in mountinfo."""
    major, minor = device.split(b":")
    return int(major, base), int(minor, base)


class Mounts:
    """Which of the file systems in a mountinfo are local."""

    def __init__(self, text: bytes) -> None:
        """Parse the text of /proc/PID/mountinfo."""
        self._by_device: dict[bytes, bool] = {}
        self._by_id: dict[bytes, bool] = {}
        for number, device, kind in parse_mounts(text):
            local = kind in LOCAL
            self._by_id[number] = local
            self._by_device[device] = local and self._by_device.get(device, True)

    def is_local_device(self, device: bytes) -> bool | None:
        """Return whether files with this `major:minor` (hexadecimal, as in maps) are local; None if it is unknown."""
        return self._by_device.get(b"%d:%d" % device_numbers(device))

    def is_local_mount(self, number: bytes) -> bool | None:
        """Return whether the mount with this number is local; None if it is unknown."""
        return self._by_id.get(number)
