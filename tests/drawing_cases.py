"""Plans for the tests of the pictures, made without a model: of any size, with any names."""

from __future__ import annotations

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role
from ffebm_compiler.plan import BlockPlan, DigitalPart, Placement, Plan, PlanOptions

__all__ = ["chain_plan"]


def chain_plan(layers: int, prefix: str = "layers", model: str = "Chain", rejected: tuple[int, ...] = ()) -> Plan:
    """A chain of (linear, layer norm, relu), each linear a block of its own, with a skip over every second layer.

    The layers numbered in `rejected` stayed digital.
    """
    operations: list[Operation] = []
    blocks: list[BlockPlan] = []
    parts: list[DigitalPart] = []
    reasons = {f"{prefix}.{index}.linear": "it needs 65 tiles, a core has 64" for index in rejected}
    last, skip = "x", "x"
    for index in range(layers):
        path = f"{prefix}.{index}"
        linear = Operation(
            f"linear_{index}", Role.WEIGHT, f"{path}.linear", "linear", (last,), 64, (None, 64), "a weight", "linear",
            (f"{path}.linear.weight",), 64, 64,
        )  # fmt: skip
        norm = Operation(
            f"norm_{index}", Role.DIGITAL, f"{path}.norm", "layer_norm", (linear.name,), 64, (None, 64), "normalises"
        )
        inputs = tuple(dict.fromkeys((norm.name, skip))) if index % 2 else (norm.name,)
        add = Operation(
            f"add_{index}", Role.WIRING, path, "add" if index % 2 else "clone", inputs, 64, (None, 64), kind="add"
        )
        operations += [linear, norm, add]
        own = [norm.name, add.name]
        if index in rejected:
            own.insert(0, linear.name)
        else:
            blocks.append(
                BlockPlan(
                    f"block_{len(blocks) + 1}", (linear.path,), linear.weights, (linear.name,), (last,), (linear.name,),
                    1, 64, 64, 64, 4096,
                )
            )  # fmt: skip
        parts.append(DigitalPart(f"digital_{index + 1}", tuple(own)))
        last = add.name
        skip = add.name if index % 2 else skip
    homes = {name: block.name for block in blocks for name in block.weights}
    weights = {
        op.weights[0]: Placement(homes.get(op.weights[0]), "the weight of a linear") for op in operations if op.weights
    }
    modules = ("", *dict.fromkeys(op.path for op in operations))
    graph = OperationGraph({"x": 64}, tuple(operations), (last,))
    return Plan(
        model, Hardware(name="test"), PlanOptions(), tuple(blocks), tuple(parts), weights, reasons, ("a note",),
        modules, graph,
    )  # fmt: skip
