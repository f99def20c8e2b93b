"""Import the optional packages of the ONNX export by name."""

from __future__ import annotations

import importlib
import re
from typing import Any

from ffebm_compiler.errors import ExportError

__all__ = ["IR_VERSION", "OLDEST", "OPSET", "package"]

OLDEST = {"onnx": "1.19", "onnxscript": "0.5.4", "onnxruntime": "1.22"}
"""The oldest version of each package that the export works with. The extra `onnx` requires the same."""

OPSET = 20
"""Version of the ONNX operators that every file uses."""
IR_VERSION = 10
"""Version of the ONNX file format. onnxruntime 1.18 is the first that reads it."""


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        ExportError: it is not installed or too old. Names the command that installs it.
    """
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"the ONNX export needs the package {name!r}, which cannot be imported ({error}): pip install "
            "'ffebm-compiler[onnx]'"
        ) from error
    oldest = OLDEST.get(name)
    found = str(getattr(module, "__version__", ""))
    if oldest is not None and found and _numbers(found) < _numbers(oldest):
        raise ExportError(
            f"{name} {found} is installed, the ONNX export needs {oldest} or newer: "
            f"pip install --upgrade '{name}>={oldest}'"
        )
    return module


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version starts with: (1, 22, 0) of "1.22.0rc1"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])
