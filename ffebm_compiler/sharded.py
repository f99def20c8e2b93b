"""Sharded weights: run a hybrid after `torch.distributed.fsdp.fully_shard` (FSDP2) was called on its modules.

`fully_shard(module)` makes the module a *unit*. A process then holds a shard of each of its parameters, and the unit's
own forward hooks gather them before its forward and free them after it, and again in the backward pass. A hybrid runs
blocks and not modules. So each block or digital part here runs between the hooks of the units whose tensors it reads.
What it needs is gathered just before it and freed just after it, and no process ever holds the whole network.

The unit of a tensor is the nearest unit among the modules that hold it. The hybrid itself is no unit here, since torch
calls its hooks.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ffebm_compiler.runtime.feedforward.fetch import Fetch

__all__ = ["ShardedRun", "engine_hooks", "gathered", "unit_of"]

_ENGINE = "torch.distributed.fsdp."


def engine_hooks(table: Mapping[int, Any]) -> list[tuple[int, Any]]:
    """FSDP's own hooks among those of a module, with their numbers."""
    return [(number, hook) for number, hook in table.items() if getattr(hook, "__module__", "").startswith(_ENGINE)]


def unit_of(tensor: str, units: Mapping[str, nn.Module]) -> str | None:
    """Path of the unit of a parameter or buffer with this name; None if only the hybrid itself holds it."""
    path = tensor
    while path:
        path = path.rpartition(".")[0]
        if path in units:
            return path
    return None


@contextlib.contextmanager
def gathered(root: nn.Module, units: Mapping[str, nn.Module], names: Sequence[str]) -> Iterator[None]:
    """Hold the whole tensors of these names, outside of a forward."""
    paths = {unit_of(name, units) for name in names}
    found: list[Any] = [root if path is None else units[path] for path in sorted(paths, key=lambda path: path or "")]
    sharded = [unit for unit in found if hasattr(unit, "unshard") and _holds_shards(unit)]
    for unit in sharded:
        unit.unshard()
    try:
        yield
    finally:
        for unit in sharded:
            unit.reshard()


def _holds_shards(unit: nn.Module) -> bool:
    """Whether a unit's own tensors are shards now. They may be whole, as after a forward without gradients."""
    from torch.distributed.tensor import DTensor

    inner = {
        id(tensor)
        for module in unit.modules()
        if module is not unit and hasattr(module, "unshard")
        for tensor in module.parameters()
    }
    return any(isinstance(tensor, DTensor) for tensor in unit.parameters() if id(tensor) not in inner)


class ShardedRun:
    """Runs the graph of a hybrid with the weights of one part gathered at a time."""

    def __init__(self, run: fx.GraphModule, units: Mapping[str, nn.Module]) -> None:
        self.run, self.units = run, units
        self.nodes = list(self.run.graph.nodes)
        self.fixed = self._fixed()
        last: dict[fx.Node, fx.Node] = {}
        for node in self.nodes:
            for operand in self._values_read(node):
                last[operand] = node
        self.units_of = {node: self._units_of(node) for node in self.nodes if node not in self.fixed}
        self.freed: dict[fx.Node, list[fx.Node]] = {}
        """The values that nothing reads after a node."""
        for operand, node in last.items():
            self.freed.setdefault(node, []).append(operand)

    def _fixed(self) -> set[fx.Node]:
        """The nodes that depend on parameters, buffers and constants alone. Each part that reads them computes them.

        Nodes that draw random numbers or may write state are not among them. They run once, where the source runs them.
        """
        fixed: set[fx.Node] = set()
        for node in self.nodes:
            module = self.run.get_submodule(str(node.target)) if node.op == "call_module" else None
            fetched = isinstance(module, Fetch) or node.op == "get_attr"
            computed = node.op == "call_function" and node.all_input_nodes and fixed.issuperset(node.all_input_nodes)
            if fetched or (computed and torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ())):
                fixed.add(node)
        return fixed

    def _values_read(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that a node reads and that are not fixed."""
        return [operand for operand in node.all_input_nodes if operand not in self.fixed]

    def _units_of(self, node: fx.Node) -> list[nn.Module]:
        """The units whose tensors a node reads, also through fixed nodes; a unit comes before those inside it."""
        paths: set[str] = set()
        pending = [node]
        seen: set[fx.Node] = set()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            module = self.run.get_submodule(str(current.target)) if current.op == "call_module" else None
            path = unit_of(module.name, self.units) if isinstance(module, Fetch) else None
            if path is not None:
                paths.add(path)
            pending.extend(operand for operand in current.all_input_nodes if operand in self.fixed)
        return [self.units[path] for path in sorted(paths)]

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """The outputs of the graph for these inputs."""
        inputs = iter(leaves)
        values: dict[fx.Node, Any] = {}
        for node in self.nodes:
            if node in self.fixed:
                continue
            if node.op == "placeholder":
                values[node] = next(inputs)
            else:
                result = self._run(node, values)
                if node.op == "output":
                    return result
                values[node] = result
            for done in self.freed.get(node, ()):
                values.pop(done, None)
        raise AssertionError("a graph without an output")

    def _run(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        units = self.units_of[node]
        read = self._values_read(node)
        given = _enter(units, tuple(values[operand] for operand in read))
        return _leave(units, given, self._value(node, dict(zip(read, given, strict=True))))

    def _value(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """The value of a node. The fixed ones that it reads are computed now, while their units are gathered."""
        if node in known:
            return known[node]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: self._value(operand, known))
        if node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(self.run)
        elif node.op == "output":
            known[node] = args[0]
        elif node.op == "call_method":
            known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            called: Any = self.run.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            known[node] = called(*args, **kwargs)
        return known[node]


def _enter(units: Sequence[nn.Module], inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Run the hooks before the forward of each unit, which gather its tensors and see the inputs."""
    for unit in units:
        for number, hook in engine_hooks(unit._forward_pre_hooks):
            if number in unit._forward_pre_hooks_with_kwargs:
                inputs, _ = hook(unit, inputs, {})
            else:
                changed = hook(unit, inputs)
                if changed is not None:
                    inputs = changed if isinstance(changed, tuple) else (changed,)
    return inputs


def _leave(units: Sequence[nn.Module], inputs: tuple[Any, ...], result: Any) -> Any:
    """Run the hooks after the forward of each unit, the innermost first, which free its tensors and see the result."""
    for unit in reversed(units):
        for number, hook in engine_hooks(unit._forward_hooks):
            changed = (
                hook(unit, inputs, {}, result)
                if number in unit._forward_hooks_with_kwargs
                else hook(unit, inputs, result)
            )
            result = result if changed is None else changed
    return result
