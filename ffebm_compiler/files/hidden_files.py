"""Write under hidden names beside a target, and remove such files if their writer was killed.

A writer holds a lock on the file or folder that it writes, and the lock ends with its process. So a hidden file that
nobody has locked is a leftover.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["fresh_folder", "hidden_file", "hidden_name", "lock", "remove_leftovers", "status_of"]

_HIDDEN = re.compile(r"\.ffebm-[0-9a-f]{16}\.part")


def hidden_name(folder: Path) -> Path:
    """A hidden name that is not taken."""
    return folder / f".ffebm-{secrets.token_hex(8)}.part"


def hidden_file(folder: Path) -> tuple[int, Path]:
    """A new file under a hidden name, locked."""
    while True:
        path = hidden_name(folder)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        lock(descriptor)
        if _is_at(descriptor, path):
            return descriptor, path
        os.close(descriptor)  # before it was locked, another process removed it as a leftover


@contextmanager
def fresh_folder(parent: Path) -> Iterator[Path]:
    """A locked hidden folder beside a target. When the context ends it is removed, unless it was renamed."""
    descriptor = -1
    path = hidden_name(parent)
    try:
        while True:
            path.mkdir()
            if sys.platform == "win32":  # Windows cannot open a folder
                break
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                lock(descriptor)
                if _is_at(descriptor, path):
                    break
                os.close(descriptor)
            # Before it was locked, another process removed it as a leftover.
            descriptor, path = -1, hidden_name(parent)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the leftovers of killed writers from a folder: hidden files and folders that nobody has locked."""
    if sys.platform == "win32":
        return
    try:
        names = [name for name in os.listdir(folder) if _HIDDEN.fullmatch(name)]
    except OSError:
        return
    for name in names:
        path = folder / name
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(descriptor)


def status_of(path: str | Path) -> os.stat_result | None:
    """The status of a path, with links followed; None if nothing is there."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def lock(descriptor: int) -> None:
    """Hold a lock on an open file or folder until it is closed."""
    if sys.platform != "win32" and descriptor >= 0:
        with suppress(OSError):  # on a file system without locks, leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(descriptor: int, path: Path) -> bool:
    found = status_of(path)
    return found is not None and os.path.samestat(os.fstat(descriptor), found)
