"""Align: match the operations of the train-mode capture with those of the eval-mode capture.

Operations are matched in order, by their kind, their arguments and the module that ran them. A matched
pair is one operation of the network. The operations between two pairs are a *difference*: only one mode has them.

Promise: each operation of both captures is in exactly one pair or difference. The integers (sizes) that a
pair reads are the same in both modes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

import torch
from torch import fx, nn

from ffebm_compiler.ir import Program, module_path

__all__ = ["FLAGS", "Alignment", "Difference", "align", "is_size"]

aten = torch.ops.aten

FLAGS: dict[object, tuple[int, ...]] = {
    aten.batch_norm.default: (5,),
    aten.instance_norm.default: (5,),
    aten.dropout.default: (2,),
    aten.feature_dropout.default: (2,),
    aten.alpha_dropout.default: (2,),
    aten.feature_alpha_dropout.default: (2,),
    aten.scaled_dot_product_attention.default: (4,),
}
"""Operation that `rebind` binds to a training flag -> indices of the arguments in which the modes may differ."""
_RECURRENT = {
    getattr(operation, overload): place
    for operation in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
    for overload, place in (("input", 5), ("data", 6))
}
"""Recurrent layer -> index of its dropout rate. The training flag is the argument after it."""


@dataclass
class Difference:
    """The operations between two pairs, each list in the order of its capture."""

    place: int
    """Index of the pair that comes after it."""
    evaluation: list[fx.Node] = field(default_factory=list)
    training: list[fx.Node] = field(default_factory=list)


@dataclass
class Alignment:
    """Pairs and differences of two captures."""

    twin: dict[fx.Node, fx.Node]
    """Node of the train-mode capture -> its node in the eval-mode capture (placeholders too)."""
    pairs: list[tuple[fx.Node, fx.Node]]
    differences: list[Difference]


def is_size(node: fx.Node) -> bool:
    """Whether a node computes an integer from shapes."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymBool | torch.SymFloat | int)


def align(evaluation: Program, training: Program, twin: dict[fx.Node, fx.Node]) -> Alignment:
    """Match the operations of two captures. `twin` holds the matched placeholders, and the operations are added."""
    ours, theirs = _operations(evaluation), _operations(training)
    matcher = SequenceMatcher(
        None,
        [_comparison_key(evaluation, node) for node in ours],
        [_comparison_key(training, node) for node in theirs],
        autojunk=False,
    )
    pairs: list[tuple[fx.Node, fx.Node]] = []
    differences: list[Difference] = []
    done_ours = done_theirs = 0
    for block in matcher.get_matching_blocks():
        candidates = [(ours[block.a + i], theirs[block.b + i]) for i in range(block.size)]
        _add_difference(differences, len(pairs), ours[done_ours : block.a], theirs[done_theirs : block.b])
        for our, their in candidates:
            if _sizes_agree(our, their, twin) and not _against_the_flag(our, their):
                twin[their] = our
                pairs.append((our, their))
            else:
                _add_difference(differences, len(pairs), [our], [their])
        done_ours, done_theirs = block.a + block.size, block.b + block.size
    return Alignment(twin, pairs, differences)


def _operations(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]


def _add_difference(differences: list[Difference], place: int, ours: list[fx.Node], theirs: list[fx.Node]) -> None:
    if not ours and not theirs:
        return
    if not differences or differences[-1].place != place:
        differences.append(Difference(place))
    differences[-1].evaluation.extend(ours)
    differences[-1].training.extend(theirs)


def _sizes_agree(our: fx.Node, their: fx.Node, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether a candidate pair reads the same integers in both modes, which means that those are pairs themselves."""
    strict = is_size(our)
    return all(
        twin.get(b) is a if strict or is_size(a) or is_size(b) else True
        for a, b in zip(operands(our), operands(their), strict=True)
    )


def _against_the_flag(our: fx.Node, their: fx.Node) -> bool:
    """Whether an operation trains in eval mode alone, as in `dropout(x, p, not self.training)`: no flag says that."""
    return any(
        index < min(len(our.args), len(their.args)) and our.args[index] is True and their.args[index] is False
        for index in FLAGS.get(our.target, ())
    )


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments; a node that is passed twice comes twice."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _comparison_key(program: Program, node: fx.Node) -> tuple[object, ...]:
    args = list(node.args)
    for index in FLAGS.get(node.target, ()):
        if index < len(args):
            args[index] = None
    if node.target in _RECURRENT and args[_RECURRENT[node.target]] == 0:
        args[_RECURRENT[node.target] + 1] = None  # without dropout, both modes compute the same
    while node.target in FLAGS and len(args) <= max(FLAGS[node.target]):
        args.append(None)
    target: object = node.target
    if node.op == "call_module":
        target = _module_key(program.graph_module.get_submodule(str(node.target)))
    elif node.op == "get_attr":
        target = (str(node.target),)
    return target, module_path(node), repr(_without_node_names((args, dict(node.kwargs))))


def _without_node_names(value: Any) -> Any:
    """The arguments with one sign for every value and one for every size, so that they can be compared."""
    return fx.map_arg(value, lambda node: "*" if not is_size(node) else "#")


def _module_key(module: nn.Module) -> tuple[object, ...]:
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return type(module), repr(sorted((key, repr(value)) for key, value in settings.items() if key != "training"))
