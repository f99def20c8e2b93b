"""`convert` and `plan`: the compiler's one call and its dry run.

`pipeline.passes_for` is the table of contents of the compiler: the passes over a captured graph, in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.export import ExportedProgram, ShapesCollection

from ffebm_compiler.conversion import Conversion
from ffebm_compiler.errors import InputError, PlanError
from ffebm_compiler.feedback_weights import FeedbackWeights, feedback_weights_of
from ffebm_compiler.garbage import collected_rarely, forget_traced
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import resolve_hardware
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.inference import ordinary, outside_inference
from ffebm_compiler.ir import OperationGraph, Program
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.passes.lower import lower
from ffebm_compiler.passes.planning import make_plan
from ffebm_compiler.pipeline import annotated_program
from ffebm_compiler.plan import Plan, PlanOptions, fingerprint
from ffebm_compiler.recast import Casts
from ffebm_compiler.reports.verification import verify_feedforward
from ffebm_compiler.runtime.devices.devices import Devices, devices_of
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.energies.choice import DEFAULT_ENERGY, energy_of
from ffebm_compiler.runtime.estimators.choice import Estimator, estimator_of
from ffebm_compiler.runtime.solvers.base import Solver, checked_solver

__all__ = ["convert", "plan"]

_OTHER_ORDER = (
    "random numbers are drawn, or statistics that several norms share updated, in another order than in the source, "
    "since blocks and digital parts hold operations of several branches: one seed gives other dropout masks"
)

DEFAULT_FEEDBACK = float(str(DEFAULT_ENERGY.default_feedback))
"""The default of `feedback`, recognised by identity. It stands for the default of the chosen energy."""


@dataclass
class _Annotated:
    """The results of capture and annotate, from which partition and lower go on."""

    program: Program
    graph: OperationGraph
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _front(
    model: nn.Module | ExportedProgram,
    example_inputs: object,
    kwargs: Mapping[str, Any] | None,
    options: PlanOptions,
    shapes: Any,
    hardware: Hardware,
) -> _Annotated:
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else example_inputs
    if not isinstance(args, tuple | list):
        raise InputError(
            f"example_inputs must be a tensor or a tuple of the forward's arguments, got {_described(example_inputs)}"
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(f"kwargs must be a dictionary of the forward's keyword arguments, got {type(kwargs).__name__}")
    if not (shapes is None or shapes == "batch" or isinstance(shapes, Mapping | tuple | list | ShapesCollection)):
        raise InputError(
            f"dynamic_shapes is {shapes!r}; expected 'batch', None, or what torch.export takes, the free dimensions of "
            "each input, such as {'x': {0: torch.export.Dim('batch')}}"
        )
    named = dict(kwargs or {})
    _refuse_hybrids(model)
    _refuse_empty_batch((tuple(args), named))
    args, named = ordinary((tuple(args), named))
    program, graph = annotated_program(model, args, named, options, shapes, hardware)
    return _Annotated(program, graph, args, named)


def _described(example_inputs: object) -> str:
    """What was given in the place of example inputs, and what to do."""
    kind = type(example_inputs).__name__
    if isinstance(example_inputs, Mapping):
        return f"{kind}: pass keyword arguments by themselves, convert(model, (), kwargs={{...}})"
    if hasattr(example_inputs, "__array__"):
        return f"{kind}: make it a tensor with torch.as_tensor(...)"
    return f"{kind}: pass a batch as the model takes it, e.g. torch.randn(1, 3, 32, 32)"


def _refuse_hybrids(model: object) -> None:
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, HybridModel):
            raise InputError(
                f"module {name!r} is a hybrid already: put its to_digital(), which has its weights, in its place, and "
                "convert the whole model"
                if name
                else "the model is a hybrid already: convert its to_digital(), or use it as it is"
            )


def _refuse_without_memory(model: object) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()] if isinstance(model, nn.Module) else []
    name = next((name for name, tensor in tensors if tensor.is_meta), None)
    if name is not None:
        raise InputError(
            f"{name!r} is on the meta device and has no values to convert: load the weights first, or call "
            "ffebm.plan(), which needs shapes alone"
        )


def _refuse_empty_batch(inputs: object) -> None:
    first = next((leaf for leaf in leaves_of(inputs) if isinstance(leaf, torch.Tensor) and leaf.dim()), None)
    if first is not None and not first.shape[0]:
        raise InputError(
            f"the example inputs are an empty batch (shape {tuple(first.shape)}): pass an example with a sample or more"
        )


def _options(
    block_ops: str | Sequence[str],
    fold_batchnorm: bool,
    force_digital: str | Sequence[str],
    force_analog: str | Sequence[str],
    digital_drive: bool,
    objective: Literal["conversions", "energy"],
    for_: Literal["inference", "training"],
    loop_gain: float,
) -> PlanOptions:
    """The options of a plan, with names checked."""
    return PlanOptions(
        _names("block_ops", block_ops, "avg_pool"),
        fold_batchnorm,
        _names("force_digital", force_digital, "layer4.*"),
        _names("force_analog", force_analog, "layer4.*"),
        digital_drive=digital_drive,
        objective=objective,
        for_=for_,
        loop_gain=loop_gain,
    )


def _names(argument: str, value: object, example: str) -> tuple[str, ...]:
    """One name, or a sequence of them, as a tuple."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Sequence | Set) or not all(isinstance(name, str) for name in names):
        kind = f"a {type(value).__name__}" if isinstance(value, nn.Module | type) else repr(value)
        raise InputError(f"{argument} is {kind}; expected a name such as {example!r}, or a sequence of them")
    return tuple(names)


