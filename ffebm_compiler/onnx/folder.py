"""Write the folder of an export. It appears as a whole, and replaces nothing but an earlier export."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.checked_json import parse_json
from ffebm_compiler.files.whole_files import saying
from ffebm_compiler.files.whole_folders import FreshFolder, recover_folder, whole_folder

__all__ = ["FAILURE", "FORMAT", "export_folder"]

FAILURE = "the export cannot be written"
FORMAT = "ffebm-digital"
"""The value of `format` in our manifests."""


@contextmanager
def export_folder(folder: Path) -> Iterator[FreshFolder]:
    """A folder to write an export to. It appears at `folder` when the context ends without an error.

    Then it replaces an earlier export. After an error that is left as it is.

    Raises:
        ExportError: the path cannot be written, is a file, or holds anything but an earlier export.
    """
    recover_folder(folder)
    _check_free(folder)
    with whole_folder(folder, failure=FAILURE) as fresh:
        yield fresh


def _check_free(target: Path) -> None:
    """Refuse a path that holds anything but an earlier export."""
    if not os.path.exists(target):
        return
    if not os.path.isdir(target):
        raise ExportError(f"{target} is a file, and parts='digital' writes a folder: name one that is new or empty")
    try:
        present = {item.name for item in target.iterdir()}
        if not present:
            return
        manifest = parse_json((target / "manifest.json").read_text(encoding="utf-8"))
        known = manifest["format"] == FORMAT and present <= {*manifest["files"], "manifest.json"}
    except OSError as error:
        if error.errno and not isinstance(error, FileNotFoundError):
            with saying(target, FAILURE, ExportError):
                raise
        known = False
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ExportError(
            f"{target} holds files that are not of an earlier export: name a folder that is new or empty, or remove "
            "them"
        )
