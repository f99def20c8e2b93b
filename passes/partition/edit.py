"""Edit: move layers of a plan between blocks and the digital side, and describe the result again."""

from __future__ import annotations

import difflib

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.layers import matches
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, Role
from ffebm_compiler.passes.partition.decide import Partition, digital_parts, tiles_of, too_large
from ffebm_compiler.passes.partition.drive import driven_with, make_driven_before
from ffebm_compiler.passes.partition.state import DIGITAL, State
from ffebm_compiler.passes.plan_notes import other_notes
from ffebm_compiler.passes.planning import describe
from ffebm_compiler.plan_data import PlanData

__all__ = ["move"]

_ANY = 1 << 62


def move(plan: PlanData, path: str, where: str) -> PlanData:
    """A new plan with the layers of a module path in another place. See `Plan.move`."""
    layers = plan.layers_of(path)
    if not layers:
        raise PlanError(_no_layer(plan, path))
    graph, hardware = plan.graph, plan.hardware
    names = [block.name for block in plan.blocks]
    if where not in ("digital", "analog", *names):
        raise PlanError(
            f"there is no place {where!r} to move {path!r} to; expected 'digital', 'analog', {_listed(names)}"
        )
    too_big = {op.name: too_large(op, hardware) for op in graph.operations if op.role is Role.WEIGHT}
    _refuse(plan, path, where, layers, too_big)
    kinds = {*plan.options.block_ops, *ALWAYS_JOIN}
    digital = {name for name, reason in too_big.items() if reason}
    if plan.options.digital_drive:  # activations beside the moved layers may become driven states
        digital |= {op.name for op in graph.operations if matches(op.path, plan.options.force_digital)}
    state = State(graph, hardware, kinds, digital, draws=False, digital_drive=plan.options.digital_drive)
    number = {op.name: index for index, op in enumerate(graph.operations)}
    for block in plan.blocks:
        home = state.new_block()
        for name in block.operations:
            state.put(number[name], home)
    state.start()
    for op in layers:
        v = number[op.name]
        if where == "digital":
            target = DIGITAL
        elif where == "analog":
            names.append(_free_name(names))
            target = state.new_block()
        else:
            target = names.index(where)
        if state.home[v] == target:
            continue
        if target != DIGITAL and target in state.load:
            _check_room(plan, state, op, where, target)
        company = driven_with(state, v) if target != DIGITAL else []
        changes = [(w, target) for w in (*company, *_tail(state, v))]
        if state.attempt(changes, slack=_ANY, close=True):
            continue
        if where in ("digital", "analog"):
            # It was in the middle, so the operations that depend on it get a block of their own.
            names.append(_free_name(names))
            later = state.new_block()
            if state.attempt([*changes, *((w, later) for w in _dependents(state, v, changes))], slack=_ANY):
                continue
        raise PlanError(
            f"{path!r} cannot move to {where}, since a value would leave a block and come back into it: first move "
            "the layers in between by plan.move(path, where), or choose another place"
        )
    for op in layers:
        make_driven_before(state, number[op.name])
    used = sorted(state.load, key=lambda block: state.span[block])
    blocks = [[graph.operations[v].name for v in state.members(block)] for block in used]
    inside = {name for block in blocks for name in block}
    rejected = {}
    for op in graph.operations:
        if op.role is Role.WEIGHT and op.name not in inside:
            new = op in layers and where == "digital"
            rejected[op.name] = "moved to the digital side" if new else plan.rejected[op.path or op.name]
    edited = describe(
        graph,
        hardware,
        plan.options,
        Partition(blocks, digital_parts(graph, blocks), rejected),
        model=plan.model,
        modules=plan.modules,
        parameters=list(plan.weights),
        notes=other_notes(plan.notes),
        names=[names[block] for block in used],
    )
    return edited


def _tail(state: State, v: int) -> list[int]:
    """A layer and the operations that follow it in its block, as long as no other layer of the block feeds them too."""
    home = state.home[v]
    found = [v]
    for w in found:
        for reader in state.readers[w]:
            alone = all(u in found or state.home[u] != home for u in state.operands[reader])
            if home != DIGITAL and state.home[reader] == home and not state.layer[reader] and alone:
                found.append(reader)
    return list(dict.fromkeys(found))


def _dependents(state: State, v: int, changes: list[tuple[int, int]]) -> list[int]:
    """Operations of a layer's block that depend on it, without those that move with it."""
    home, gone = state.home[v], {w for w, _ in changes}
    found = {v: None}
    stack = [v]
    while stack:
        for reader in state.readers[stack.pop()]:
            if reader not in found:
                found[reader] = None
                stack.append(reader)
    return [w for w in found if state.home[w] == home and w not in gone]


def _free_name(names: list[str]) -> str:
    number = len(names) + 1
    while f"block_{number}" in names:
        number += 1
    return f"block_{number}"


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")


def _no_layer(plan: PlanData, path: str) -> str:
    for op in plan.graph.operations:
        if op.kind == "weight" and op.path == path:
            return f"{path!r} cannot be analog: {op.reason}"
    paths = [op.path or op.name for op in plan.graph.operations if op.role is Role.WEIGHT]
    close = difflib.get_close_matches(path, paths, n=3)
    hint = f"did you mean {', '.join(close)}?" if close else f"its layers are {_listed(paths)}"
    return f"the plan has no weight-stationary layer {path!r}: {hint}"


def _refuse(plan: PlanData, path: str, where: str, layers: list[Operation], too_big: dict[str, str]) -> None:
    for op in layers:
        if where != "digital" and too_big[op.name]:
            raise PlanError(
                f"{op.path!r} cannot be analog on {plan.hardware.name}: {too_big[op.name]}. Plan "
                "with larger hardware, or leave the layer digital"
            )
        option, patterns = (
            ("force_analog", plan.options.force_analog)
            if where == "digital"
            else ("force_digital", plan.options.force_digital)
        )
        if matches(op.path, patterns):
            raise PlanError(
                f"{path!r} cannot move to {where}, since {option}={patterns} holds {op.path!r}: plan without it"
            )


def _check_room(plan: PlanData, state: State, op: Operation, where: str, target: int) -> None:
    hardware = plan.hardware
    load = state.load[target]
    for used, more, limit, what in (
        (load[0], 1, hardware.layers_per_block, "layers"),
        (load[1], tiles_of(op, hardware), hardware.tiles_per_core, "tiles"),
        (load[2], op.values, hardware.neurons_per_block, "neurons"),
    ):
        if limit is not None and used + more > limit:
            raise PlanError(
                f"{op.path!r} does not fit into {where}, which would have {used + more} {what} and holds {limit}: move "
                "another layer out of it first"
            )
