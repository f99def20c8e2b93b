"""Export the digital parts as one ONNX file each, with the blocks' weights and the manifest that joins them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from ffebm_compiler.errors import ExportError
from ffebm_compiler.files.paths import path_of
from ffebm_compiler.files.whole_folders import FreshFolder
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.onnx.folder import export_folder
from ffebm_compiler.onnx.manifest import MANIFEST, WEIGHTS, manifest_of
from ffebm_compiler.onnx.mode import warn_of_train_mode, warn_of_written_state
from ffebm_compiler.onnx.packages import package
from ffebm_compiler.onnx.split import part_of
from ffebm_compiler.onnx.steps import Operand, Step, Steps, Value, refuse_complex
from ffebm_compiler.onnx.trace import Trace
from ffebm_compiler.runtime.feedforward.casts import without_autocast

__all__ = ["export_digital", "part_models", "save_part"]

_LARGE = 1 << 30
"""If a part has more bytes of tensors, they go to a file beside it (one protobuf holds 2 GiB)."""


@without_autocast()
def export_digital(
    hybrid: HybridCore,
    folder: str | Path,
    *,
    fuse_batchnorm: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Path:
    """Write one checked ONNX file per feedforward part, the energy blocks' weights, and `manifest.json`.

    The files are in eval mode, whatever mode the hybrid is in, and have a free batch size. An `FFEBMWarning` says if
    the mode matters. `docs/onnx.md` has the schema of the manifest, and `ffebm_compiler.onnx.run(folder, inputs)`
    executes it.

    Args:
        hybrid: the hybrid, which is not changed.
        folder: a new or empty folder, or one of an earlier export, which is replaced.
        fuse_batchnorm: let the exporter fuse batch norm into digital convolutions.
        progress: called with the name of each step: once at the start, then for each part and for the manifest.

    Returns:
        The folder.

    Raises:
        ExportError: where onnx is not installed, an operation has no ONNX form, a value outside of the parts is
            complex, or the folder cannot be written.
        InputError: the folder is no path.
    """
    target = path_of(folder, "the folder to write")
    onnx = package("onnx")
    package("onnxscript")
    warn_of_train_mode(hybrid)
    warn_of_written_state(hybrid)
    progress("tracing")
    steps = Steps.of(hybrid)
    refuse_complex(steps, between=True)
    with export_folder(target) as fresh:
        files: dict[str, str] = {}
        for step, model in part_models(steps, hybrid, fuse_batchnorm):
            progress(f"writing {step.name}")
            files[step.name] = _file_name(step, hybrid)
            save_part(onnx, model, fresh, files[step.name])
        progress("writing the manifest")
        tensors = _tensors(steps)
        if tensors:
            fresh.write(WEIGHTS, to_bytes(tensors))
        text = json.dumps(manifest_of(hybrid, steps, files, fresh.digests()), indent=1, allow_nan=False)
        fresh.write(MANIFEST, text + "\n")
    return target


def part_models(steps: Steps, hybrid: HybridCore, fuse: bool) -> list[tuple[Step, Any]]:
    """The ONNX models of all feedforward parts, by one export.

    Raises:
        ExportError: an operation has no ONNX form; names the part and the modules.
    """
    parts = [step for step in steps.steps if not step.energy]
    if not parts:
        return []
    try:
        return _exported(parts, hybrid, fuse)
    except ExportError as error:
        if len(parts) > 1:
            for step in parts:  # export them one by one to find the part that failed
                _exported([step], hybrid, fuse)
        raise ExportError(_with_operations(parts[0], hybrid, error) if len(parts) == 1 else str(error)) from error


def _with_operations(step: Step, hybrid: HybridCore, error: ExportError) -> str:
    operations = [hybrid.plan.graph[name] for name in _operations(step, hybrid)]
    named = ", ".join(dict.fromkeys(f"{item.target} of {item.path or 'the model'}" for item in operations))
    return f"{step.name} ({named}) cannot be written as ONNX: {error}"


def _exported(parts: Sequence[Step], hybrid: HybridCore, fuse: bool) -> list[tuple[Step, Any]]:
    trace = Trace()
    ports: list[tuple[list[tuple[str, Value]], list[tuple[str, Value]]]] = []
    for step in parts:
        inputs: list[tuple[str, Value]] = []

        def read(value: Value, step: Step = step, inputs: list[tuple[str, Value]] = inputs) -> Any:
            inputs.append((f"{step.name}.in{len(inputs)}", value))
            return trace.input(*inputs[-1])

        results = trace.feedforward(step, [trace.operand(operand, read) for operand in step.operands])
        outputs = [(f"{step.name}.out{index}", value) for index, value in enumerate(step.outputs)]
        for (name, _), node in zip(outputs, results, strict=True):
            trace.output(name, node)
        ports.append((inputs, outputs))
    try:
        joint = trace.export(fuse)
    except ExportError as error:
        if len(parts) == 1:
            raise ExportError(_with_operations(parts[0], hybrid, error)) from error
        raise
    proto = package("onnx_ir").to_proto(joint)
    models = []
    for step, (inputs, outputs) in zip(parts, ports, strict=True):
        model = part_of(proto, step.name, inputs, outputs)
        model.metadata_props.add(key="ffebm.part", value=step.name)
        model.metadata_props.add(key="ffebm.operations", value=", ".join(_operations(step, hybrid)))
        models.append((step, model))
    return models


def _operations(step: Step, hybrid: HybridCore) -> tuple[str, ...]:
    return next(part.operations for part in hybrid.plan.digital_parts if part.name == step.name)


def _file_name(step: Step, hybrid: HybridCore) -> str:
    """The part's name and its operations, e.g. `digital_1_batch_norm_relu.onnx`."""
    kinds = dict.fromkeys(hybrid.plan.graph[name].target for name in _operations(step, hybrid))
    words: list[str] = []
    for kind in kinds:
        if len("_".join([*words, kind])) > 60:
            words.append("etc")
            break
        words.append(kind)
    plain = "".join(letter if letter.isalnum() else "_" for letter in "_".join(words))
    return f"{step.name}_{plain}.onnx"


def save_part(onnx: Any, model: Any, folder: FreshFolder, name: str) -> None:
    """Write a model and check it. Large tensors go to a file beside it."""
    checked: str | bytes
    if model.ByteSize() > _LARGE:
        checked = str(folder.path / name)
        onnx.save_model(model, checked, save_as_external_data=True, location=f"{name}.data", size_threshold=1024)
    else:
        checked = model.SerializeToString()
        folder.write(name, checked)
    try:
        onnx.checker.check_model(checked, full_check=True)
    except Exception as error:  # onnx raises several kinds
        raise ExportError(f"{name} does not pass onnx.checker ({error}): please report the model") from error


def _tensors(steps: Steps) -> dict[str, Tensor]:
    """The weights that the energy blocks and the outputs read, each once."""
    found: dict[str, Tensor] = {}
    operands: list[Operand] = [operand for step in steps.steps if step.energy for operand in step.operands]
    for operand in [*operands, *steps.outputs]:
        if operand.tensor is not None:
            found[operand.key] = operand.tensor.detach().to("cpu", copy=True).contiguous()
    return found
