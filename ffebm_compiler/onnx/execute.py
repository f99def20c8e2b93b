"""Execute a manifest, with feedforward parts in onnxruntime and energy blocks in this package's runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.errors import ExportError, FFEBMError, UnsupportedError
from ffebm_compiler.files.paths import path_of
from ffebm_compiler.files.tensor_file import read_tensors
from ffebm_compiler.files.whole_folders import digest_of, recover_folder
from ffebm_compiler.onnx.inputs import Inputs, named_inputs
from ffebm_compiler.onnx.manifest import MANIFEST, WEIGHTS
from ffebm_compiler.onnx.manifest_file import read_manifest
from ffebm_compiler.onnx.packages import package
from ffebm_compiler.onnx.program_file import program_from_json
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY, energy_of
from ffebm_compiler.runtime.solvers.base import GaussSeidel

__all__ = ["Exported", "Inputs", "load", "run", "session_of"]


def run(folder: str | Path, inputs: Inputs, *, threads: int | None = None) -> list[Tensor]:
    """Execute an export made with `hybrid.export_onnx(folder, parts="digital")`.

    Args:
        folder: the exported folder.
        inputs: the network's tensors.
        threads: number of threads of onnxruntime. None leaves it to onnxruntime.

    Returns:
        The network's outputs, flattened, on the CPU.

    Raises:
        ExportError: a file is missing, was changed or lies outside of the folder, or an input does not fit.
        ConvergenceError: a block does not settle.
    """
    return load(folder, threads=threads).run(inputs)


def load(folder: str | Path, *, threads: int | None = None) -> Exported:
    """Read and check an export once, to run it many times. Arguments and errors are those of `run`."""
    return Exported(path_of(folder, "the folder of an export", "folder"), threads)


def session_of(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session of one file, on the CPU.

    Raises:
        ExportError: where onnxruntime is not installed or cannot load the file.
    """
    runtime = package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises several kinds
        if "NOT_IMPLEMENTED" in str(error):
            raise ExportError(
                f"onnxruntime on a CPU has no operator that {path.name} needs for its dtype ({error}): export the "
                "hybrid in float32 (hybrid.float()), since many operators have no float64 there, or run the file in "
                "another runtime"
            ) from error
        raise ExportError(f"onnxruntime cannot load {path.name} ({error}): export again") from error


