"""Owns which file systems a crash's files may be read from: local ones, of which none can make the helper wait."""

from __future__ import annotations

LOCAL = frozenset(
    (b"ext2 ext3 ext4 xfs btrfs zfs f2fs jfs bcachefs reiserfs overlay aufs tmpfs ramfs rootfs").split()
    + (b"squashfs erofs romfs cramfs iso9660 udf vfat exfat").split()
)
"""Types in mountinfo. FUSE may be served by the crashed process itself; a file server may never answer."""


class Mounts:
    """The types of the file systems in a mountinfo: proc_pid_mountinfo(5)."""

    def __init__(self, text: bytes) -> None:
        """Parse the text of /proc/PID/mountinfo; lines that are damaged are left out."""
        self._by_device: dict[bytes, bool] = {}
        self._by_id: dict[bytes, bool] = {}
        for line in text.split(b"\n"):
            fields, _, rest = line.partition(b" - ")
            words = fields.split(b" ", 3)
            if len(words) < 4 or not rest:
                continue
            local = rest.split(b" ", 1)[0] in LOCAL
            self._by_id[words[0]] = local
            self._by_device[words[2]] = local and self._by_device.get(words[2], True)

    def is_local_device(self, device: bytes) -> bool | None:
        """Return whether files with this `major:minor` (hexadecimal, as in maps) are local; None if it is unknown."""
        major, _, minor = device.partition(b":")
        return self._by_device.get(b"%d:%d" % (int(major, 16), int(minor, 16)))

    def is_local_mount(self, number: bytes) -> bool | None:
        """Return whether the mount with this number is local; None if it is unknown."""
        return self._by_id.get(number)
