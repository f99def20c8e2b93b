"""Decisions by sizes: what the forward decided, while it was traced, by a size that stays free.

`if h.shape[0] % 2`, `range(h.shape[0] // 2)`, the pieces of `h.split(2)`, the dimensions of `h.squeeze()`, or a pool
whose kernel is a size of its input: the graph holds what the example's sizes decided. So each such decision is kept as
an expression of the sizes, and a call for whose sizes it would be another is refused. Torch's own code branches by
sizes too, to choose layouts. That changes no value, and is not kept.

Promise: every branch of the forward is found, every number that it or torch makes of a size, and every size that
decides about the number of dimensions.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.sym_node import SymNode
from torch.utils._sympy.printers import PythonPrinter

from ffebm_compiler.passes.source_line import running_line, source_line

__all__ = ["SizeDecision", "SizeDecisions"]

_ASKS = ("guard_bool", "guard_int", "guard_float")
"""The methods by which a symbol becomes a Python value."""
_PASSED_ON = (
    "ffebm_compiler.", "torch.fx.experimental.sym_node", "torch.fx.experimental.proxy_tensor", "torch.overrides",
    "torch._export.non_strict_utils", "torch._jit_internal", "torch.utils._device",
)  # fmt: skip
"""Modules whose frames stand between a call of the forward and torch's conversion of its arguments."""
_SQUEEZES = (torch.ops.aten.squeeze, torch.ops.aten.squeeze_, torch.ops.aten.squeeze_copy)
"""Operations whose result has as many dimensions as their input has sizes other than 1."""
_OF_LAYOUTS = (torch.Tensor.contiguous,)
"""Functions that ask for sizes in the forward's name, and give the same values whatever they find."""


@dataclass(frozen=True)
class SizeDecision:
    """A value that the forward made of sizes, on which its graph depends."""

    expression: Any
    """A sympy expression of symbols."""
    value: bool | int | float
    """What it was while the forward was traced."""
    sizes: tuple[tuple[Any, int, int], ...]
    """(symbol, place among the flat inputs, dimension)."""
    line: str
    """` (FILE, line N)` in the model's code."""
    tried: frozenset[tuple[int, ...]] = frozenset()
    """Sizes that decide otherwise, and for which the graph computes what the forward does all the same."""

    def is_kept(self, shapes: Sequence[Sequence[int]]) -> bool:
        """Whether inputs of these shapes decide the same."""
        return self.is_kept_at(tuple(int(shapes[place][dimension]) for _, place, dimension in self.sizes))

    @lru_cache(maxsize=4096)  # noqa: B019 (few, and they live as long as the hybrid)
    def is_kept_at(self, sizes: tuple[int, ...]) -> bool:
        """Whether these sizes, in the order of `sizes`, decide the same, or what makes no difference."""
        if sizes in self.tried:
            return True
        symbols = (symbol for symbol, _, _ in self.sizes)
        try:
            return bool(self.expression.subs(dict(zip(symbols, sizes, strict=True))) == self.value)
        except ZeroDivisionError:
            return False

    @property
    def varies(self) -> bool:
        """Whether common sizes decide otherwise: those up to 64, all the same or each one larger than the last."""
        places = range(len(self.sizes))
        return not all(self.is_kept_at(tuple(n + k * i for i in places)) for n in range(1, 65) for k in (0, 1))

    def described(self, names: Sequence[str]) -> str:
        """The expression with the names of the inputs, such as `x.shape[0] // 2`, and its value."""
        named = {symbol: type(symbol)(f"{names[place]}.shape[{dim}]") for symbol, place, dim in self.sizes}
        return f"{PythonPrinter().doprint(self.expression.xreplace(named))} is {self.value}{self.line}"


class SizeDecisions:
    """The decisions of one trace."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, bool | int | float], str] = {}
        """Expression and value -> the line that first asked."""

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note every decision that the running forward makes."""
        before = {name: getattr(SymNode, name) for name in _ASKS}

        def noting(name: str) -> Any:
            def ask(node: Any, *place: Any) -> Any:
                expression = node.expr
                answer = before[name](node, *place)
                if getattr(expression, "free_symbols", None) and (not isinstance(answer, bool) or _is_the_forwards()):
                    self._found.setdefault((expression, answer), running_line())
                return answer

            return ask

        for name in _ASKS:
            setattr(SymNode, name, noting(name))
        try:
            yield
        finally:
            for name, method in before.items():
                setattr(SymNode, name, method)

    def of(self, program: ExportedProgram) -> tuple[SizeDecision, ...]:
        """The decisions that depend on sizes that are free in the program."""
        places = _places(program)
        decisions = []
        for (expression, value), line in (self._found | _squeezed(program)).items():
            symbols = sorted(expression.free_symbols, key=str)
            if all(symbol in places for symbol in symbols):
                sizes = tuple((symbol, *places[symbol]) for symbol in symbols)
                decisions.append(SizeDecision(expression, value, sizes, line))
        return tuple(decisions)


def _places(program: ExportedProgram) -> Mapping[Any, tuple[int, int]]:
    """Symbol -> (place among the flat inputs, dimension) of a size that is the symbol itself.

    A decision may have made two symbols one. Then a size has the symbol with which it began, too.
    """
    inputs = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
    first: dict[Any, tuple[int, int]] = {}
    now: dict[Any, tuple[int, int]] = {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in inputs or not isinstance(value, torch.Tensor):
            continue
        for dimension, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                first.setdefault(size.node._expr, (inputs.index(node.name), dimension))
                now.setdefault(size.node.expr, (inputs.index(node.name), dimension))
    return {**now, **first}


def _squeezed(program: ExportedProgram) -> dict[tuple[Any, bool | int | float], str]:
    """Whether sizes are 1, as `squeeze` asks. The tracer takes free sizes for larger, and asks nothing."""
    found: dict[tuple[Any, bool | int | float], str] = {}
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        if getattr(node.target, "overloadpacket", None) not in _SQUEEZES:
            continue
        shape = node.args[0].meta["val"].shape
        asked = node.args[1] if len(node.args) > 1 else range(len(shape))
        for dimension in [asked] if isinstance(asked, int) else asked:
            size = shape[dimension]
            if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                found[(sympy.Eq(size.node.expr, 1), size.node.hint == 1)] = source_line(node)
    return found


def _is_the_forwards() -> bool:
    """Whether the forward asks, and not a layout's computation inside of torch."""
    frame = sys._getframe(2)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if frame.f_code.co_name == "__torch_function__" and frame.f_locals.get("func") in _OF_LAYOUTS:
            return False
        if name != "torch" and not name.startswith(_PASSED_ON):
            return not name.startswith("torch.")
        frame = frame.f_back  # type: ignore[assignment]
    return False