class Exported:
    """An export, checked and ready to run."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        recover_folder(folder)
        self.folder = folder
        self.manifest = read_manifest(folder)
        for name, digest in self.manifest["files"].items():
            _check_file(folder, name, digest)
        try:
            has_weights = WEIGHTS in self.manifest["files"]
            self._tensors = read_tensors(folder / WEIGHTS, ExportError, "export again") if has_weights else {}
            self._steps = [self._build(step, threads) for step in self.manifest["steps"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ExportError(
                f"{folder / MANIFEST} is malformed ({type(error).__name__}: {error}): export again"
            ) from error

    def _build(self, step: Mapping[str, Any], threads: int | None) -> Any:
        if step["kind"] == "energy":
            return self._energy(step)
        if step["file"] not in self.manifest["files"]:
            raise ExportError(f"{step['name']} names the file {step['file']!r}, which the manifest does not list")
        return session_of(self.folder / step["file"], threads)

    def _energy(self, step: Mapping[str, Any]) -> EnergyBlock:
        program = program_from_json(step["name"], step["program"])
        scales = tuple(float(scale) for scale in step["scales"])
        if len(scales) != len(program.layers) or len(step["inputs"]) != program.inputs:
            raise ValueError(f"{step['name']} has {len(scales)} scales and {len(step['inputs'])} inputs")
        if len(step["weights"]) != program.weights or len(step["outputs"]) != len(program.outputs):
            raise ValueError(f"{step['name']} has {len(step['weights'])} weights and {len(step['outputs'])} outputs")
        used = {item.weights[0] for layer in program.layers for item in layer.instructions if item.weights} - {None}
        used |= {weight for _, weight in program.feedback_weights}
        if any(operand is None for operand in step["inputs"]) or any(step["weights"][index] is None for index in used):
            raise ValueError(f"{step['name']} has a null among the inputs or weights that its program reads")
        for operand in (*step["inputs"], *step["weights"]):
            if operand is not None and "tensor" in operand and operand["tensor"] not in self._tensors:
                raise ValueError(f"{step['name']} reads {operand['tensor']!r}, which {WEIGHTS} does not hold")
        settling = step["settling"]
        block = EnergyBlock(program).eval()
        energy = energy_of(step.get("energy", DEFAULT_ENERGY.name))
        amplifiers = tuple(float(gain) for gain in step.get("amplifiers", ()))
        if len(amplifiers) != (len(program.layers) if energy.amplified and program.coupled else 0):
            raise ValueError(f"{step['name']} has {len(amplifiers)} amplifiers and {len(program.layers)} layers")
        try:
            block.set_energy(energy)
        except UnsupportedError as error:
            raise ValueError(str(error)) from error
        block.gain.feedback = step["feedback"]
        radius = step["spectral_radius"]
        radius = math.inf if radius is None else float(radius)
        norms = tuple((edge["start"], edge["end"], float(edge["norm"])) for edge in settling.get("norms", ()))
        if any(index >= len(program.layers) for edge in norms for index in edge[:2]):
            raise ValueError(f"{step['name']} has the norm of an edge between layers that it does not have")
        coherent = bool(settling.get("coherent", False))
        block.gain.certificate = Certificate(norms, scales, radius, settling["contraction"], amplifiers, coherent)
        block.solver = GaussSeidel(
            rtol=settling["rtol"],
            max_sweeps=settling["max_sweeps"],
            on_failure=settling["on_failure"],
            schedule=settling["schedule"],
            relaxation=None if settling.get("relaxed_sweeps") else settling.get("relaxation", 1.0),
        )
        return block

    def run(self, inputs: Inputs) -> list[Tensor]:
        """Execute it; see `run` of this module."""
        values = self.values(inputs)
        outputs = [self._operand(item, values) for item in self.manifest["outputs"]]
        return [output for output in outputs if output is not None]

    def values(self, inputs: Inputs) -> dict[str, Tensor]:
        """Execute it and return every value that passes between steps, by its name in the manifest."""
        values = self._inputs(inputs)
        for step, work in zip(self.manifest["steps"], self._steps, strict=True):
            if isinstance(work, EnergyBlock):
                operands = [self._operand(item, values) for item in (*step["inputs"], *step["weights"])]
                with torch.no_grad():
                    results: Sequence[Tensor] = self._settled(step, work, operands)
            else:
                results = _part(step, work, values)
            values.update(zip(step["outputs"], results, strict=True))
        return values

    def _settled(
        self, step: Mapping[str, Any], block: EnergyBlock, operands: Sequence[Tensor | None]
    ) -> Sequence[Tensor]:
        try:
            return block(*operands)
        except FFEBMError:
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError, AssertionError) as error:
            raise ExportError(f"{step['name']} does not fit its inputs ({error}): export again") from error

    def _operand(self, item: Mapping[str, str] | None, values: Mapping[str, Tensor]) -> Tensor | None:
        if item is None:
            return None
        found = values.get(item["value"]) if "value" in item else self._tensors.get(item["tensor"])
        if found is None:
            raise ExportError(f"the manifest reads {next(iter(item.values()))!r}, which no step computes: export again")
        return found

    def _inputs(self, inputs: Inputs) -> dict[str, Tensor]:
        sizes: dict[str, int] = {}
        given = named_inputs(self.manifest["inputs"], inputs)
        return {name: self._checked(name, value, sizes) for name, value in given.items()}

    def _checked(self, name: str, value: Tensor, sizes: dict[str, int]) -> Tensor:
        spec = self.manifest["values"][name]
        dtype = getattr(torch, spec["dtype"])
        if value.is_floating_point() != dtype.is_floating_point:
            raise ExportError(f"input {name!r} has dtype {value.dtype}, expected {dtype}: convert it")
        fits = value.dim() == len(spec["shape"])
        for found, size in zip(value.shape, spec["shape"], strict=False):
            # A size with a plain name must be equal everywhere. The parts themselves check the expressions.
            expected = sizes.setdefault(size, found) if isinstance(size, str) and size.isidentifier() else size
            fits = fits and (found == expected or isinstance(expected, str))
        if not fits:
            shape = ", ".join(str(size) for size in spec["shape"])
            raise ExportError(f"input {name!r} has shape {tuple(value.shape)}, expected ({shape}): reshape it")
        return value.to(dtype)


def _part(step: Mapping[str, Any], session: Any, values: Mapping[str, Tensor]) -> list[Tensor]:
    try:
        feed = {name: values[name].contiguous().numpy() for name in step["inputs"]}
        return [torch.from_numpy(np.array(result)) for result in session.run(step["outputs"], feed)]
    except Exception as error:  # onnxruntime raises several kinds
        raise ExportError(f"onnxruntime cannot run {step['name']} ({error}): check the inputs' shapes") from error


def _check_file(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if os.path.islink(path) or not os.path.isfile(path):
        raise ExportError(f"{path} is missing (or is a link), so that the export is incomplete: export again")
    if digest_of(path) != digest:
        raise ExportError(f"{path} was changed after the export (its SHA-256 differs): export again")
