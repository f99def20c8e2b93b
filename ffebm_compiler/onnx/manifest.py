"""The manifest, which says how the exported parts and the energy blocks are joined (schema in `docs/onnx.md`)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ffebm_compiler.errors import ExportError
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.onnx.folder import FORMAT
from ffebm_compiler.onnx.packages import OPSET
from ffebm_compiler.onnx.program_json import program_to_json
from ffebm_compiler.onnx.steps import Operand, Step, Steps, Value
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY, name_of
from ffebm_compiler.runtime.phases.tolerances import free_rtol
from ffebm_compiler.runtime.solvers.base import GaussSeidel, evaluation_omega, update_order
from ffebm_compiler.runtime.solvers.delay import delay_of_states
from ffebm_compiler.runtime.solvers.fixed_point import expected_contraction
from ffebm_compiler.runtime.solvers.relaxation import TIGHT, stopping_rule

__all__ = ["MANIFEST", "SCHEMA", "WEIGHTS", "energy_name", "manifest_of", "seal", "settling_of"]

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"
SCHEMA = 1


def seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256`. It detects accidental and careless changes."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def settling_of(block: EnergyBlock, dtype: str) -> dict[str, Any]:
    """How a block's free phase is swept and stops, the same as in `runtime.solvers.relaxation.relax`.

    It stops at the latest after a sweep in which no layer changed by more than `largest_change` (relative), but not
    before the sweep `min_sweeps`. `largest_change` is `rtol` over the factor of
    `runtime.solvers.relaxation.stopping_rule`. The changes seen so far and the norms of the edges may end it earlier.
    The first `relaxed_sweeps` are over-relaxed by ω, or all where it is null. A file is in eval mode, so that nothing
    is masked.
    """
    contraction = block.gain.contraction
    solver = block.solver_at(contraction)
    rtol = solver.rtol or free_rtol(getattr(torch, dtype), contraction is not None)
    expected = None if contraction is None else expected_contraction(contraction, block.gain.setting.typical)
    sweeps = solver if isinstance(solver, GaussSeidel) else GaussSeidel()  # a file has no acceleration
    omega, first_alone = evaluation_omega(sweeps, expected, rtol <= TIGHT)
    schedule = "forward" if sweeps.schedule == "auto" else sweeps.schedule
    earliest, factor = stopping_rule(rtol, contraction, omega=omega)
    order = update_order(schedule, len(block.program.layers))
    earliest = max(earliest, 1 + delay_of_states(block.program.upstream, tuple(order)))
    certificate = block.certificate
    most = solver.max_sweeps
    if solver is not sweeps and contraction is not None and certificate is not None:
        most = max(most, certificate.sweeps(rtol / 10) or most)
    return {
        "rtol": rtol,
        "contraction": contraction,
        "largest_change": rtol / factor if factor else rtol,
        "min_sweeps": max(1, min(earliest, solver.max_sweeps)),
        "max_sweeps": most,
        "schedule": schedule,
        "on_failure": solver.on_failure,
        "relaxation": omega,
        "relaxed_sweeps": 1 if first_alone else None,
        "coherent": certificate is not None and certificate.coherent,
        "norms": [] if certificate is None or contraction is None else [_edge(*edge) for edge in certificate.norms],
    }


def _edge(start: int, end: int, norm: float) -> dict[str, float]:
    return {"start": start, "end": end, "norm": norm}


def manifest_of(
    hybrid: HybridCore, steps: Steps, files: Mapping[str, str], digests: Mapping[str, str]
) -> dict[str, Any]:
    """The manifest of an export.

    Args:
        hybrid: the hybrid that is exported.
        steps: its steps.
        files: name of each feedforward part -> its ONNX file.
        digests: name of each file -> its SHA-256.
    """
    produced = [*steps.inputs, *(value for step in steps.steps for value in step.outputs)]
    plan = hybrid.plan
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "schema": SCHEMA,
        "opset": OPSET,
        "model": plan.model,
        "mode": "eval",
        "fingerprint": plan.fingerprint,
        "hardware": plan.hardware.to_dict(),
        "inputs": [value.name for value in steps.inputs],
        "outputs": [_operand(operand) for operand in steps.outputs],
        "values": {value.name: {"dtype": value.dtype, "shape": list(value.shape)} for value in produced},
        "steps": [
            _energy_step(hybrid, step) if step.energy else _feedforward_step(hybrid, step, files[step.name])
            for step in steps.steps
        ],
        "files": dict(digests),
    }
    manifest["sha256"] = seal(manifest)
    return manifest


def _operand(operand: Operand) -> dict[str, str] | None:
    if operand.value is not None:
        return {"value": operand.value.name}
    return {"tensor": operand.key} if operand.tensor is not None else None


def _names(values: tuple[Value, ...]) -> list[str]:
    return [value.name for value in values]


def _feedforward_step(hybrid: HybridCore, step: Step, file: str) -> dict[str, Any]:
    part = next(part for part in hybrid.plan.digital_parts if part.name == step.name)
    read = dict.fromkeys(operand.value.name for operand in step.operands if operand.value is not None)
    return {
        "kind": "feedforward",
        "name": step.name,
        "file": file,
        "inputs": list(read),
        "outputs": _names(step.outputs),
        "operations": [
            {"name": name, "operation": hybrid.plan.graph[name].target, "module": hybrid.plan.graph[name].path}
            for name in part.operations
        ],
    }


def energy_name(step_name: str, block: EnergyBlock) -> str:
    """The name of a block's energy.

    Raises:
        ExportError: the energy is of a class that the package does not know.
    """
    energy = name_of(block.energy_function)
    if energy is None:
        raise ExportError(
            f"the energy of {step_name} is of a class of your own, which has no ONNX form: convert with one of "
            "ffebm_compiler's"
        )
    return energy


def _energy_step(hybrid: HybridCore, step: Step) -> dict[str, Any]:
    block = step.module
    assert isinstance(block, EnergyBlock)
    plan = hybrid.plan.block(step.name)
    certificate = block.certificate
    radius = certificate.radius if certificate is not None else 0.0
    energy = energy_name(step.name, block)
    other = {} if energy == DEFAULT_ENERGY.name else {"energy": energy, "amplifiers": list(block.setting.amplifiers)}
    count = block.program.inputs
    dtype = next((value.dtype for value in step.outputs), "float32")
    return {
        "kind": "energy",
        "name": step.name,
        "inputs": [_operand(operand) for operand in step.operands[:count]],
        "weights": [_operand(operand) for operand in step.operands[count:]],
        "outputs": _names(step.outputs),
        "layers": list(plan.layers),
        "parameters": list(plan.weights),
        "tiles": plan.tiles,
        "dac": plan.dac,
        "adc": plan.adc,
        "neurons": plan.neurons,
        "macs": plan.macs,
        "coupled": block.program.coupled,
        "feedback": block.feedback,
        "loop_gain": block.loop_gain if math.isfinite(block.loop_gain) else None,
        "spectral_radius": radius if math.isfinite(radius) else None,
        "scales": list(block.scales),
        **other,
        "settling": settling_of(block, dtype),
        "program": program_to_json(block.program),
    }
