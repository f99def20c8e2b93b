"""Read the TOML or JSON file of a fabric."""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ffebm_compiler.errors import HardwareError
from ffebm_compiler.files.checked_json import clipped, parse_json

__all__ = ["read_table"]


def read_table(path: Path, optional: Collection[str]) -> dict[str, Any]:
    """The top-level table of a TOML or JSON file. In optional fields, TOML's "none" becomes None.

    Raises:
        HardwareError: the file cannot be read or parsed, or is no table.
    """
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise HardwareError(f"{path}: a hardware file must end in .toml or .json")
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a mark of its encoding
    except (OSError, ValueError) as error:
        raise HardwareError(f"{path}: cannot be read ({error})") from error
    try:
        table = tomllib.loads(text) if suffix == ".toml" else parse_json(text)
    except (ValueError, RecursionError) as error:
        raise HardwareError(f"{path}: not valid {suffix[1:].upper()} ({clipped(str(error))})") from error
    if not isinstance(table, dict):
        raise HardwareError(f"{path}: expected an object of hardware fields, got {type(table).__name__}")
    if suffix == ".toml":
        table = _without_none(table, optional)
        if isinstance(table.get("overrides"), dict):
            table["overrides"] = {p: _without_none(own, optional) for p, own in table["overrides"].items()}
    return table


def _without_none(table: Any, optional: Collection[str]) -> Any:
    if not isinstance(table, dict):
        return table
    return {key: None if key in optional and value == "none" else value for key, value in table.items()}
