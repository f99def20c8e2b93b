"""Functionalize: in-place operations become functional ones.

`x.relu_()` becomes `y = relu(x)`, and operations that read `x` afterwards read `y`. A write through a
view, `x[:, 0] += 1`, also rebuilds the tensor that the view was taken from (`passes/put_back.py`). Other
views of the same memory are taken again when they are read. The storages of the captured values tell which
value is a view of which. So it counts whether `flatten`, `.float()` or `contiguous` did copy at capture, not whether
it may.

A write to a parameter or a buffer (a counter, a moving average, a renormalised weight) becomes a
`WriteState`, which the hybrid keeps. It takes the whole new value, and later operations read its
result. Earlier operations read a copy of the old value, so that the order of the graph does not matter.

What a forward writes into its inputs is written back at its end (`passes/written_inputs.py`).

Promise: no node but `WriteState` and `WriteInput` mutates a value, and the order of nodes is that of their operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, ensures
from ffebm_compiler.passes.functional_form import FunctionalForm, functional_form, is_random, moves_no_data, writes
from ffebm_compiler.passes.inline_regions import without_gradient
from ffebm_compiler.passes.old_values import is_done
from ffebm_compiler.passes.put_back import Step, put_back
from ffebm_compiler.passes.source_line import place_in_model, source_line
from ffebm_compiler.passes.written_inputs import write_inputs
from ffebm_compiler.runtime.feedforward.in_place import written_without_gradient
from ffebm_compiler.runtime.feedforward.state import WriteState

__all__ = ["functionalize"]


def _writes_in_place(program: Program, node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@ensures("writes in place", _writes_in_place)
def functionalize(program: Program) -> Program:
    """Replace every in-place operation on an intermediate value.

    Raises:
        UnsupportedError: the model writes through a view that has no inverse, or with an operation that has no
            functional form. The message names the module and the user's line.
    """
    return _Functionalizer(program).run()


@dataclass(frozen=True)
class _Place:
    """Where a captured value lives: the node whose memory it is, and the views on the way from there."""

    root: fx.Node
    steps: tuple[Step, ...] = ()


class _Functionalizer:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.places: dict[fx.Node, _Place] = {}
        self.several: dict[fx.Node, fx.Node] = {}
        """A node that gives several views (`split`, `unbind`) -> the node that they are views of."""
        self.version: dict[fx.Node, int] = {}
        """Root -> number of writes to it so far."""
        self.present: dict[_Place, tuple[int, fx.Node]] = {}
        """Place -> the version of its root, and the node that computes the value of that version."""
        self.states: dict[fx.Node, fx.Node] = {}
        """Parameter or buffer -> the last write to it."""
        self.copies: dict[fx.Node, fx.Node] = {}
        """Parameter or buffer -> a copy of its value before the first write."""

    def run(self) -> Program:
        written = []
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr"):
                continue
            captured = node.args, node.kwargs
            if self.version:
                with self.graph.inserting_before(node):
                    node.args = fx.map_arg(node.args, self.read)
                    node.kwargs = fx.map_arg(node.kwargs, self.read)
            if writes(node):
                if self.write(node, *captured):
                    written.append(node)
            else:
                self.track(node, *captured)
        for node in reversed(written):
            self.graph.erase_node(node)
        inputs = [root for root, count in self.version.items() if count and root.name in self.program.inputs]
        write_inputs(self.program, {root: self._present_node(_Place(root)) for root in inputs})
        self.graph.lint()
        return self.program

    def place(self, node: fx.Node) -> _Place:
        """Where a captured value lives. A value that is no known view has memory of its own."""
        return self.places.get(node, _Place(node))

    def track(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a node is a view of."""
        if node.target is operator.getitem and args[0] in self.several:
            listed, index = args
            source = self.place(self.several[listed])
            step = Step(listed.target, tuple(listed.args[1:]), dict(listed.kwargs), listed, index)
        else:
            viewed = _viewed_operand(node, args)
            if viewed is None:
                return
            if isinstance(node.meta["val"], list | tuple):
                self.several[node] = viewed
                return
            source, step = self.place(viewed), Step(node.target, tuple(args[1:]), dict(kwargs), node)  # type: ignore[arg-type]
        self.places[node] = place = _Place(source.root, (*source.steps, step))
        self.present[place] = (self.version.get(place.root, 0), node)

    def write(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Rewrite a node that writes; False where it writes to the source's state."""
        form = functional_form(node)
        target = _written_node(form, args, kwargs)
        if target is None:
            return False
        place = self.place(target)
        root = place.root
        if form is None:
            raise _refusal(node, f"writes in place with {node.target}, which has no functional form")
        with self.graph.inserting_before(node):
            before = self.read(target)
            if moves_no_data(node):
                step = Step(form.target, form.rest(args), form.named(kwargs), node)
                self.places[target] = self.places[node] = _Place(root, (*place.steps, step))
                fresh = self.graph.call_function(form.target, form.operands(node.args), form.named(node.kwargs))
                fresh.meta = dict(node.meta)
                self.present[self.places[node]] = (self.version.setdefault(root, 0), fresh)
                return True
            value = self._written_value(node, form, before)
            if without_gradient(node):
                value = self._new(written_without_gradient, (before, value), target)
                value.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})  # the module that writes
            self.set(place, value)
            if self._is_state(root):
                self.write_state(root, node)
        self.places[node] = place
        return True

    def _is_state(self, root: fx.Node) -> bool:
        return root.op == "placeholder" and root.name not in self.program.inputs

    def write_state(self, root: fx.Node, node: fx.Node) -> None:
        """Write the present value of a parameter or buffer into it, after every operation that read the old value."""
        value = self._present_node(_Place(root))
        readers = [user for user in root.users if user < node and not writes(user) and not _updates(user, root)]
        readers = [user for user in readers if not is_done(self.program, user, value)]
        if root not in self.copies and readers:
            with self.graph.inserting_after(_last_placeholder(self.graph)):
                self.copies[root] = self._new(torch.ops.aten.clone.default, (root,), root)
                self.copies[root].meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
            for user in readers:
                user.replace_input_with(root, self.copies[root])
        before = [known for known in (self.copies.get(root), self.states.get(root)) if known is not None]
        target = f"write_{node.name}"
        self.program.graph_module.add_submodule(target, WriteState(self.program.lifted.get(root.name, root.name)))
        self.states[root] = fresh = self.graph.call_module(target, (root, value, *before))
        fresh.meta = {**node.meta, "val": root.meta.get("val")}
        self.present[_Place(root)] = (self.version[root], fresh)

    def _written_value(self, node: fx.Node, form: FunctionalForm, before: fx.Node) -> fx.Node:
        """The value that an operation writes, in the dtype and shape of its target."""
        operands = form.operands(node.args)
        if is_random(node):  # a tensor overwritten with random numbers loses its gradient history
            operands = (self._new(torch.ops.aten.detach.default, (before,), before), *operands[1:])
        value = self.graph.call_function(form.target, operands, form.named(node.kwargs))
        value.meta = {**node.meta, "val": before.meta.get("val")}
        want = before.meta.get("val")
        have = form.result(value)
        if not isinstance(want, torch.Tensor) or not isinstance(have, torch.Tensor):
            return value
        value.meta["val"] = have
        if have.dtype != want.dtype:
            value = self._new(torch.ops.aten.to.dtype, (value, want.dtype), before)
        if have.dim() != want.dim():
            value = self._new(torch.ops.aten.expand_as.default, (value, before), before)
        return value

    def _new(self, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node) -> fx.Node:
        fresh = self.graph.call_function(target, args)
        fresh.meta = dict(like.meta)
        return fresh

    def set(self, place: _Place, value: fx.Node) -> None:
        """Make `value` the present one at a place, and rebuild every value that the place is a part of."""
        root, steps = place.root, place.steps
        wholes = [self._present_node(_Place(root, steps[:count])) for count in range(len(steps))]
        self.version[root] = version = self.version.get(root, 0) + 1
        self.present[place] = (version, value)
        for count in reversed(range(len(steps))):
            try:
                value = put_back(self.graph, steps[count], wholes[count], value)
            except UnsupportedError as error:
                raise _refusal(steps[count].node, str(error)) from None
            self.present[_Place(root, steps[:count])] = (version, value)

    def read(self, node: fx.Node) -> fx.Node:
        """The node of a captured node's present value. A view that is out of date is taken again."""
        return self._present_node(self.place(node))

    def _present_node(self, place: _Place) -> fx.Node:
        version = self.version.get(place.root, 0)
        known = self.present.get(place)
        if known is not None and known[0] == version:
            return known[1]
        if not place.steps:
            return place.root
        step = place.steps[-1]
        whole = self._present_node(_Place(place.root, place.steps[:-1]))
        args, kwargs = fx.map_arg((step.args, step.kwargs), self.read)
        fresh = self.graph.call_function(step.target, (whole, *args), kwargs)
        fresh.meta = dict(step.node.meta)
        if known is not None and step.target is torch.ops.aten.detach.default:
            # A detached tensor shares the values, but keeps the gradient history of what was written to it.
            fresh = self._new(written_without_gradient, (known[1], fresh), step.node)
        if step.index is not None:
            several = fresh
            fresh = self.graph.call_function(operator.getitem, (several, step.index))
            fresh.meta = {**step.node.meta, "val": several.meta["val"][step.index]}
        self.present[place] = (version, fresh)
        return fresh


