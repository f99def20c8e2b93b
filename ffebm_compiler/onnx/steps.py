"""Steps: a hybrid as the sequence of its parts and blocks, with named values between them.

The manifest holds this sequence, and both exporters read it. Every value has a name, a
dtype and a shape whose free sizes are named (`"batch"`, or an expression such as `"5*batch"`).
Every operand of a step is such a value, or a tensor that depends on the weights alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ffebm_compiler.block_operands import fetched
from ffebm_compiler.errors import ExportError
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.onnx.absent import absent_outputs
from ffebm_compiler.recast import dtype_of
from ffebm_compiler.runtime.block import EnergyBlock
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.static_values import static_value

__all__ = ["Operand", "Step", "Steps", "Value", "refuse_complex"]

_FREE = 6
"""The number that stands for a free size while tracing if the capture's own is 1."""


@dataclass(frozen=True)
class Value:
    """A value that passes between steps."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """Sizes. A free one is the name of a size, or an expression of such names."""
    example: tuple[int, ...]
    """The sizes with numbers for the free ones."""
    other: tuple[int, ...]
    """The sizes with other numbers for the free ones, each multiplied by another factor."""

    def zeros(self, other: bool = False) -> Tensor:
        """A tensor of this dtype and of the example sizes."""
        return torch.zeros(self.other if other else self.example, dtype=getattr(torch, self.dtype), device="cpu")


@dataclass(frozen=True)
class Operand:
    """An operand of a step: a value, or a tensor known at export. With neither it is left out (no bias)."""

    value: Value | None = None
    tensor: Tensor | None = None
    key: str = ""
    """Name of the tensor: the source's own, or `static.t_<node>` if it is computed from several."""


@dataclass(frozen=True)
class Step:
    """One call of an energy block or of a feedforward part."""

    name: str
    module: nn.Module
    operands: tuple[Operand, ...]
    outputs: tuple[Value, ...]
    present: tuple[int, ...]
    """Indices of these among the module's outputs. The other outputs exist in train mode alone."""

    @property
    def energy(self) -> bool:
        """Whether it is an energy block."""
        return isinstance(self.module, EnergyBlock)


@dataclass(frozen=True)
class Steps:
    """A hybrid's inputs, steps in order, and outputs."""

    inputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Operand, ...]

    @classmethod
    def of(cls, hybrid: HybridCore) -> Steps:
        """Read the lowered graph of a hybrid, with its present weights.

        Raises:
            ExportError: the network takes or returns something that is no tensor.
        """
        with hybrid.in_mode(False):
            return _Reader(hybrid).read()


def refuse_complex(steps: Steps, between: bool) -> None:
    """Refuse complex values that a file would take or return, for which the exporter writes pairs of real numbers.

    Args:
        steps: the hybrid.
        between: whether every part is a file of its own, so that this is so for what passes between them too.

    Raises:
        ExportError: the network takes or returns such a value, or one passes between its parts.
    """
    remedy = "let the network take and return real ones, such as torch.view_as_real of it"
    ports: list[tuple[str, Value | Tensor | None, str]] = [
        *((f"the network's input {value.name!r}", value, remedy) for value in steps.inputs),
        *(
            (f"the network's output {index}", item.value or item.tensor, remedy)
            for index, item in enumerate(steps.outputs)
        ),
    ]
    if between:
        remedy = "export the whole hybrid as one file, inside of which there may be complex values"
        ports += [(f"what {step.name} hands on", value, remedy) for step in steps.steps for value in step.outputs]
    for name, port, remedy in ports:
        dtype = "" if port is None else str(port.dtype).removeprefix("torch.")
        if dtype.startswith("complex"):
            raise ExportError(f"{name} is {dtype}, and an exported file takes and returns real numbers alone: {remedy}")


