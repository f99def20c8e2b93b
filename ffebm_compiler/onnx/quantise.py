"""Quantise the feedforward parts of an export to int8, with onnxruntime's own static quantisation."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.paths import path_of
from ffebm_compiler.files.whole_folders import FreshFolder
from ffebm_compiler.onnx.digital import save_part
from ffebm_compiler.onnx.execute import Inputs, load, session_of
from ffebm_compiler.onnx.folder import export_folder
from ffebm_compiler.onnx.inputs import named_inputs
from ffebm_compiler.onnx.manifest import MANIFEST, seal
from ffebm_compiler.onnx.model_file import write_model
from ffebm_compiler.onnx.packages import package
from ffebm_compiler.onnx.static_int8 import static_int8
from ffebm_compiler.reports.deviation import largest_deviation

__all__ = ["ARITHMETIC", "OPERATIONS", "Quantised", "QuantisedPart", "quantise"]

OPERATIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""The operations that are quantised by default: those that multiply and accumulate."""

ARITHMETIC = (
    *OPERATIONS,
    *("Add", "Sub", "Mul", "Softmax", "Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "Gelu", "Elu", "HardSwish"),
    *("BatchNormalization", "InstanceNormalization", "LayerNormalization", "GroupNormalization"),
    *("AveragePool", "GlobalAveragePool", "MaxPool", "Resize", "Concat", "Reshape", "Transpose", "Flatten"),
    *("Squeeze", "Unsqueeze", "Slice", "Split", "Gather"),
)
"""The operations whose values `Devices(digital_bits=8)` quantises in simulation, and those that move such values."""


@dataclass(frozen=True)
class QuantisedPart:
    """The result for one feedforward part."""

    operations: int
    """Operations in int8."""
    deviation: float
    """The largest ‖int8 − float‖ / ‖float‖ of its outputs, on the calibration inputs of this part.

    Of integers and booleans it is the share of values that differ.
    """
    reason: str = ""
    """Why the part was left as it was; empty if it was quantised."""


@dataclass(frozen=True)
class Quantised:
    """The result for a whole export."""

    folder: Path
    """The folder, or the file."""
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
    inputs: Inputs | None = None,
    *,
    batches: Iterable[Inputs] | None = None,
    into: str | Path | None = None,
    operations: Sequence[str] = OPERATIONS,
) -> Quantised:
    """Quantise the feedforward parts of an export to int8: of the digital parts, or of the whole hybrid.

    `onnxruntime.quantization.quantize_static` does it. Weights are symmetric int8 per channel. Activations are int8
    with zero points per tensor, in the range that they take on the given inputs. Both are written as pairs of
    QuantizeLinear and DequantizeLinear, which onnxruntime fuses into integer kernels. Energy blocks stay as they are. A
    part without any of `operations` is left as it is, and its reason says so.

    Args:
        folder: what `hybrid.export_onnx(folder, parts="digital")` wrote, or the file of `hybrid.export_onnx(file)`.
        inputs: representative inputs of the network, as one batch. A larger batch gives better ranges.
        batches: several such batches, as any iterable, in the place of `inputs`. It is read once.
        into: a new or empty folder, or one of an earlier export, which is replaced; or another file. None replaces
            `folder`.
        operations: kinds of ONNX operations to quantise. `ARITHMETIC` are those that the simulation quantises.

    Returns:
        The deviation of each part and of the network, the largest over the batches. The manifest holds them too, under
        `int8`.

    Raises:
        ExportError: the export cannot be read or is in int8 already, an input does not fit, the result cannot
            be written, or onnxruntime cannot quantise a part.
    """
    source = path_of(folder, "the export", "folder")
    target = source if into is None else path_of(into, "the folder or file to write", "into")
    package("onnx")
    package("onnxruntime")
    if (inputs is None) == (batches is None):
        raise ExportError("quantise takes calibration inputs either as `inputs`, one batch, or as `batches`, several")
    given = [inputs] if inputs is not None else list(batches or ())
    if not given:
        raise ExportError("batches holds no batch: pass representative inputs, such as a few batches of a loader")
    if not os.path.isdir(source) and os.path.exists(source):
        return _file(source, target, given, operations)
    exported = load(source)
    if "int8" in exported.manifest:
        raise ExportError(f"{source} is in int8 already: export again and quantise that")
    values = [exported.values(batch) for batch in given]
    _check_finite(value for batch in values for value in batch.values())
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
        result = load(fresh.path)
        overall = max(largest_deviation(result.run(batch), exported.run(batch)) for batch in given)
        manifest["int8"] = {"deviation": overall}
        _write(fresh, manifest)
    return Quantised(target, parts, overall)


