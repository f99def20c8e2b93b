"""Trace: make one ONNX model of steps of a hybrid, with `torch.onnx.export`.

The steps are copied into one fx graph, so that the hybrid itself is not touched. The parameters become buffers of that
graph, and its batch norm and dropout are in eval mode. One export for many parts costs little more than one for a
single part.
"""

from __future__ import annotations

import copy
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.packages import OPSET, package
from ffebm_compiler.onnx.steps import Operand, Step, Value
from ffebm_compiler.runtime.feedforward.blocks import ReboundDropout
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch, TrainingMask
from ffebm_compiler.runtime.feedforward.state import WriteInput

__all__ = ["MODULE_KEY", "Trace"]

MODULE_KEY = "ffebm.module"
"""Metadata key of a node: path of the source's module that it comes from."""


class Trace:
    """An fx graph that steps are copied into, and its export."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.inputs: list[tuple[str, Value]] = []
        self.outputs: list[tuple[str, fx.Node]] = []
        self._buffers: dict[str, fx.Node] = {}
        self._renamed: dict[str, str] = {}
        """Path of a buffer in the traced module -> its name in the hybrid."""

    def input(self, name: str, value: Value) -> fx.Node:
        """A new input of the model."""
        node = self.graph.placeholder(f"input_{len(self.inputs)}")
        self.inputs.append((name, value))
        return node

    def output(self, name: str, node: fx.Node) -> None:
        """A new output of the model. A node that is an input, a tensor or another output already is copied."""
        handed_on = node.op in ("placeholder", "get_attr") or self._may_hand_on(node)
        if handed_on or any(node is known for _, known in self.outputs):
            node = self.graph.call_function(torch.ops.aten.clone.default, (node,))
        self.outputs.append((name, node))

    def _may_hand_on(self, node: fx.Node) -> bool:
        """Whether a node may return its operand unchanged, since it computes something else in train mode alone."""
        call = node.args[0] if node.target is operator.getitem else node
        return isinstance(call, fx.Node) and isinstance(self.root._modules.get(str(call.target)), ModeSwitch)

    def operand(self, operand: Operand, of: Callable[[Value], fx.Node]) -> fx.Node | None:
        """The node of an operand. A known tensor becomes a buffer, once."""
        if operand.value is not None:
            return of(operand.value)
        if operand.tensor is None:
            return None
        if operand.key not in self._buffers:
            name = f"tensor_{len(self._buffers)}"  # the hybrid's own name may be taken, or no Python identifier
            self.root.register_buffer(name, operand.tensor)
            with self.graph.inserting_before(next(iter(self.graph.nodes), None)):
                self._buffers[operand.key] = self.graph.get_attr(name)
            self._renamed[name] = operand.key
        return self._buffers[operand.key]

    def feedforward(self, step: Step, operands: Sequence[fx.Node | None]) -> list[fx.Node]:
        """Copy a feedforward part in eval mode, and return the nodes of the step's outputs."""
        part = step.module
        assert isinstance(part, fx.GraphModule)
        placeholders = [node for node in part.graph.nodes if node.op == "placeholder"]
        known: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=True))
        for node in part.graph.nodes:
            if node.op == "output":
                return [known[node.args[0][index]] for index in step.present]
            if node.op == "placeholder":
                continue
            if node.op == "call_module" and isinstance(part.get_submodule(str(node.target)), WriteInput):
                continue  # an ONNX model writes into no input, and nothing reads the result
            if node.op == "call_module" and isinstance(
                part.get_submodule(str(node.target)), ReboundDropout | TrainingMask
            ):
                known[node] = known[node.args[0]]
                continue
            known[node] = self.graph.node_copy(node, known.__getitem__)
            if node.op == "call_module":
                target = f"{step.name}_{node.target}"
                self.root.add_module(target, _in_eval_mode(part.get_submodule(str(node.target))))
                known[node].target = target
        raise AssertionError(f"{step.name} has no output node")

    def module(self, name: str, module: nn.Module, operands: Sequence[fx.Node | None], outputs: int) -> list[fx.Node]:
        """Call a module that returns a tuple, and return the nodes of its outputs."""
        self.root.add_module(name, module)
        call = self.graph.call_module(name, tuple(operands))
        return [self.graph.call_function(_item, (call, index)) for index in range(outputs)]

    def export(self, fuse: bool = False) -> Any:
        """The ONNX model (`onnx_ir.Model`), without the exporter's own notes.

        Args:
            fuse: let onnxscript's optimizer rewrite the graph (it fuses batch norm into convolutions).

        Raises:
            ExportError: an operation has no ONNX form, or a free size does not stay free.
        """
        package("onnx")
        package("onnxscript")
        self._placeholders_first()
        self.graph.output(tuple(node for _, node in self.outputs))
        self.graph.lint()
        module = fx.GraphModule(self.root, self.graph, "Part")
        free = torch.export.Dim.DYNAMIC
        shapes = tuple(
            {dim: free for dim, size in enumerate(value.shape) if isinstance(size, str)} for _, value in self.inputs
        )
        try:
            with _quiet(), torch.no_grad():
                program = torch.onnx.export(
                    module,
                    tuple(value.zeros() for _, value in self.inputs),
                    dynamo=True,
                    dynamic_shapes=shapes,
                    input_names=[name for name, _ in self.inputs],
                    output_names=[name for name, _ in self.outputs],
                    optimize=fuse,
                    opset_version=OPSET,
                    verbose=False,
                )
        except Exception as error:  # the exporter raises many kinds
            raise ExportError(_first_cause(error)) from error
        assert program is not None  # only the old exporter returns None
        graph = program.model.graph
        taken = {value.name for value in (*graph.inputs, *(out for node in graph.all_nodes() for out in node.outputs))}
        for value in list(graph.initializers.values()):
            name = self._renamed.get(str(value.name), value.name)
            value.name = f"{name}.weight" if name in taken else name
        _remove_records(program.model)
        _name_nodes(program.model)
        _name_sizes(program.model, [value for _, value in self.inputs])
        return program.model

    def _placeholders_first(self) -> None:
        first = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        if first is None:
            return
        seen_other = False
        for node in list(self.graph.nodes):
            if node.op != "placeholder":
                seen_other = True
            elif seen_other:
                first.prepend(node)


