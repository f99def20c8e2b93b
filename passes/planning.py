"""Planning: the partition of a captured network, with every weight accounted for.

Promise: each parameter of two or more dimensions has a `Placement`, each weight-stationary layer
is in exactly one block or in `rejected`, and each operation is in exactly one block or part.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.hardware import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Program, Role
from ffebm_compiler.passes.dialect import WIRING_KINDS
from ffebm_compiler.passes.partition import Partition, conversions, partition, tiles_of, too_large
from ffebm_compiler.plan import BlockPlan, DigitalPart, Placement, Plan, PlanOptions, fingerprint

__all__ = ["make_plan", "matches"]


def make_plan(
    program: Program,
    graph: OperationGraph,
    hardware: Hardware,
    options: PlanOptions,
    on_unsupported: str = "digital",
) -> Plan:
    """Partition the operations and describe the result.

    Raises:
        InputError: for a pattern that matches nothing, contradicting patterns or unknown `block_ops`.
        UnsupportedError: for a model without weight-stationary layers, a layer of `force_analog`
            that cannot be analog, or any rejected layer with `on_unsupported="error"`.
    """
    layers = [op for op in graph.operations if op.role is Role.WEIGHT]
    modules = tuple(name for name, _ in program.source.named_modules())
    _check_options(options, modules, on_unsupported)
    if not layers:
        raise UnsupportedError(
            f"the model {type(program.source).__name__} has no weight-stationary layer: nothing in it multiplies an "
            "activation by a fixed weight (linear, convolution), so there is nothing to make analog"
        )
    forced = {
        op.name: "force_digital asks for it" for op in graph.operations if matches(op.path, options.force_digital)
    }
    for op in layers:
        if matches(op.path, options.force_analog):
            if op.name in forced:
                raise InputError(f"layer {op.path!r} matches both force_digital and force_analog: remove one")
            reason = too_large(op, hardware)
            if reason:
                raise UnsupportedError(f"force_analog asks for {op.path!r}, but {reason}: use a larger core")
    for op in graph.operations:
        if op.kind == "weight" and matches(op.path, options.force_analog):
            raise UnsupportedError(f"force_analog asks for {op.path!r}, but {op.reason}")
    result = partition(graph, hardware, options.block_ops, forced)
    plan = _describe(program, graph, hardware, options, result, modules)
    unwanted = {path: why for path, why in plan.rejected.items() if why != "force_digital asks for it"}
    if unwanted and on_unsupported == "error":
        listed = "; ".join(f"{path}: {why}" for path, why in list(unwanted.items())[:5])
        raise UnsupportedError(
            f"{len(unwanted)} weight-stationary layers cannot be analog ({listed}): change the hardware, name them in "
            "force_digital, or pass on_unsupported='digital'"
        )
    return plan


def matches(path: str, patterns: Sequence[str]) -> bool:
    """Whether a module path or a module that holds it matches one of the glob patterns."""
    parts = path.split(".")
    ancestors = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatch.fnmatchcase(ancestor, pattern) for pattern in patterns for ancestor in ancestors)


def _check_options(options: PlanOptions, modules: Sequence[str], on_unsupported: str) -> None:
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


def _describe(
    program: Program,
    graph: OperationGraph,
    hardware: Hardware,
    options: PlanOptions,
    result: Partition,
    modules: tuple[str, ...],
) -> Plan:
    users = graph.users()
    blocks = tuple(
        _block(graph, hardware, users, f"block_{index + 1}", members, result.rejected)
        for index, members in enumerate(result.blocks)
    )
    parts = tuple(DigitalPart(f"digital_{index + 1}", tuple(names)) for index, names in enumerate(result.digital))
    rejected = {
        graph[name].path or name: reason for name, reason in result.rejected.items() if graph[name].role is Role.WEIGHT
    }
    rejected.update({op.path or op.name: op.reason for op in graph.operations if op.kind == "weight"})
    notes = list(program.notes)
    sharing = [
        block.name for block in blocks if sum(graph[name].kind.startswith("conv") for name in block.operations) > 1
    ]
    if sharing and hardware.conv_mapping == "im2col":
        notes.append(
            f"{len(sharing)} blocks settle several convolutions together; with conv_mapping='im2col' one set of "
            "tiles serves all output positions in turn, while settling needs every position at once: "
            "conv_mapping='unrolled' counts the tiles for that"
        )
    return Plan(
        model=type(program.source).__name__,
        hardware=hardware,
        options=options,
        blocks=blocks,
        digital_parts=parts,
        weights=_placements(program, graph, blocks, result),
        rejected=rejected,
        notes=tuple(notes),
        modules=modules,
        graph=graph,
        fingerprint=fingerprint(graph),
    )


def _block(
    graph: OperationGraph,
    hardware: Hardware,
    users: dict[str, list[str]],
    name: str,
    members: list[str],
    rejected: dict[str, str],
) -> BlockPlan:
    order = {op.name: index for index, op in enumerate(graph.operations)}
    members = sorted(members, key=order.__getitem__)
    inside = set(members)
    layers: list[Operation] = [graph[m] for m in members if graph[m].role is Role.WEIGHT and m not in rejected]
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
        neurons=sum(layer.values for layer in layers),
        macs=sum(layer.macs for layer in layers),
    )


def _placements(
    program: Program, graph: OperationGraph, blocks: tuple[BlockPlan, ...], result: Partition
) -> dict[str, Placement]:
    home = {name: block.name for block in blocks for name in block.operations}
    readers: dict[str, list[Operation]] = {}
    for op in graph.operations:
        for weight in op.weights:
            readers.setdefault(weight, []).append(op)
    placements = {}
    for name, parameter in program.source.named_parameters():
        if parameter.dim() < 2:
            continue
        reading = readers.get(name, [])
        analog = [op for op in reading if op.name in home and op.role is Role.WEIGHT]
        if analog:
            places = ", ".join(dict.fromkeys(f"{op.path or op.name} in {home[op.name]}" for op in analog))
            others = len(reading) - len(analog)
            shared = f" and read by {others} digital operations" if others else ""
            placements[name] = Placement(home[analog[0].name], f"the weight of {places}{shared}")
        elif reading:
            op = reading[0]
            placements[name] = Placement(None, result.rejected.get(op.name, op.reason))
        else:
            placements[name] = Placement(None, "no operation of the captured graph reads it")
    return placements
