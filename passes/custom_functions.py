"""Custom functions: an `autograd.Function` of the source keeps its own backward, and a hook its effect on gradients.

`torch.export` traces through the forward of such a function and forgets its backward. So
`keep_custom_functions` records each call as one operation while the model is traced. That operation runs
only the function's forward, on the tracer's tensors. The pass `custom_functions` then
puts a call of the function in its place, as `rebind` does for batch norm. A reentrant checkpoint
is such a function too, but it runs the model's own body, so it is traced through.

Promise: values and gradients are those of the source's function. torch is left as it was found.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.autograd.function import FunctionCtx, _SingleLevelFunction
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.function_calls import called_through, is_traced_through, takes_no_context
from ffebm_compiler.runtime.feedforward.custom_function import CustomFunction, GradientHook, Slot

__all__ = ["KeptFunctions", "custom_functions", "keep_custom_functions"]

_NAMESPACE = "ffebm_capture"
_RECORDED = "recorded_by_ffebm"
"""Begins the operators' names. No other node's name begins so: fx would number it on from theirs, and plans hold names
of nodes, which must not depend on what was captured before."""
_NUMBER = itertools.count()
"""Numbers the operators, so that each has a name of its own in the process, even if captures are nested."""


@dataclass
class _Call:
    """One call of a custom function, as the source made it."""

    function: type
    forward: Callable[..., Any]
    structure: Any
    leaves: list[Any]
    detached: bool = False
    """Whether compiled code has called it, which detaches what it returns."""
    written: list[int] = field(default_factory=list)
    outputs: Any = None

    def run(self, tensors: list[Tensor], sizes: list[Any]) -> list[Tensor]:
        """Run the function's forward alone on the tracer's tensors, and return clones of its outputs."""
        given = [*tensors, *sizes]
        filled = [given[leaf.index] if isinstance(leaf, Slot) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(filled, self.structure)
        context = _Context(args)
        if takes_no_context(self.function):
            result = self.forward(*args, **kwargs)
            self.function.setup_context(context, args, result)  # type: ignore[attr-defined]
        else:
            result = self.forward(context, *args, **kwargs)
        dirty = {id(tensor) for tensor in getattr(context, "dirty_tensors", None) or ()}
        self.written = [index for index, tensor in enumerate(tensors) if id(tensor) in dirty]
        self.outputs = result
        return [leaf.clone() for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


class _Context(FunctionCtx):
    """The `ctx` of a forward whose backward never runs: it takes what the forward saves."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.needs_input_grad = tuple(isinstance(a, Tensor) and a.requires_grad for a in args)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What was saved so far."""
        return tuple(getattr(self, "to_save", ()))


@dataclass
class KeptFunctions:
    """The calls and hooks recorded while a model was traced: operator name -> call, operator name -> hook."""

    calls: dict[str, _Call] = field(default_factory=dict)
    hooks: dict[str, Callable[[Tensor], Tensor | None]] = field(default_factory=dict)


