"""Functionalize: in-place operations become functional ones.

`x.relu_()` becomes `y = relu(x)` and whatever read `x` afterwards reads `y`. A write through a
view, `x[:, 0] += 1`, also rebuilds what the view was taken from (`slice_scatter`,
`select_scatter`, or the inverse of a reshape), and other views of it are taken again when they
are read. Writes to a parameter or a buffer (counters, caches) keep their in-place operation:
they are side effects of the source that the hybrid keeps.

Promise: no node mutates a value that another dynamic node reads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, module_path

__all__ = ["functionalize"]

aten = torch.ops.aten

_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.unflatten.int,
)


def functionalize(program: Program) -> Program:
    """Replace every in-place operation on an intermediate value.

    Raises:
        UnsupportedError: for a write through a view that has no inverse (expand, split, ...) or an
            operation without a functional form.
    """
    return _Functionalizer(program).run()


class _Functionalizer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.parents: dict[fx.Node, fx.Node] = {}
        """View -> what it is a view of; an in-place result -> what it wrote to."""
        self.present: dict[fx.Node, fx.Node] = {}
        """Captured node -> node of its present value, where it was rewritten."""
        self.taken: dict[fx.Node, int] = {}
        """Number of writes to a root at which the present value of a node was right."""
        self.writes: dict[fx.Node, int] = {}
        self.captured: dict[fx.Node, fx.Node] = {}
        """Present value -> the captured node that it stands for."""

    def run(self) -> Program:
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                continue
            with self.graph.inserting_before(node):
                if self.writes:
                    node.args = fx.map_arg(node.args, self.read)
                    node.kwargs = fx.map_arg(node.kwargs, self.read)
            self.track(node)
        for node in reversed(list(self.graph.nodes)):
            if _writes(node) and node in self.present and not node.users:
                self.graph.erase_node(node)
        self.graph.lint()
        return self.program

    def track(self, node: fx.Node) -> None:
        """Note what a node is a view of, and rewrite it if it writes."""
        source = next((a for a in node.args if isinstance(a, fx.Node)), None)
        if source is None:
            return
        source = self.captured.get(source, source)
        if not _writes(node):
            if _is_view(node):
                self.parents[node] = source
                self.taken[node] = self.writes.get(self.root(node), 0)
            return
        root = self.root(source)
        if root.op == "placeholder" and root.name not in self.program.inputs:
            return
        functional = _functional(node.target)
        if functional is None:
            raise UnsupportedError(
                f"module {module_path(node)!r} writes in place with {node.target}, which has no functional form: "
                "write it out of place"
            )
        with self.graph.inserting_before(node):
            fresh = self.graph.call_function(functional, node.args, node.kwargs)
            fresh.meta = dict(node.meta)
            self.parents[node] = source
            self.write(node, source, fresh)

    def write(self, node: fx.Node, target: fx.Node, value: fx.Node) -> None:
        """Make `value` the present one of `target`, and of everything that `target` is a view of."""
        root = self.root(target)
        self.writes[root] = self.writes.get(root, 0) + 1
        child, present = target, value
        self.present[node] = value
        self._set(child, present)
        while child in self.parents:
            parent = self.parents[child]
            if not _writes(child):  # an in-place result is the same memory, not a part of it
                before = self.present.get(parent, parent)
                present = _put_back(self.graph, child, before, parent, present)
            self._set(parent, present)
            child = parent
        self._set(node, value)

    def _set(self, node: fx.Node, present: fx.Node) -> None:
        self.present[node] = present
        self.captured.setdefault(present, node)
        self.taken[node] = self.writes[self.root(node)]

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose memory a node's value lives in."""
        while node in self.parents:
            node = self.parents[node]
        return node

    def read(self, node: fx.Node) -> fx.Node:
        """The node of a captured node's present value, taking a stale view again."""
        written = self.writes.get(self.root(node), 0)
        if not written or self.taken.get(node, 0 if node in self.parents else written) == written:
            return self.present.get(node, node)
        parent = self.read(self.parents[node])
        if _writes(node):
            self._set(node, parent)
            return parent
        fresh = self.graph.call_function(node.target, (parent, *node.args[1:]), node.kwargs)  # type: ignore[arg-type]
        fresh.meta = dict(node.meta)
        self._set(node, fresh)
        return fresh


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_view(node: fx.Node) -> bool:
    overload = node.target
    if isinstance(overload, torch._ops.OpOverload):
        returns = overload._schema.returns
        return bool(returns) and returns[0].alias_info is not None
    return getattr(overload, "__name__", "") == "getitem"


def _functional(overload: object) -> torch._ops.OpOverload | None:
    """The out-of-place overload of an in-place one: `aten.add_.Tensor` -> `aten.add.Tensor`."""
    assert isinstance(overload, torch._ops.OpOverload)
    name = overload._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name[:-1], None)
    functional = getattr(packet, overload._overloadname, None) if packet is not None else None
    return functional if isinstance(functional, torch._ops.OpOverload) else None


def _put_back(graph: fx.Graph, view: fx.Node, whole: fx.Node, captured: fx.Node, part: fx.Node) -> fx.Node:
    """`whole` with the part that `view` shows replaced by `part`."""
    arguments = view.args[1:]
    target: Callable[..., object]
    operands: tuple[object, ...]
    if view.target is aten.slice.Tensor:
        target, operands = aten.slice_scatter.default, (whole, part, *arguments)
    elif view.target is aten.select.int:
        target, operands = aten.select_scatter.default, (whole, part, *arguments)
    elif view.target in _RESHAPES:
        target, operands = aten.view_as.default, (part, whole)
    elif view.target in (aten.alias.default, aten.contiguous.default, aten.detach.default):
        return part
    elif view.target is aten.transpose.int:
        target, operands = aten.transpose.int, (part, *arguments)
    elif view.target is aten.t.default:
        target, operands = aten.t.default, (part,)
    elif view.target is aten.permute.default:
        dims = arguments[0]
        assert isinstance(dims, list | tuple)
        inverse = sorted(range(len(dims)), key=lambda index: dims[index] % len(dims))  # type: ignore[operator]
        target, operands = aten.permute.default, (part, inverse)
    else:
        raise UnsupportedError(
            f"module {module_path(view)!r} writes in place to a {view.target} view, which cannot be undone: write it "
            "out of place"
        )
    fresh = graph.call_function(target, operands)  # type: ignore[arg-type]
    fresh.meta = dict(captured.meta)
    return fresh
