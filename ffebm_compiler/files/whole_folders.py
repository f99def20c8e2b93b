"""Replace folders as a whole. The older folder stays until the new one is complete, even if a process is killed.

If the system can exchange two names (Linux, macOS), the new folder takes the older one's place in one step. Elsewhere
the older one is set aside first. If a process is killed between the two steps, `recover_folder`, which every reader and
writer calls, puts the older one back.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ffebm_compiler.errors import ExportError, FFEBMError
from ffebm_compiler.files.hidden_files import fresh_folder, remove_leftovers
from ffebm_compiler.files.whole_files import FreshFile, saying, sync_file, sync_folder, take_over

__all__ = ["FreshFolder", "digest_of", "recover_folder", "whole_folder"]

_MOST_OPEN = 64
"""The largest number of nameless files that are kept open. If there are more, the folder gets a hidden name."""


class FreshFolder:
    """A folder that is being written. Until it is complete, its files have no names or lie in a hidden folder."""

    def __init__(self, parent: Path, stack: ExitStack) -> None:
        self._parent = parent
        self._stack = stack
        self._files: dict[str, FreshFile] = {}
        self._path: Path | None = None
        self._shared = False

    def write(self, name: str, content: str | bytes) -> None:
        """Add a file, and wait until it is on the disk."""
        if len(self._files) >= _MOST_OPEN:
            self._with_names()
        file = self._stack.enter_context(FreshFile(self._path or self._parent))
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        if self._path is None:
            self._files[name] = file
        else:
            file.become(self._path / name)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file so far, in hexadecimal, in the order of their names."""
        if self._path is None:
            return {name: file.digest() for name, file in sorted(self._files.items())}
        return {file.name: digest_of(file) for file in sorted(self._path.iterdir())}

    @property
    def path(self) -> Path:
        """The hidden folder with all files so far, for code that reads or writes files itself."""
        self._shared = True
        return self._with_names()

    def complete(self) -> Path:
        """The hidden folder, with everything on the disk."""
        path = self._with_names()
        for file in path.rglob("*") if self._shared else ():
            if file.is_file():
                sync_file(file)
        sync_folder(path)
        return path

    def _with_names(self) -> Path:
        if self._path is None:
            self._path = self._stack.enter_context(fresh_folder(self._parent))
            for name, file in self._files.items():
                file.become(self._path / name)
            self._files.clear()
        return self._path


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(
    path: str | Path, *, failure: str = "the folder cannot be written", error: type[FFEBMError] = ExportError
) -> Iterator[FreshFolder]:
    """A folder to write to, which takes the place of the one at `path` when the context ends without an error.

    Folders above it are made. A link is followed, and an older folder's permissions are kept.

    Args:
        path: the folder.
        failure: begins the error message, which goes on with "to PATH".
        error: class of the error.

    Raises:
        FFEBMError: of the class `error`; the folder cannot be written. Says why and what to do.
    """
    with saying(path, failure, error):
        target = Path(os.path.realpath(path))
        made = _make_parents(target.parent)
        try:
            remove_leftovers(target.parent)
            with ExitStack() as stack:
                fresh = FreshFolder(target.parent, stack)
                yield fresh
                _replace(target, fresh.complete())
        except BaseException:
            for folder in made:
                with suppress(OSError):
                    folder.rmdir()
            raise


def recover_folder(path: str | Path) -> None:
    """Put an older folder back if its writer was killed after setting it aside."""
    with suppress(OSError, ValueError):
        target = Path(os.path.realpath(path))
        aside = _path_aside(target)
        if aside.is_dir() and not os.path.lexists(target):
            aside.rename(target)


def _replace(target: Path, fresh: Path) -> None:
    recover_folder(target)
    aside = _path_aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if not _take_name(fresh, target) and not _exchange(fresh, target):
        target.rename(aside)
        try:
            fresh.rename(target)
        except OSError:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.parent)


def _take_name(fresh: Path, target: Path) -> bool:
    """Give the new folder its name; if that is taken, return False and copy the older one's owner and permissions."""
    try:
        older = target.stat()
    except FileNotFoundError:
        try:
            fresh.rename(target)
            return True
        except OSError:  # another writer was faster
            older = target.stat()
    with suppress(OSError):
        descriptor = os.open(fresh, os.O_RDONLY)
        try:
            take_over(descriptor, older)
        finally:
            os.close(descriptor)
    return False


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot."""
    library = ctypes.CDLL(None) if sys.platform != "win32" else None
    try:
        if sys.platform == "linux":
            at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
            return library.renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0  # type: ignore[union-attr]
        if sys.platform == "darwin":
            swap = 2  # RENAME_SWAP
            return library.renamex_np(os.fsencode(first), os.fsencode(second), swap) == 0
    except AttributeError:  # an older C library
        return False
    return False


def _path_aside(target: Path) -> Path:
    """The path of an older folder that is set aside."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]
    return target.with_name(f".ffebm-{digest}.older")


def _make_parents(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that are new, the innermost first."""
    new = []
    while not os.path.lexists(folder):
        new.append(folder)
        folder = folder.parent
    (new[0] if new else folder).mkdir(parents=True, exist_ok=True)
    return new