@contextmanager
def keep_custom_functions() -> Iterator[KeptFunctions]:
    """Record calls of custom functions and hooks on tensors as operations while the context is open."""
    kept = KeptFunctions()
    library = torch.library.Library(_NAMESPACE, "FRAGMENT")
    markers: list[Any] = []
    register_hook = Tensor.register_hook

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, CheckpointFunction):
            return args[0](*args[2:])  # (body, preserve_rng_state, inputs...)
        leaves = pytree.tree_leaves((args, kwargs))
        if is_traced_through(cls) or not any(isinstance(leaf, Tensor) for leaf in leaves):
            return super(_SingleLevelFunction, cls).apply(*args, **kwargs)
        return record(cls, args, kwargs)

    def record(function: Any, args: Any, kwargs: Any, detached: bool = False) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        forward = forwards.get(function, function.forward)
        return _record_call(kept, library, _Call(function, forward, structure, leaves, detached))

    def register(tensor: Tensor, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        if not tensor.requires_grad:
            return register_hook(tensor, hook)  # type: ignore[no-untyped-call]
        name = f"{_RECORDED}_hook_{next(_NUMBER)}"
        library.define(f"{name}(Tensor x) -> ()")
        library.impl(name, lambda x: None, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{_NAMESPACE}::{name}", lambda x: None, lib=library)
        operator = getattr(getattr(torch.ops, _NAMESPACE), name).default
        fx.node._side_effectful_functions.add(operator)  # without it, an operation without result is dead code
        markers.append(operator)
        kept.hooks[f"{_NAMESPACE}::{name}"] = hook
        operator(tensor)
        return _Removal(kept, f"{_NAMESPACE}::{name}")

    forwards: dict[type, Callable[..., Any]] = {}
    with called_through(apply, record, forwards):
        Tensor.register_hook = register  # type: ignore[method-assign]
        try:
            yield kept
        finally:
            Tensor.register_hook = register_hook  # type: ignore[method-assign]
            fx.node._side_effectful_functions.difference_update(markers)
            library._destroy()


class _Removal(RemovableHandle):
    """The handle of a recorded hook."""

    def __init__(self, kept: KeptFunctions, name: str) -> None:
        super().__init__(OrderedDict())
        self._kept, self._name = kept, name

    def remove(self) -> None:
        """Forget the hook."""
        self._kept.hooks[self._name] = lambda gradient: None


def _record_call(kept: KeptFunctions, library: Any, call: _Call) -> Any:
    """Record a call as one operation in the trace; returns what the function returns."""
    tensors = [leaf for leaf in call.leaves if isinstance(leaf, Tensor)]
    sizes = [leaf for leaf in call.leaves if isinstance(leaf, torch.SymInt)]
    places = iter(range(len(tensors)))
    later = iter(range(len(tensors), len(tensors) + len(sizes)))
    call.leaves = [
        Slot(next(places))
        if isinstance(leaf, Tensor)
        else Slot(next(later))
        if isinstance(leaf, torch.SymInt)
        else leaf
        for leaf in call.leaves
    ]
    name = f"{_RECORDED}_call_{next(_NUMBER)}"
    library.define(f"{name}(Tensor[] tensors, SymInt[] sizes) -> Tensor[]")
    library.impl(name, call.run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", call.run, lib=library)
    torch.library.register_autograd(f"{_NAMESPACE}::{name}", _no_backward, lib=library)
    kept.calls[f"{_NAMESPACE}::{name}"] = call
    results = iter(getattr(getattr(torch.ops, _NAMESPACE), name).default(tensors, sizes))
    outputs, call.outputs = call.outputs, None
    return pytree.tree_map(lambda leaf: next(results) if isinstance(leaf, Tensor) else leaf, outputs)


def _no_backward(*_: Any) -> Any:
    raise AssertionError("a recorded function is never differentiated while it is traced")


@Pass
def custom_functions(program: Program) -> Program:
    """Replace each recorded operation by a call of the source's function or hook."""
    if program.functions is None:
        return program
    for node in list(program.graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != _NAMESPACE:
            continue
        name = node.target._schema.name
        call, hook = program.functions.calls.get(name), program.functions.hooks.get(name)
        if call is not None:
            _rebind_call(program, node, call)
        elif hook is not None:
            _rebind_hook(program, node, hook)
    program.graph.lint()
    return program


def _module_name(program: Program, kind: str) -> str:
    taken = {name for name, _ in program.graph_module.named_children()}
    return next(name for index in itertools.count() if (name := f"{kind}_{index}") not in taken)


def _rebind_call(program: Program, node: fx.Node, call: _Call) -> None:
    module: nn.Module = CustomFunction(call.function, call.structure, tuple(call.leaves), tuple(call.written))
    tensors, sizes = node.args
    assert isinstance(tensors, list | tuple)
    assert isinstance(sizes, list | tuple)
    name = _module_name(program, "function")
    program.graph_module.add_submodule(name, module)
    with program.graph.inserting_before(node):
        fresh = program.graph.call_module(name, (*tensors, *sizes))
    fresh.meta = dict(node.meta)
    node.replace_all_uses_with(fresh)
    program.graph.erase_node(node)
    if call.detached:
        _drop_detach(fresh)
    for index in call.written:
        _read_after(fresh, tensors[index], index, call)


def _drop_detach(call: fx.Node) -> None:
    """Forget the first detach of every result: the compiled caller's, which has no part in the source's gradient."""
    for result in list(call.users):
        (only, *more) = result.users or (None,)
        if only is not None and not more and only.target is torch.ops.aten.detach.default:
            only.replace_all_uses_with(result)
            call.graph.erase_node(only)


def _read_after(call: fx.Node, operand: object, index: int, record: _Call) -> None:
    """Let later readers of an operand that the function writes in place read the function's result."""
    order = {node: place for place, node in enumerate(call.graph.nodes)}
    result = next((user for user in call.users if user.args[1] == record.written.index(index)), None)
    assert isinstance(operand, fx.Node)
    if result is not None:
        operand.replace_all_uses_with(result, lambda user: order[user] > order[result])


def _rebind_hook(program: Program, node: fx.Node, hook: Callable[[Tensor], Tensor | None]) -> None:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    name = _module_name(program, "hook")
    program.graph_module.add_submodule(name, GradientHook(hook))
    program.graph.erase_node(node)
    after = value
    while value.op == "placeholder" and after.next.op == "placeholder":
        after = after.next
    with program.graph.inserting_after(after):
        fresh = program.graph.call_module(name, (value,))
    fresh.meta = {key: content for key, content in value.meta.items() if key != "nn_module_stack"}
    fresh.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    value.replace_all_uses_with(fresh, lambda user: user is not fresh)
