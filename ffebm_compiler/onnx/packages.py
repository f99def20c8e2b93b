"""The optional packages of the ONNX export, asked for by name."""

from __future__ import annotations

import importlib
from typing import Any

from ffebm_compiler.errors import ExportError

__all__ = ["IR_VERSION", "OPSET", "package"]

OPSET = 20
"""Version of the ONNX operators that every file uses."""
IR_VERSION = 10
"""Version of the ONNX file format: onnxruntime 1.18 is the first that reads it."""


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        ExportError: where it is not installed, with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"the ONNX export needs the package {name!r}, which is not installed: pip install ffebm-compiler[onnx]"
        ) from error