@collected_rarely()
@outside_inference()
def plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    hardware: str | Hardware = "crossbar-256",
    fold_batchnorm: bool = False,
    block_ops: str | Sequence[str] = ("add", "reshape"),
    digital_drive: bool = False,
    objective: Literal["conversions", "energy"] = "conversions",
    for_: Literal["inference", "training"] = "inference",
    force_digital: str | Sequence[str] = (),
    force_analog: str | Sequence[str] = (),
    on_unsupported: str = "digital",
    dynamic_shapes: Any = "batch",
    feedback: float = 0.1,
) -> Plan:
    """The partition that `convert` would build, as data. Nothing is built.

    The model may be on the meta device, with shapes and no memory. So a network that fits no machine can be planned
    (`with torch.device("meta"): model = Large()`).

    Arguments and errors are those of `convert`. `feedback` is read with `objective="energy"` alone: the loop gain κ
    from which sweeps are predicted.
    """
    options = _options(
        block_ops, fold_batchnorm, force_digital, force_analog, digital_drive, objective, for_, loop_gain=feedback
    )
    fabric = resolve_hardware(hardware)
    front = _front(model, example_inputs, kwargs, options, dynamic_shapes, fabric)
    return Plan.of(make_plan(front.program, front.graph, fabric, options, on_unsupported))


