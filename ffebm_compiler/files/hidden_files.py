"""Hidden names beside a target, for what is being written, and the removal of those whose writer was killed.

A writer holds a lock on what it writes, which ends with its process: what is hidden and locked by nobody is a leftover.
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
    """A name that nothing has."""
    return folder / f".ffebm-{secrets.token_hex(8)}.part"


def hidden_file(folder: Path) -> tuple[int, Path]:
    """A new file under a hidden name, locked."""
    while True:
        path = hidden_name(folder)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        lock(descriptor)
        if _same(descriptor, path):
            return descriptor, path
        os.close(descriptor)  # another process took it for a leftover before it was locked


@contextmanager
def fresh_folder(parent: Path) -> Iterator[Path]:
    """A hidden folder beside a target, removed when the context ends unless it was renamed; locked meanwhile."""
    descriptor = -1
    path = hidden_name(parent)
    try:
        while True:
            path.mkdir()
            if sys.platform == "win32":  # which opens no folders
                break
            with suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY)
                lock(descriptor)
                if _same(descriptor, path):
                    break
                os.close(descriptor)
            # Another process took it for a leftover before it was locked.
            descriptor, path = -1, hidden_name(parent)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if descriptor >= 0:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder: hidden, and locked by nobody."""
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
    """What is there, links followed; None where nothing is."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def lock(descriptor: int) -> None:
    """Hold a lock on an open file or folder until it is closed."""
    if sys.platform != "win32" and descriptor >= 0:
        with suppress(OSError):  # a file system without locks: nobody removes its leftovers
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def _same(descriptor: int, path: Path) -> bool:
    found = status_of(path)
    return found is not None and os.path.samestat(os.fstat(descriptor), found)
