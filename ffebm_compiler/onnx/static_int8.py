"""onnxruntime's own static quantisation of one file: pairs of QuantizeLinear and DequantizeLinear, int8 per channel."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.packages import package

__all__ = ["static_int8"]

Feed = Mapping[str, Any]
"""Name of an input -> its array."""


def static_int8(what: str, path: Path, result: Path, feeds: Sequence[Feed], operations: Sequence[str]) -> Any:
    """The int8 model of a file, with its metadata. It is also written to `result`.

    Args:
        what: the file's name in messages.
        path: the model.
        result: a new file.
        feeds: calibration inputs.
        operations: the operations to quantise, of those that the model has.

    Raises:
        ExportError: onnxruntime cannot quantise it.
    """
    try:
        with _quiet():
            return _quantised(path, result, feeds, operations)
    except Exception as error:  # onnxruntime and onnx raise several kinds
        raise ExportError(
            f"onnxruntime cannot quantise {what} ({type(error).__name__}, {error}): leave operations out, "
            f"of {', '.join(operations)}"
        ) from error


def _quantised(path: Path, result: Path, feeds: Sequence[Feed], operations: Sequence[str]) -> Any:
    tools = package("onnxruntime.quantization")
    onnx = package("onnx")

    class Feeds(tools.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self._left = [dict(feed) for feed in reversed(feeds)]

        def get_next(self) -> dict[str, Any] | None:
            return self._left.pop() if self._left else None

    tools.quantize_static(
        str(path),
        str(result),
        Feeds(),
        quant_format=tools.QuantFormat.QDQ,
        op_types_to_quantize=list(operations),
        per_channel=True,
        activation_type=tools.QuantType.QInt8,
        weight_type=tools.QuantType.QInt8,
        use_external_data_format=path.with_name(f"{path.name}.data").exists(),
    )
    before, after = onnx.load(str(path), load_external_data=False), onnx.load(str(result))
    del after.metadata_props[:]
    after.metadata_props.extend(before.metadata_props)
    after.producer_name = before.producer_name
    after.producer_version = ""
    return after


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what onnxruntime's tools log through the root logger, and remove the handler that they install."""
    root = logging.getLogger()
    handler, level = logging.NullHandler(), root.level
    root.addHandler(handler)
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
