"""Quantise exported feedforward parts to int8, with onnxruntime's own static quantisation."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.whole_folders import FreshFolder
from ffebm_compiler.onnx.digital import save_part
from ffebm_compiler.onnx.execute import Inputs, load, session_of
from ffebm_compiler.onnx.folder import export_folder
from ffebm_compiler.onnx.manifest import MANIFEST, seal
from ffebm_compiler.onnx.packages import package
from ffebm_compiler.onnx.verify import deviation

__all__ = ["OPERATIONS", "Quantised", "QuantisedPart", "quantise"]

OPERATIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operations that are quantised by default: those that multiply and accumulate."""


@dataclass(frozen=True)
class QuantisedPart:
    """The result for one feedforward part."""

    operations: int
    """Operations in int8."""
    deviation: float
    """The largest ‖int8 − float‖ / ‖float‖ of its outputs, on the calibration inputs of this part."""
    reason: str = ""
    """Why the part was left as it was; empty if it was quantised."""


@dataclass(frozen=True)
class Quantised:
    """The result for a whole export."""

    folder: Path
    parts: Mapping[str, QuantisedPart]
    """Name of each part -> its result."""
    deviation: float
    """The largest ‖int8 − float‖ / ‖float‖ of the network's outputs, on the calibration inputs."""

    def __str__(self) -> str:
        """A line for each part, and one for the network."""
        lines = [
            f"{name}: {part.reason or f'{part.operations} operations in int8, deviation {part.deviation:.1e}'}"
            for name, part in self.parts.items()
        ]
        return "\n".join([*lines, f"the network: deviation {self.deviation:.1e}"])


def quantise(
    folder: str | Path,
    inputs: Inputs,
    *,
    into: str | Path | None = None,
    operations: Sequence[str] = OPERATIONS,
) -> Quantised:
    """Quantise the feedforward parts of an export of digital parts to int8.

    `onnxruntime.quantization.quantize_static` does it. Weights are symmetric int8 per channel. Activations are int8
    with zero points per tensor, in the range that they take on the given inputs. Both are written as pairs of
    QuantizeLinear and DequantizeLinear, which onnxruntime fuses into integer kernels. Energy blocks stay as they are. A
    part without any of `operations` is left as it is, and its reason says so.

    Args:
        folder: what `hybrid.export_onnx(folder, parts="digital")` wrote.
        inputs: representative inputs of the network, as one batch. A larger batch gives better ranges.
        into: a new or empty folder, or one of an earlier export, which is replaced. None replaces `folder`.
        operations: kinds of ONNX operations to quantise.

    Returns:
        The deviation of each part and of the network. The manifest holds them too, under `int8`.

    Raises:
        ExportError: the export cannot be read or is in int8 already, an input does not fit, the result cannot
            be written, or onnxruntime cannot quantise a part.
    """
    source, target = Path(folder), Path(folder if into is None else into)
    package("onnx")
    package("onnxruntime")
    exported = load(source)
    if "int8" in exported.manifest:
        raise ExportError(f"{source} is in int8 already: export again and quantise that")
    values = exported.values(inputs)
    if any(not bool(torch.isfinite(value).all()) for value in values.values() if value.is_floating_point()):
        raise ExportError("the calibration inputs give values that are not finite: check the inputs")
    parts: dict[str, QuantisedPart] = {}
    manifest = json.loads(json.dumps(exported.manifest))
    with export_folder(target) as fresh:
        for name in manifest["files"]:
            shutil.copyfile(source / name, fresh.path / name)
        for step in manifest["steps"]:
            if step["kind"] == "feedforward":
                part = _part(fresh, step, values, operations)
                parts[step["name"]] = part
                step["int8"] = {"operations": part.operations, "deviation": part.deviation, "reason": part.reason}
        manifest["files"] = fresh.digests()
        manifest["int8"] = {"deviation": 0.0}
        _write(fresh, manifest)
        expected = exported.run(inputs)
        overall = deviation(load(fresh.path).run(inputs), expected)
        manifest["int8"] = {"deviation": overall}
        _write(fresh, manifest)
    return Quantised(target, parts, overall)


def _write(folder: FreshFolder, manifest: dict[str, Any]) -> None:
    manifest["sha256"] = seal(manifest)
    folder.write(MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def _part(
    folder: FreshFolder, step: Mapping[str, Any], values: Mapping[str, Tensor], operations: Sequence[str]
) -> QuantisedPart:
    onnx = package("onnx")
    path = folder.path / step["file"]
    kinds = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    found = sorted(set(kinds) & set(operations))
    if not found:
        return QuantisedPart(0, 0.0, f"left as it is: it holds no {', '.join(operations)}")
    feed = {name: values[name].contiguous().numpy() for name in step["inputs"]}
    try:
        with _quiet(), tempfile.TemporaryDirectory(dir=folder.path) as work:
            model = _quantised(path, Path(work) / "int8.onnx", feed, found)
    except Exception as error:  # onnxruntime and onnx raise several kinds
        raise ExportError(
            f"onnxruntime cannot quantise {step['name']} ({type(error).__name__}, {error}): leave operations out, "
            f"of {', '.join(found)}"
        ) from error
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    save_part(onnx, model, folder, path.name)
    have = [torch.from_numpy(value) for value in session_of(path).run(step["outputs"], feed)]
    restored = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    count = sum(node.op_type in found and node.input[0] in restored for node in model.graph.node)
    return QuantisedPart(count, deviation(have, [values[name] for name in step["outputs"]]))


def _quantised(path: Path, result: Path, feed: Mapping[str, Any], operations: Sequence[str]) -> Any:
    """The quantised model of one part, which is also written to `result`."""
    tools = package("onnxruntime.quantization")
    onnx = package("onnx")

    class Once(tools.CalibrationDataReader):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            self._left = [dict(feed)]

        def get_next(self) -> dict[str, Any] | None:
            return self._left.pop() if self._left else None

    tools.quantize_static(
        str(path),
        str(result),
        Once(),
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