class _Reader:
    def __init__(self, hybrid: HybridCore) -> None:
        self.hybrid = hybrid
        run = hybrid.lowered
        assert isinstance(run, fx.GraphModule)
        self.run = run
        self.names: dict[str, str] = {}
        self.hints: dict[str, int] = {}
        self.values: dict[fx.Node, Value] = {}
        self.known: dict[fx.Node, Tensor | None] = {}
        self.keys: dict[fx.Node, str] = {}
        self.absent: set[fx.Node] = set()
        self.dtypes: dict[str, list[torch.dtype]] = {}
        """Step -> dtypes of its outputs, if they are not those of the capture."""

    def read(self) -> Steps:
        self.keys = fetched(self.hybrid.lowered)
        self.dtypes = self._dtypes_now()
        inputs = []
        for node in self.run.graph.nodes:
            if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
                self.values[node] = self._value(node.name, node.meta["val"], self._dtype_now(node.meta["val"].dtype))
                inputs.append(self.values[node])
        # All other calls compute weights from parameters alone, so that their present values are constants.
        steps = [self._step(node) for node in self.run.graph.nodes if self._is_step(node)]
        steps = [step for step in steps if step.outputs]
        output = next(node for node in self.run.graph.nodes if node.op == "output")
        results = output.args[0][: self.hybrid._call_form.outputs]
        return Steps(tuple(inputs), tuple(steps), tuple(self._operand(item, "the network") for item in results))

    def _is_step(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(
            self.run.get_submodule(str(node.target)), EnergyBlock | FeedforwardBlock
        )

    def _step(self, call: fx.Node) -> Step:
        name = str(call.target)
        module = self.run.get_submodule(name)
        picks = {node.args[1]: node for node in call.users if node.target is operator.getitem}
        values = call.meta["val"]
        outputs: dict[int, Value] = {}
        gone = [isinstance(item, fx.Node) and item in self.absent for item in call.args]
        missing = absent_outputs(module, gone) if isinstance(module, fx.GraphModule) else [False] * len(values)
        for index, (label, value) in enumerate(zip(self._output_names(name, module, len(values)), values, strict=True)):
            if missing[index]:
                self.absent.update([picks[index]] if index in picks else [])
                continue
            now = self.dtypes[name][index] if name in self.dtypes else self._dtype_now(value.dtype)
            outputs[index] = self._value(label, value, now)
            if index in picks:
                self.values[picks[index]] = outputs[index]
        operands = tuple(self._operand(item, name) for item in call.args)
        if isinstance(module, EnergyBlock) and module.arrays is not None:
            operands = _on_devices(module, operands)
        return Step(name, module, operands, tuple(outputs.values()), tuple(outputs))

    def _output_names(self, name: str, module: nn.Module, count: int) -> tuple[str, ...]:
        """The operations that compute the outputs, by their names in the plan."""
        if isinstance(module, fx.GraphModule):
            results = next(node for node in module.graph.nodes if node.op == "output").args[0]
            return tuple(str(node) for node in results)
        names = self.hybrid.plan.block(name).outputs
        return names if len(names) == count else tuple(f"{name}.{index}" for index in range(count))

    def _operand(self, item: Any, reader: str) -> Operand:
        if item is None or item in self.absent:
            return Operand()
        if not isinstance(item, fx.Node):
            raise ExportError(f"{reader} reads or returns {item!r}, which is no tensor: return tensors only")
        if item in self.values:
            return Operand(value=self.values[item])
        tensor = static_value(self.run, item, self.known)
        if tensor is None and self._is_static(item):
            return Operand()  # it exists in train mode alone
        if tensor is None:
            raise ExportError(
                f"{reader} reads or returns {item.name!r}, which is no tensor: give the network tensors only, and "
                "return no sizes"
            )
        return Operand(tensor=tensor.detach(), key=self.keys.get(item, f"static.t_{item.name}"))

    def _is_static(self, node: fx.Node) -> bool:
        """Whether a node is computed from parameters, buffers and constants alone."""
        return (
            node.op != "placeholder"
            and not self._is_step(node)
            and all(self._is_static(operand) for operand in node.all_input_nodes)
        )

    def _dtype_now(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a value that had this one at capture, if it follows the parameters."""
        return (dtype_of(self.hybrid) or dtype) if dtype is self.hybrid._casts.dtype else dtype

    def _dtypes_now(self) -> dict[str, list[torch.dtype]]:
        """Step -> dtypes of its outputs, where `.double()` and the like have changed them since the capture.

        One forward of the example inputs, without feedback, says them, since a model may name dtypes.
        """
        after = dtype_of(self.hybrid)
        if after is None or after is self.hybrid._casts.dtype or self.hybrid.conversion is None:
            return {}
        found: dict[str, list[torch.dtype]] = {}
        names = {self.run.get_submodule(str(n.target)): str(n.target) for n in self.run.graph.nodes if self._is_step(n)}

        def note(module: nn.Module, _: Any, outputs: Any) -> None:
            found[names[module]] = [value.dtype if isinstance(value, Tensor) else after for value in outputs]

        args, kwargs = self.hybrid._casts.examples(self.hybrid, after)
        hooks = [module.register_forward_hook(note) for module in names]
        try:
            with self.hybrid.feedforward_mode():
                self.hybrid(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _value(self, name: str, value: Tensor, dtype: torch.dtype) -> Value:
        shape: list[int | str] = []
        examples: tuple[list[int], list[int]] = ([], [])
        for size in value.shape:
            if not isinstance(size, torch.SymInt):
                shape.append(int(size))
                for example in examples:
                    example.append(int(size))
                continue
            expression = size.node.expr
            names = {symbol: type(symbol)(self._size_name(str(symbol))) for symbol in expression.free_symbols}
            shape.append(str(expression.subs(names)))
            if expression.is_Symbol and isinstance(size.node.hint, int) and size.node.hint > 1:
                self.hints.setdefault(str(expression), size.node.hint)
            for other, example in enumerate(examples):
                numbers = {
                    symbol: self.hints.get(str(symbol), _FREE)
                    * (2 + list(self.names).index(str(symbol)) if other else 1)
                    for symbol in names
                }
                example.append(int(expression.subs(numbers)))
        return Value(name, str(dtype).removeprefix("torch."), tuple(shape), *map(tuple, examples))

    def _size_name(self, symbol: str) -> str:
        if symbol not in self.names:
            self.names[symbol] = "batch" if not self.names else f"size_{len(self.names)}"
        return self.names[symbol]


def _on_devices(block: EnergyBlock, operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
    """The operands of a block whose weights are those that its devices hold.

    An array has a weight of its own, `<the source's name>@<block>.<index>`, since a layer that runs twice is on two.
    """
    assert block.arrays is not None
    count, origins = block.program.inputs, block.arrays.origins
    inputs, weights = operands[:count], operands[count:]
    held = block.held([operand.tensor for operand in weights])
    found = []
    for index, value in enumerate(held):
        source = weights[origins[index]]
        if value is None or value is source.tensor:
            found.append(Operand() if value is None else source)
        else:
            found.append(Operand(tensor=value.detach(), key=f"{source.key}@{block.name}.{index}"))
    return (*inputs, *found)
