"""Write files that are whole or absent. An older file stays until the new one is complete, even if a process is killed.

If the file system can do it (`O_TMPFILE` on Linux), a new file has no name while it is written, so that a killed one
leaves nothing. The complete file gets its name, and takes the older one's place, in one step. Elsewhere it is
written under a hidden name, and the next write into the same folder removes a leftover. `whole_folders` writes folders.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ffebm_compiler.errors import ExportError, FFEBMError
from ffebm_compiler.files.hidden_files import hidden_file, hidden_name, lock, remove_leftovers, status_of
from ffebm_compiler.files.paths import path_of

__all__ = [
    "FreshFile",
    "place",
    "saying",
    "sync_file",
    "sync_folder",
    "take_over",
    "write_whole",
]

_REMEDIES = {
    errno.ENOSPC: "free some space, or choose a path on another disk",
    errno.EDQUOT: "free some of your quota, or choose a path on another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EISDIR: "it is a folder; name a file",
}


def write_whole(
    path: str | Path,
    content: str | bytes,
    *,
    failure: str = "the file cannot be written",
    error: type[FFEBMError] = ExportError,
) -> None:
    """Write a file completely, or leave the older one as it was.

    A link is followed. The permissions of an older file are kept, and a new file gets the usual ones. A device such as
    `/dev/stdout` is simply written to.

    Args:
        path: the file.
        content: bytes, or a text, which is written as UTF-8.
        failure: begins the error message, which goes on with "to PATH".
        error: class of the error.

    Raises:
        FFEBMError: of the class `error`; the file cannot be written. Says why and what to do.
        InputError: `path` is no path.
    """
    path = path_of(path, "a file to write")
    with saying(path, failure, error, "give a file name in an existing folder that you may write to"):
        data = content.encode("utf-8") if isinstance(content, str) else content
        older = status_of(path)
        if older is not None and not stat.S_ISREG(older.st_mode) and not stat.S_ISDIR(older.st_mode):
            with open(path, "wb", buffering=0) as device:
                _fill(device.fileno(), data)
            return
        target = Path(os.path.realpath(path))
        if older is not None and stat.S_ISDIR(older.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if older is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        remove_leftovers(target.parent)
        with FreshFile(target.parent) as file:
            file.write(data)
            file.become(target)
        sync_folder(target.parent)


@contextmanager
def saying(
    path: str | Path, failure: str, error: type[FFEBMError], remedy: str = "choose a path that you may write to"
) -> Iterator[None]:
    """Turn an error of the system into one that names the path and says what to do."""
    try:
        yield
    except (OSError, ValueError) as cause:
        if isinstance(cause, FFEBMError):
            raise
        reason = getattr(cause, "strerror", None) or cause
        raise error(
            f"{failure} to {path}: {reason}; {_REMEDIES.get(getattr(cause, 'errno', None) or 0, remedy)}"
        ) from cause


class FreshFile:
    """A file that is being written in a folder and has no name, or a hidden one, until it is complete.

    It is a context manager. If `become` was not called when the context ends, the file is removed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hidden: Path | None = None
        try:
            self._descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
        except (OSError, AttributeError):  # the file system or the system has no nameless files
            self._descriptor, self._hidden = hidden_file(folder)

    def __enter__(self) -> FreshFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
        if self._hidden is not None:
            self._hidden.unlink(missing_ok=True)

    def write(self, data: bytes) -> None:
        """Add bytes, and wait until they are on the disk."""
        _fill(self._descriptor, data)
        _sync(self._descriptor)

    def digest(self) -> str:
        """SHA-256 of what was written, in hexadecimal."""
        with open(self._descriptor, "rb", closefd=False) as file:
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()

    def become(self, target: Path) -> None:
        """Take a name, in place of the file that has it. The caller has to sync the folder."""
        older = status_of(target)
        if older is not None:
            take_over(self._descriptor, older)
        if self._hidden is None:
            if older is None and self._give_name(target):
                return
            self._takehidden_name()
        assert self._hidden is not None
        if sys.platform == "win32":  # Windows cannot move an open file
            os.close(self._descriptor)
            self._descriptor = -1
        os.replace(self._hidden, target)
        self._hidden = None

    def _give_name(self, name: Path) -> bool:
        """Give the nameless file a free name; False if that fails."""
        try:
            # With a descriptor, Python calls linkat, which follows the link in /proc.
            os.link(f"/proc/self/fd/{self._descriptor}", name, src_dir_fd=self._descriptor, follow_symlinks=True)
        except OSError:
            return False
        return True

    def _takehidden_name(self) -> None:
        lock(self._descriptor)
        self._hidden = hidden_name(self._folder)
        if self._give_name(self._hidden):
            return
        nameless = self._descriptor  # /proc is missing, so that the file has to be copied
        self._descriptor, self._hidden = hidden_file(self._folder)
        os.fchmod(self._descriptor, stat.S_IMODE(os.fstat(nameless).st_mode))
        with open(nameless, "rb") as source, open(self._descriptor, "wb", closefd=False) as copy:
            source.seek(0)
            shutil.copyfileobj(source, copy)
        _sync(self._descriptor)


def place(file: Path, target: Path) -> None:
    """Move a complete file to its place in the same or the parent folder, and sync the folder."""
    sync_file(file, status_of(target))
    os.replace(file, target)
    sync_folder(target.parent)


def take_over(descriptor: int, older: os.stat_result) -> None:
    """Give a new file or folder the owner and the permissions of the one that it replaces."""
    if sys.platform == "win32":
        return
    own = os.fstat(descriptor)
    if (own.st_uid, own.st_gid) != (older.st_uid, older.st_gid):
        with suppress(OSError):  # only root may change the owner of a file
            os.fchown(descriptor, older.st_uid, older.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(older.st_mode))


def sync_file(path: Path, older: os.stat_result | None = None) -> None:
    """Sync a file to the disk, with the owner and the permissions of an older one."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if older is not None:
            take_over(descriptor, older)
        _sync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to the disk, if the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _fill(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[: 1 << 30]) :]


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # those mean that the file system cannot sync
            raise
