"""Recast: when a hybrid's dtype changes, change its casts to those that its source would make.

`.to(y.dtype)` and `.float()` look the same in a graph: a cast to the dtype seen at capture. So when
`.double()`, `.to(torch.bfloat16)` or `.half()` changes the parameters, the source is captured again
in its new dtype, and the digital parts take the dtypes of the new graph. This is done once for each dtype, and only
for models that name a dtype in their forward. For a new device only its name is changed in the graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from ffebm_compiler.errors import CaptureError, FFEBMError, UnsupportedError
from ffebm_compiler.pipeline import annotated_program
from ffebm_compiler.runtime.feedforward.block_graph import CAPTURED_NAME
from ffebm_compiler.runtime.feedforward.casts import autocast_to
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch, TrainingMask

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts
    from ffebm_compiler.ir import Program

__all__ = ["Casts", "dtype_of", "keep_wide", "move"]


@dataclass
class Casts:
    """The dtypes that a captured graph names, and its operations."""

    operations: tuple[str, ...]
    dtype: torch.dtype | None
    """Dtype of the parameters at capture."""
    known: dict[torch.dtype, dict[str, tuple[torch.dtype, ...]]] = field(default_factory=dict)
    """Dtype of the parameters -> node name -> the dtypes among the node's arguments, in order."""

    def __deepcopy__(self, memo: dict[int, object]) -> Casts:
        """Itself, since copies of a hybrid have the same graph."""
        return self

    @classmethod
    def of(cls, program: Program) -> Casts:
        """Read a captured program, and mark its nodes so that they can be found after lowering."""
        dtype = dtype_of(program.source)
        casts = cls(_targets(program), dtype)
        if dtype is not None:
            casts.known[dtype] = _named(program)
        for prefix, graph_module in _graphs(program.graph_module):
            for node in graph_module.graph.nodes:
                node.meta[CAPTURED_NAME] = prefix + node.name
        return casts

    def follow(self, hybrid: HybridParts, before: torch.dtype, after: torch.dtype) -> None:
        """Give the digital parts the dtypes that the source names when its parameters are of dtype `after`.

        Raises:
            UnsupportedError: the source runs other operations in that dtype, or cannot be captured in it.
        """
        if not any(dtype.is_floating_point for named in self.known.get(before, {}).values() for dtype in named):
            return
        if after not in self.known:
            self.known[after] = self._captured(hybrid, before, after)
        _set(hybrid, self.known[after])

    def examples(self, hybrid: HybridParts, after: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The hybrid's example inputs, with those that had the dtype of the parameters at capture in dtype `after`."""
        assert hybrid.conversion is not None
        device = next(hybrid.parameters()).device
        args, kwargs = hybrid.conversion.examples()
        return pytree.tree_map(lambda leaf: _in_dtype(leaf, self.dtype, after, device), (args, kwargs))

    def _captured(
        self, hybrid: HybridParts, before: torch.dtype, after: torch.dtype
    ) -> dict[str, tuple[torch.dtype, ...]]:
        source = hybrid.__dict__["_source"]
        if type(source) is nn.Module or hybrid.conversion is None:
            if not _widens(before, after):
                raise UnsupportedError(
                    f"the source was exported in {before} and names dtypes, so that it cannot become {after}: export "
                    "it again in that dtype and convert it"
                )
            return {
                name: tuple(after if dtype is before else dtype for dtype in named)
                for name, named in self.known[before].items()
            }
        args, kwargs = self.examples(hybrid, after)
        shapes = hybrid.conversion.dynamic_shapes
        try:
            free = shapes if shapes in ("batch", None) else None
            program, _ = annotated_program(source, args, kwargs, hybrid.plan.options, free, hybrid.plan.hardware)
        except FFEBMError as error:
            raise CaptureError(f"the model cannot be traced in {after}: {error}") from error
        if _targets(program) != self.operations:
            raise UnsupportedError(
                f"in {after} the model runs other operations than in {before}, in which it was converted: convert it "
                f"in {after}"
            )
        first = {name: index for index, (name, _) in enumerate(_operations(program))}
        named = _named(program)
        mine = self.known[before]
        captured = list(mine)
        return dict(zip(captured, (named[name] for name in sorted(named, key=first.__getitem__)), strict=True))


def keep_wide(lowered: fx.GraphModule, before: dict[str, Tensor | None]) -> None:
    """Give constants of the graph their former dtype if the new one is narrower, as the source keeps it too."""
    for name, constant in lowered._buffers.items():
        was = before.get(name)
        if constant is not None and was is not None and not _widens(was.dtype, constant.dtype):
            lowered._buffers[name] = was.to(constant.device)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def _widens(before: torch.dtype, after: torch.dtype) -> bool:
    return torch.promote_types(before, after) is after


def _in_dtype(leaf: Any, before: torch.dtype | None, after: torch.dtype, device: torch.device) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.to(device=device, dtype=after if leaf.dtype is before else leaf.dtype)


def move(hybrid: HybridParts, before: torch.device, after: torch.device) -> None:
    """Replace the device `before` by `after` in a hybrid's graphs, where the exporter notes it for every new tensor."""

    def moved(leaf: Any) -> Any:
        here = isinstance(leaf, torch.device) and leaf.type == before.type and leaf.index in (None, before.index)
        return after if here else leaf

    for module in _graphs_of(hybrid):
        changed = False
        for node in module.graph.nodes:
            if any(isinstance(leaf, torch.device) for leaf in _leaves((node.args, node.kwargs))):
                node.args, node.kwargs = fx.node.map_aggregate((node.args, dict(node.kwargs)), moved)
                changed = True
        if changed:
            module.recompile()


def _graphs(graph_module: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """A captured graph and the graphs inside its mode-dependent operations, each with a prefix for its node names."""
    yield "", graph_module
    for name, module in graph_module.named_children():
        for part in ("evaluation", "training_part"):
            inner = module._modules.get(part)
            if isinstance(module, ModeSwitch | TrainingMask) and isinstance(inner, fx.GraphModule):
                yield f"{name}.{part}.", inner


def _graphs_of(hybrid: HybridParts) -> list[fx.GraphModule]:
    """All graphs that a hybrid runs, including those of masks inside its blocks."""
    masks = []
    for block in hybrid.energy_blocks.values():
        program = block.program
        drives = [instruction for layer in program.layers for instruction in layer.instructions]
        for instruction in (*drives, *program.readout):
            masks.append(getattr(getattr(instruction.operator, "source", None), "training_part", None))
    found = [*hybrid.lowered.modules(), *masks]
    return list(dict.fromkeys(module for module in found if isinstance(module, fx.GraphModule)))


def _operations(program: Program) -> Iterator[tuple[str, fx.Node]]:
    """The operations that a change of dtype must leave as they are, with their names."""
    for prefix, graph_module in _graphs(program.graph_module):
        for node in graph_module.graph.nodes:
            is_shape = isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat)
            if node.op in ("call_function", "call_module") and not is_shape and not _casts_alone(graph_module, node):
                yield prefix + node.name, node


def _casts_alone(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node only does what autocast does, which depends on the dtype of its operands."""
    if node.op != "call_module":
        return node.target is autocast_to
    module = graph_module.get_submodule(str(node.target))
    if not isinstance(module, ModeSwitch):
        return False
    inner = [node for part in (module.evaluation, module.training_part) for node in part.graph.nodes]
    return all(node.op in ("placeholder", "output") or node.target is autocast_to for node in inner)


def _targets(program: Program) -> tuple[str, ...]:
    """The targets of all operations, without the numbers at the end of the names that conversion gives."""
    return tuple(str(node.target).rstrip("0123456789") for _, node in _operations(program))


def _leaves(arguments: Any) -> list[Any]:
    found: list[Any] = []

    def note(leaf: Any) -> Any:
        found.append(leaf)
        return leaf

    fx.node.map_aggregate(arguments, note)
    return found


def _dtypes(arguments: Any) -> tuple[torch.dtype, ...]:
    return tuple(leaf for leaf in _leaves(arguments) if isinstance(leaf, torch.dtype))


def _replaced(arguments: Any, dtypes: tuple[torch.dtype, ...]) -> Any:
    left = iter(dtypes)

    def replace(leaf: Any) -> Any:
        return next(left) if isinstance(leaf, torch.dtype) else leaf

    return fx.node.map_aggregate(arguments, replace)


def _named(program: Program) -> dict[str, tuple[torch.dtype, ...]]:
    found = {name: _dtypes((node.args, node.kwargs)) for name, node in _operations(program)}
    return {name: dtypes for name, dtypes in found.items() if dtypes}


def _set(hybrid: HybridParts, named: dict[str, tuple[torch.dtype, ...]]) -> None:
    for module in _graphs_of(hybrid):
        changed = False
        for node in module.graph.nodes:
            dtypes = named.get(node.meta.get(CAPTURED_NAME, ""))
            if dtypes is None or _dtypes((node.args, node.kwargs)) == dtypes:
                continue
            node.args, node.kwargs = _replaced((node.args, dict(node.kwargs)), dtypes)
            changed = True
        if changed:
            module.recompile()
