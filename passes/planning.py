"""Planning: describe the partition of a captured network, with a place and a reason for every weight.

Promise: each parameter of two or more dimensions has a `Placement`. Each weight-stationary layer
is in exactly one block or in `rejected`. Each operation is in exactly one block or part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ffebm_compiler.errors import HardwareError, InputError, UnsupportedError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.layers import matches, unmatched
from ffebm_compiler.ir import Operation, OperationGraph, Program, Role
from ffebm_compiler.passes.dialect import WIRING_KINDS
from ffebm_compiler.passes.partition.block_costs import modelled_energy
from ffebm_compiler.passes.partition.decide import Partition, conversions, partition, tiles_of, too_large
from ffebm_compiler.passes.partition.partial_sums import partial_sums
from ffebm_compiler.passes.partition.prices import middle, prices_for
from ffebm_compiler.passes.partition.rules import driven_states
from ffebm_compiler.passes.plan_notes import plan_notes
from ffebm_compiler.plan_data import BlockPlan, DigitalPart, Placement, PlanData, PlanOptions, fingerprint

__all__ = ["best_plan", "describe", "describe_block", "make_plan", "placements"]

FORCED = "force_digital asks for it"
_COPIED = "it is copied to every sample, not multiplied: no matrix product"
_UNMULTIPLIED = {
    "add": "it is added, not multiplied: no matrix product",
    "concat": "it is joined to other values, not multiplied: no matrix product",
    **dict.fromkeys(("stack", "cat"), "it is joined to other values, not multiplied: no matrix product"),
    **dict.fromkeys(("expand", "expand_as", "repeat", "tile"), _COPIED),
}
"""Kind or target of an operation that reads a parameter -> why that parameter is in no block."""


def make_plan(
    program: Program,
    graph: OperationGraph,
    hardware: Hardware,
    options: PlanOptions,
    on_unsupported: str = "digital",
) -> PlanData:
    """Partition the operations and describe the result.

    Raises:
        InputError: a pattern matches nothing, patterns contradict each other, or `block_ops` are unknown.
        HardwareError: an override matches no layer, or two disagree on one.
        UnsupportedError: the model has no weight-stationary layer, a layer of `force_analog`
            cannot be analog, or a layer is rejected with `on_unsupported="error"`.
    """
    layers = [op for op in graph.operations if op.role is Role.WEIGHT]
    modules = tuple(name for name, _ in program.source.named_modules())
    _check_options(options, modules, on_unsupported)
    if not layers:
        raise UnsupportedError(
            f"the model {type(program.source).__name__} has no weight-stationary layer: nothing in it multiplies an "
            "activation by a fixed weight (linear, convolution), so there is nothing to make analog"
        )
    paths = list(dict.fromkeys(op.path for op in layers))
    for pattern in unmatched(hardware.overrides, paths):
        raise HardwareError(
            f"the override {pattern!r} of hardware {hardware.name!r} matches no weight-stationary layer; the "
            f"layers are {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}"
        )
    forced = {op.name: FORCED for op in graph.operations if matches(op.path, options.force_digital)}
    for op in layers:
        if matches(op.path, options.force_analog):
            if op.name in forced:
                raise InputError(f"layer {op.path!r} matches both force_digital and force_analog: remove one")
            reason = too_large(op, hardware)
            if reason:
                size = "tiles_per_core" if "tiles" in reason else "neurons_per_block"
                raise UnsupportedError(
                    f"force_analog asks for {op.path!r}, but {reason}: raise {size} of the hardware, or leave the "
                    "layer out of force_analog"
                )
    for op in graph.operations:
        if op.kind == "weight" and matches(op.path, options.force_analog):
            raise UnsupportedError(f"force_analog asks for {op.path!r}, but {op.reason}")
    names = [name for name, parameter in program.source.named_parameters() if parameter.dim() >= 2]
    model, notes = type(program.source).__name__, program.notes

    def described(result: Partition) -> PlanData:
        return describe(graph, hardware, options, result, model=model, modules=modules, parameters=names, notes=notes)

    plan = best_plan(graph, hardware, options, forced, described)
    unwanted = {path: why for path, why in plan.rejected.items() if why != FORCED}
    if unwanted and on_unsupported == "error":
        listed = "; ".join(f"{path}: {why}" for path, why in list(unwanted.items())[:5])
        raise UnsupportedError(
            f"{len(unwanted)} weight-stationary layers cannot be analog ({listed}): change the hardware, name them in "
            "force_digital, or pass on_unsupported='digital'"
        )
    return plan


def best_plan(
    graph: OperationGraph,
    hardware: Hardware,
    options: PlanOptions,
    forced: Mapping[str, str],
    described: Callable[[Partition], PlanData],
) -> PlanData:
    """The plan of the partition that is better by the objective. `described` makes a plan of a partition."""
    prices = dict.fromkeys((None, prices_for(graph, hardware, options)))
    drive = options.digital_drive
    return _best([described(partition(graph, hardware, options.block_ops, forced, drive, each)) for each in prices])


def _best(plans: Sequence[PlanData]) -> PlanData:
    """The only plan, or the one with less modelled energy, with both figures of both in a note.

    The first plan has the fewest conversions, and the second what the search for energy found.
    """
    if len(plans) == 1:
        return plans[0]
    few, other = plans
    options = few.options
    energies = [modelled_energy(plan, options.for_ == "training", options.loop_gain) for plan in plans]
    index = min((0, 1), key=lambda index: middle(energies[index]))
    what = "a training step" if options.for_ == "training" else "an inference"
    figures = [f"{plan.conversions} conversions and {energy}" for plan, energy in zip(plans, energies, strict=True)]
    same = other if index else few
    note = (
        f"objective 'energy': modelled for {what} at a loop gain of {options.loop_gain:g}, this partition has "
        f"{figures[index]}; the one with the fewest conversions has {figures[0]}"
    )
    return replace(same, notes=(*same.notes, note))


def _check_objective(options: PlanOptions) -> None:
    for field, value, choices in (
        ("objective", options.objective, ("conversions", "energy")),
        ("for_", options.for_, ("inference", "training")),
    ):
        if value not in choices:
            raise InputError(f"{field} is {value!r}; expected {' or '.join(map(repr, choices))}")


def _check_options(options: PlanOptions, modules: Sequence[str], on_unsupported: str) -> None:
    _check_objective(options)
    if not isinstance(options.digital_drive, bool):
        raise InputError(f"digital_drive is {options.digital_drive!r}; expected True or False")
    if on_unsupported not in ("digital", "error"):
        raise InputError(f"on_unsupported is {on_unsupported!r}; expected 'digital' or 'error'")
    for kind in options.block_ops:
        if kind not in WIRING_KINDS:
            raise InputError(f"block_ops names {kind!r}; expected some of {', '.join(map(repr, WIRING_KINDS))}")
    for argument, patterns in (
        ("force_digital", options.force_digital),
        ("force_analog", options.force_analog),
    ):
        for pattern in patterns:
            if not any(matches(name, (pattern,)) for name in modules if name):
                raise InputError(
                    f"{argument} pattern {pattern!r} matches no module of the model; its modules are "
                    f"{', '.join(name for name in modules[1:9])}{', ...' if len(modules) > 9 else ''}"
                )


def describe(
    graph: OperationGraph,
    hardware: Hardware,
    options: PlanOptions,
    result: Partition,
    *,
    model: str,
    modules: Sequence[str],
    parameters: Sequence[str],
    notes: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> PlanData:
    """The plan of a partition: loads, conversions, placements and reasons.

    Args:
        graph, hardware, options: the graph that was partitioned, and its hardware and settings.
        result: the partition.
        model: the model's class name.
        modules: every module path of the model.
        parameters: every parameter of two or more dimensions.
        notes: further sentences for the report.
        names: the blocks' names; None numbers them.
    """
    users = graph.users()
    order = {op.name: index for index, op in enumerate(graph.operations)}
    names = names or [f"block_{index + 1}" for index in range(len(result.blocks))]
    blocks = tuple(
        describe_block(graph, hardware, users, order, name, members)
        for name, members in zip(names, result.blocks, strict=True)
    )
    parts = tuple(DigitalPart(f"digital_{index + 1}", tuple(members)) for index, members in enumerate(result.digital))
    rejected = {
        graph[name].path or name: reason for name, reason in result.rejected.items() if graph[name].role is Role.WEIGHT
    }
    rejected.update({op.path or op.name: op.reason for op in graph.operations if op.kind == "weight"})
    return PlanData(
        model=model,
        hardware=hardware,
        options=options,
        blocks=blocks,
        digital_parts=parts,
        weights=placements(parameters, graph, blocks, result.rejected),
        rejected=rejected,
        notes=(*notes, *plan_notes(blocks, graph, hardware)),
        modules=tuple(modules),
        graph=graph,
        fingerprint=fingerprint(graph),
    )


def describe_block(
    graph: OperationGraph,
    hardware: Hardware,
    users: Mapping[str, list[str]],
    order: Mapping[str, int],
    name: str,
    members: Sequence[str],
) -> BlockPlan:
    """Loads and conversions of one block. `order` is the position of each operation in the graph."""
    members = sorted(members, key=order.__getitem__)
    inside = set(members)
    layers: list[Operation] = [graph[m] for m in members if graph[m].role is Role.WEIGHT]
    driven = driven_states(graph, members, users)
    dac, adc = conversions(graph, members, users)
    outputs = set(graph.outputs)
    return BlockPlan(
        name=name,
        layers=tuple(layer.path or layer.name for layer in layers),
        weights=tuple(dict.fromkeys(weight for layer in layers for weight in layer.weights)),
        operations=tuple(members),
        inputs=tuple(dict.fromkeys(s for m in members for s in graph[m].inputs if s not in inside)),
        outputs=tuple(m for m in members if m in outputs or any(user not in inside for user in users[m])),
        tiles=sum(tiles_of(layer, hardware) for layer in layers),
        dac=dac,
        adc=adc,
        neurons=sum(layer.values for layer in layers) + sum(graph[state].values for state in driven),
        macs=sum(layer.macs for layer in layers),
        driven=tuple(driven),
        partial_sums=partial_sums(graph, hardware, users, members).one_pass,
    )


def _reason_without_product(op: Operation, weight: str) -> str:
    if weight in op.computed and op.kind != "weight":
        return f"{op.target} reads what is computed from it, which is no matrix product with an activation"
    return _UNMULTIPLIED.get(op.kind) or _UNMULTIPLIED.get(op.target) or op.reason


def placements(
    parameters: Iterable[str], graph: OperationGraph, blocks: Sequence[BlockPlan], rejected: Mapping[str, str]
) -> dict[str, Placement]:
    """The place of each parameter. `rejected` has the reason of each operation that stayed digital."""
    home = {name: block.name for block in blocks for name in block.operations}
    readers: dict[str, list[Operation]] = {}
    for op in graph.operations:
        for weight in op.weights:
            readers.setdefault(weight, []).append(op)
    found = {}
    for name in parameters:
        reading = readers.get(name, [])
        analog = [op for op in reading if op.name in home and op.role is Role.WEIGHT]
        if analog:
            places = ", ".join(dict.fromkeys(f"{op.path or op.name} in {home[op.name]}" for op in analog))
            others = len(reading) - len(analog)
            shared = f" and read by {others} digital operation{'s' if others > 1 else ''}" if others else ""
            found[name] = Placement(home[analog[0].name], f"the weight of {places}{shared}")
        elif reading:
            op = reading[0]
            found[name] = Placement(None, rejected.get(op.name) or _reason_without_product(op, name))
        else:
            found[name] = Placement(None, "no operation that the output depends on reads it")
    return found
