"""Folders and files that appear whole: written under another name beside the target, then moved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffebm_compiler.errors import ExportError

__all__ = ["FORMAT", "digest_of", "whole_files", "whole_folder"]

FORMAT = "ffebm-digital"
"""What a manifest of ours says under `format`."""


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write to, moved to `folder` when the context ends without an error.

    An earlier export there is replaced.

    Raises:
        ExportError: where the path cannot be written, is a file, or holds anything but an earlier export.
    """
    target = Path(os.path.abspath(folder))
    _check_free(target, folder)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    old = fresh.with_suffix(".old")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_files(path: Path) -> Iterator[Path]:
    """A folder in which to write a file (and others beside it), moved beside `path` when the context ends.

    Raises:
        ExportError: where the path cannot be written or is a folder.
    """
    target = Path(os.path.abspath(path))
    if target.is_dir():
        raise ExportError(f"{path} is a folder: name a file that ends in .onnx, or pass parts='digital' for a folder")
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        # The file itself last: it is never there without what it refers to.
        for file in sorted(fresh.iterdir(), key=lambda item: item.name == target.name):
            file.replace(target.with_name(file.name))
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _unwritable(path: Path, error: OSError) -> ExportError:
    return ExportError(
        f"the export cannot be written to {path} ({error.strerror or error}): choose a path that you may write to"
    )


def _check_free(target: Path, given: Path) -> None:
    """Only an earlier export may be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ExportError(f"{given} is a file: parts='digital' writes a folder; name one that is new or empty")
    try:
        present = {item.name for item in target.iterdir()}
        if not present:
            return
        manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and present <= {*manifest["files"], "manifest.json"}
    except OSError as error:
        if error.errno and not isinstance(error, FileNotFoundError):
            raise _unwritable(given, error) from error
        known = False
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ExportError(
            f"{given} holds files that are not of an earlier export: name a folder that is new or empty, or remove them"
        )