def _updates(node: fx.Node, state: fx.Node) -> bool:
    """Whether a node is a norm that updates its running statistics, which `order_of_state` puts in order."""
    norms = (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default)
    return node.target in norms and state in node.args[3:5]


def _last_placeholder(graph: fx.Graph) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][-1]


def _written_node(form: FunctionalForm | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node | None:
    """The captured node that is written to."""
    found = args[0] if form is None or form.out is None else kwargs.get(form.out)
    return found if isinstance(found, fx.Node) else None


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return {
        tensor.untyped_storage()._cdata
        for tensor in tensors
        if isinstance(tensor, torch.Tensor)
        and tensor.layout is torch.strided
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    }


_FRESH_IN_TRAINING = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu")
"""In eval mode they return their input itself, in train mode a new value."""


def _viewed_operand(node: fx.Node, args: tuple[Any, ...]) -> fx.Node | None:
    """The operand that shares its memory with a node's value; None if there is none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.name.removeprefix("aten::") in _FRESH_IN_TRAINING:
        return None
    source = args[0] if args else None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    return source if _storages(source) & _storages(node) else None


def _refusal(node: fx.Node, what: str) -> UnsupportedError:
    return UnsupportedError(f"{place_in_model(node)} {what}: write it out of place{source_line(node)}")
