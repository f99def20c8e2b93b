"""A graph module whose pickle holds its nodes.

`torch.fx` pickles a graph as code and traces it again when it is opened. A call without tensors among its
arguments (`rand`) is then executed and becomes a constant, and functions of this package are traced
through. So the nodes themselves are stored here. Their metadata holds the tracer's tensors, so only a name of it is
stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

__all__ = ["CAPTURED_NAME", "OPERANDS", "BlockGraph"]

OPERANDS = "operands"
"""Name of the submodule of a hybrid's graph that holds the `Fetch` modules."""

CAPTURED_NAME = "ffebm_captured_name"
"""Meta key of the name that a node's operation had at capture. It is stored with the node."""


@dataclass(frozen=True)
class _NodeReference:
    """A reference to the node with this index."""

    place: int


@dataclass(frozen=True)
class _Overload:
    """A torch operator, by name."""

    namespace: str
    name: str
    overload: str

    @classmethod
    def of(cls, overload: torch._ops.OpOverload) -> _Overload:
        namespace, name = overload._schema.name.split("::")
        return cls(namespace, name, overload._overloadname)

    def operator(self) -> Any:
        return getattr(getattr(getattr(torch.ops, self.namespace), self.name), self.overload)


class BlockGraph(fx.GraphModule):
    """An `fx.GraphModule` that survives `torch.save` and pickle as it is."""

    def __repr__(self) -> str:
        """The parts, without the modules that fetch their operands."""
        shown = nn.Module()
        shown._modules.update({name: module for name, module in self._modules.items() if name != OPERANDS})
        return repr(shown).replace("Module(", f"{type(self).__name__}(", 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """The nodes, the submodules and the constants."""
        places = {node: place for place, node in enumerate(self.graph.nodes)}
        nodes = [
            (
                node.op,
                node.name,
                _Overload.of(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target,
                *_with_references((node.args, dict(node.kwargs)), places),
                node.meta.get(CAPTURED_NAME),
            )
            for node in self.graph.nodes
        ]
        kind = next(
            cls for cls in type(self).__mro__ if "<locals>" not in cls.__qualname__
        )  # each `fx.GraphModule` has a class of its own
        state = (
            dict(self._modules),
            dict(self._buffers),
            set(self._non_persistent_buffers_set),
            self.training,
            list(self.__dict__.get("_deepcopy_hooks", ())),
        )
        return _rebuild_graph, (kind, type(self).__name__, nodes, state)


def _with_references(arguments: Any, places: dict[fx.Node, int]) -> Any:
    return fx.node.map_aggregate(
        arguments,
        lambda value: _NodeReference(places[value]) if isinstance(value, fx.Node) else value,  # type: ignore[arg-type,return-value]
    )


def _rebuild_graph(kind: type[BlockGraph], name: str, nodes: list[Any], state: tuple[Any, ...]) -> BlockGraph:
    modules, buffers, temporary, training, hooks = state
    root = nn.Module()
    for key, module in modules.items():
        root.add_module(key, module)
    for key, buffer in buffers.items():
        root.register_buffer(key, buffer, persistent=key not in temporary)
    graph = fx.Graph()
    made: list[fx.Node] = []
    for op, label, target, args, kwargs, captured in nodes:
        known = target.operator() if isinstance(target, _Overload) else target
        here = fx.node.map_aggregate(
            (args, kwargs), lambda value: made[value.place] if isinstance(value, _NodeReference) else value
        )
        made.append(graph.create_node(op, known, here[0], here[1], name=label))
        if captured is not None:
            made[-1].meta[CAPTURED_NAME] = captured
    module = kind(root, graph, name)
    module._non_persistent_buffers_set.update(temporary)
    module.training = training
    for hook in hooks:
        module._register_deepcopy_hook(hook)
    return module