def _item(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


def _in_eval_mode(module: nn.Module) -> nn.Module:
    """A shallow copy of a re-bound operation that follows a module in eval mode."""
    twin = copy.copy(module)
    twin.__dict__ = dict(module.__dict__)
    if "_owner" in twin.__dict__:
        twin.__dict__["_owner"] = nn.Identity().eval()
    for key in ("_linked", "_joined"):
        if key in twin.__dict__:
            twin.__dict__[key] = tuple(nn.Identity().eval() for _ in twin.__dict__[key])
    twin.training = False
    return twin


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages that the exporter and `torch.export` write for their own developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first_cause(error: BaseException) -> str:
    """The message of the first exception in the chain, without colours and advice to exporter developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _remove_records(model: Any) -> None:
    """Remove stack traces, paths and exporter records from an `onnx_ir.Model`, but keep each node's module path."""
    graph = model.graph
    for holder in (model, graph, *graph.inputs, *graph.initializers.values()):
        holder.metadata_props.clear()
        holder.doc_string = None
    for node in graph.all_nodes():
        path = _module_path(node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        kept = {key: value for key, value in node.metadata_props.items() if key.startswith("ffebm.")}
        node.metadata_props.clear()
        node.metadata_props.update(kept | ({MODULE_KEY: path} if path and not kept else {}))
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None


def _name_nodes(model: Any) -> None:
    """Name every node by the module that it comes from and its operation, or by the block and its layers."""
    used: dict[str, int] = {}
    for node in model.graph.all_nodes():
        layers = node.metadata_props.get("ffebm.layers", "")
        owner = node.metadata_props.get("ffebm.block", "") or node.metadata_props.get(MODULE_KEY, "")
        name = f"{owner}/{layers.replace(', ', '+')}" if layers else f"{owner}/{node.op_type}".lstrip("/")
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"


def _name_sizes(model: Any, inputs: Sequence[Value]) -> None:
    """Give the free sizes the names that they have in the manifest."""
    names: dict[str, str] = {}
    for found, value in zip(model.graph.inputs, inputs, strict=True):
        for dim, size in zip(found.shape, value.shape, strict=True):
            if isinstance(size, str) and size.isidentifier():
                names[str(dim.value)] = size
    values = [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]
    for value in values:
        for index, dim in enumerate(value.shape or ()):
            if not isinstance(dim, int) and dim.value is not None:
                value.shape[index] = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(dim.value))


def _module_path(scopes: str) -> str:
    """The innermost module of a list such as `['', 'layers.0', 'layers.0.norm', 'add']`."""
    names = re.findall(r"'([^']*)'", scopes)
    path = names[-2] if len(names) > 1 else ""
    return "" if path.startswith("_empty_nn_module_stack") else path  # torch's word for what no module does