def _write(folder: FreshFolder, manifest: dict[str, Any]) -> None:
    manifest["sha256"] = seal(manifest)
    folder.write(MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def _part(
    folder: FreshFolder, step: Mapping[str, Any], values: Sequence[Mapping[str, Tensor]], operations: Sequence[str]
) -> QuantisedPart:
    onnx = package("onnx")
    path = folder.path / step["file"]
    kinds = [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]
    found = sorted(set(kinds) & set(operations))
    if not found:
        return QuantisedPart(0, 0.0, f"left as it is: it holds no {', '.join(operations)}")
    feeds = [{name: batch[name].contiguous().numpy() for name in step["inputs"]} for batch in values]
    with tempfile.TemporaryDirectory(dir=folder.path) as work:
        model = static_int8(step["name"], path, Path(work) / "int8.onnx", feeds, found)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    save_part(onnx, model, folder, path.name)
    session = session_of(path)
    worst = 0.0
    for feed, batch in zip(feeds, values, strict=True):
        have = [torch.from_numpy(value) for value in session.run(step["outputs"], feed)]
        worst = max(worst, largest_deviation(have, [batch[name] for name in step["outputs"]]))
    return QuantisedPart(_count(model, found), worst)


def _count(model: Any, operations: Sequence[str]) -> int:
    """How many operations of a model read int8."""
    restored = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type in operations and node.input[0] in restored for node in model.graph.node)


def _file(path: Path, target: Path, batches: Sequence[Inputs], operations: Sequence[str]) -> Quantised:
    """Quantise a whole hybrid's file. Its energy blocks are functions, which the quantiser leaves as they are."""
    onnx, ir = package("onnx"), package("onnx_ir")
    session = session_of(path)
    names = [item.name for item in session.get_inputs()]
    feeds = [_feed(path, names, batch) for batch in batches]
    try:
        wanted = [_tensors(session.run(None, feed)) for feed in feeds]
    except Exception as error:  # onnxruntime raises several kinds
        raise ExportError(f"{path} does not run on the calibration inputs ({error}): check them") from error
    _check_finite(value for values in wanted for value in values)
    model = onnx.load(str(path), load_external_data=False)
    found = sorted({node.op_type for node in model.graph.node} & set(operations))
    if not found:
        raise ExportError(f"{path} holds no {', '.join(operations)} outside of its energy blocks: nothing to quantise")
    is_large = any(item.external_data for item in model.graph.initializer)
    with tempfile.TemporaryDirectory() as work:
        quantised = static_int8(path.name, path, Path(work) / "int8.onnx", feeds, found)
    write_model(target, ir.serde.deserialize_model(quantised), tensors_beside=is_large)
    int8 = session_of(target)
    pairs = zip(feeds, wanted, strict=True)
    worst = max(largest_deviation(_tensors(int8.run(None, feed)), expected) for feed, expected in pairs)
    return Quantised(target, {path.name: QuantisedPart(_count(quantised, found), worst)}, worst)


def _feed(path: Path, names: Sequence[str], batch: Inputs) -> dict[str, Any]:
    """The inputs of a file, by name."""
    return {name: np.ascontiguousarray(each) for name, each in named_inputs(names, batch, str(path)).items()}


def _tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(each) for each in arrays]


def _check_finite(values: Iterable[Tensor]) -> None:
    if any(not bool(torch.isfinite(value).all()) for value in values if value.is_floating_point()):
        raise ExportError("the calibration inputs give values that are not finite: check the inputs")