@collected_rarely()
@outside_inference()
def convert(
    model: nn.Module | ExportedProgram,
    example_inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    hardware: str | Hardware = "crossbar-256",
    feedback: float | str = DEFAULT_FEEDBACK,
    energy: str | Energy = "hopfield",
    gradient: str | Estimator = "ep",
    solver: Solver | None = None,
    fold_batchnorm: bool = False,
    block_ops: str | Sequence[str] = ("add", "reshape"),
    feedback_weights: str | FeedbackWeights = "tied",
    digital_drive: bool = False,
    devices: str | Devices | None = None,
    objective: Literal["conversions", "energy"] = "conversions",
    for_: Literal["inference", "training"] = "inference",
    force_digital: str | Sequence[str] = (),
    force_analog: str | Sequence[str] = (),
    on_unsupported: str = "digital",
    dynamic_shapes: Any = "batch",
    plan: Plan | None = None,
) -> HybridModel:
    """Convert a network into a feedforward-tied energy-based model.

    Args:
        model: any `nn.Module` (or `ExportedProgram`, `fx.GraphModule`). It is never changed.
        example_inputs: a tensor or a tuple of the forward's positional arguments.
        kwargs: the forward's keyword arguments.
        hardware: a preset's name (`hardware_presets()`) or a `Hardware`.
        feedback: a number or `"symmetric"` (γ = 1). For a Hopfield energy the number is the loop gain κ of every block,
            in (0, 1), by default 0.1. For a resistive energy it is the feedback gain γ > 0, by default 0.01. A deep
            resistive network (`energy="drn"`) has `"symmetric"` alone.
        energy: the energy that the blocks minimise: `"hopfield"`, `"resistive"`, `"unamplified"`, `"drn"`, or an
            energy object. `docs/resistive.md` compares the last three.
        gradient: `"ep"`, `"implicit"`, `"unrolled"`, `"contrastive"`, `"coupled"`, `"cost-nudged"`, `"truncated"`,
            `"recurrent"`, or an estimator object; see `HybridModel.set_gradient`.
        solver: a solver object. None chooses one for each block.
        fold_batchnorm: fold eval-mode batch norm into the layer before it.
        block_ops: the wiring that may sit inside a block: `"add"`, `"reshape"`, `"concat"`,
            `"scale"`, `"avg_pool"`, `"max_pool"`.
        feedback_weights: `"tied"`, `"free"` or a `FeedbackWeights`. With `"tied"` the feedback is the transpose of the
            drives. With `"free"` it goes through weights of its own, which are additional parameters and start as
            copies of the source's weights (a vector field without energy). A `FeedbackWeights` can also fix or align
            them, or start them at random.
        digital_drive: whether an activation of a digital value, such as batch norm's result, may be a block's state.
            Its drive is that value, through DACs, and it gets feedback from the layers of the block that read it. It
            changes what is computed: conv, batch norm and ReLU are then the networks of Nest & Ernoult (2024).
        devices: the devices that hold the weights of the blocks: a preset's name (`device_presets()`) or a `Devices`.
            None computes exactly. See `HybridModel.set_devices`.
        objective: what the partition minimises, `"conversions"` or `"energy"`: the modelled energy (`docs/costs.md`),
            with the reads of all sweeps, converters, digital work and memory. The plan's notes have both figures.
        for_: whose energy, that of an `"inference"` or of a `"training"` step.
        force_digital, force_analog: glob patterns on module paths.
        on_unsupported: `"digital"` leaves a layer that cannot be analog digital, `"error"` raises.
        dynamic_shapes: `"batch"` frees the batch size, and None fixes all sizes. Other values are handed to
            `torch.export`. Counts are per sample of the first input's leading dimension, or of the only one that is
            free: `{"x": {1: torch.export.Dim("batch")}}` for a model that takes tokens first.
        plan: a plan that was made before for the same model.

    Returns:
        A `HybridModel` with the source's forward signature and `state_dict` keys.

    Raises:
        FFEBMError: a subclass that says what was given, what was expected and what to do.
    """
    kind = energy_of(energy)
    feedback = kind.check_feedback(kind.default_feedback if feedback is DEFAULT_FEEDBACK else feedback)
    checked_solver(solver)
    estimator = estimator_of(gradient)
    own_feedback = feedback_weights_of(feedback_weights)
    chosen_devices = devices_of(devices)
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan is a {type(plan).__name__}; expected a Plan, from ffebm.plan() or Plan.from_json()")
    gain = feedback if isinstance(feedback, float) and feedback < 1 else 0.1
    options = _options(
        block_ops, fold_batchnorm, force_digital, force_analog, digital_drive, objective, for_, loop_gain=gain
    )
    if plan is not None:
        options = plan.options
    fabric = resolve_hardware(hardware) if plan is None else plan.hardware
    _refuse_without_memory(model)
    front = _front(model, example_inputs, kwargs, options, dynamic_shapes, fabric)
    if plan is None:
        plan = Plan.of(make_plan(front.program, front.graph, fabric, options, on_unsupported))
    elif plan.fingerprint != fingerprint(front.graph):
        raise PlanError(
            f"the plan was made for another model or input shape (fingerprint {plan.fingerprint}, this model has "
            f"{fingerprint(front.graph)}): make it again with ffebm.plan()"
        )
    else:
        plan.validate()
    casts = Casts.of(front.program)
    lowered = lower(front.program, plan, own_feedback is not None)
    forget_traced(lowered.graph_module.graph)
    if not lowered.draws_in_order and _OTHER_ORDER not in plan.notes:
        plan = replace(plan, notes=(*plan.notes, _OTHER_ORDER))
    hybrid = HybridModel(front.program, plan, lowered, casts, own_feedback)
    hybrid.conversion = Conversion.of(front.args, front.kwargs, dynamic_shapes)
    hybrid.configure(feedback=feedback, estimator=estimator, solver=solver, energy=kind)
    hybrid.calibrate(*front.args, **front.kwargs)
    verify_feedforward(hybrid, front.args, front.kwargs)
    if chosen_devices is not None:
        hybrid.set_devices(chosen_devices)
    return hybrid
