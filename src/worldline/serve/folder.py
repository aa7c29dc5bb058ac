"""Folder of a server's data: its lock, its file system, its way onto the disk."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from worldline.errors import InputError

# flock and the shared memory of a write-ahead log hold between processes of one machine alone
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|afs|ceph|lustre|gpfs|beegfs\w*|pvfs2|orangefs|glusterfs|ocfs2|gfs2|"
    r"fuse\.(sshfs|s3fs|gcsfuse|goofys|rclone|mount-s3|blobfuse2?|glusterfs\S*|ceph\S*|juicefs|"
    r"lustre|davfs\S*|nfs\S*)|fuse\.juicefs|davfs"
)


def file_system(path: Path, mounts: str) -> str:
    """Type of the file system that a path lies on: nfs4, ext4.

    Args:
        path: may be absent yet.
        mounts: content of /proc/self/mountinfo (proc(5)).
    """
    place, best, kind = os.path.realpath(path), "", ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        if len(words := left.split(" ")) < 5 or not right:
            continue
        # blanks, tabs, newlines and backslashes are written as octal numbers
        mount = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):  # of two mounts at one place the later one is seen
            best, kind = mount, right.split(" ")[0]
    return kind


def check_local(folder: Path) -> None:
    """Refuse a folder on a network file system."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:  # not Linux; the lock and the write-ahead log are tried in any case
        return
    kind = file_system(folder, mounts)
    if _NETWORK.fullmatch(kind):
        raise InputError(
            f"{folder}: it is on a network file system ({kind}), where the database can be "
            "damaged; give a folder of a local disk"
        )


def locked(folder: Path) -> int:
    """Descriptor of the folder's lock, which holds until it is closed or the process ends.

    Raises:
        InputError: another process holds it.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise InputError(
            f"{folder}: a server uses it, the process {holder}; stop that, or give another folder"
        ) from None
    except OSError:
        os.close(descriptor)
        raise
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def synchronise(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
