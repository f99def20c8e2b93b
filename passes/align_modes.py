"""Align: which operations of the train-mode capture are operations of the eval-mode capture.

Operations are matched in order, by what they are and which module ran them. A matched pair is one
operation of the network; what lies between two of them is a *difference*: operations of one mode alone.

Promise: each operation of both captures is in exactly one pair or difference, and integers
(sizes) that a pair reads are the same in both modes.
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
"""Operations that `rebind` makes follow a flag -> the arguments in which the modes may differ."""
_RECURRENT = {
    getattr(operation, overload): place
    for operation in (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
    for overload, place in (("input", 5), ("data", 6))
}
"""Recurrent layers -> the place of their dropout, with the mode behind it."""


@dataclass
class Difference:
    """Operations between two pairs, in the order of their captures."""

    place: int
    """Index of the pair that comes after it, in the order of pairs."""
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
    """Match the operations of two captures; `twin` holds their placeholders and is completed."""
    ours, theirs = _operations(evaluation), _operations(training)
    matcher = SequenceMatcher(
        None, [_key(evaluation, node) for node in ours], [_key(training, node) for node in theirs], autojunk=False
    )
    pairs: list[tuple[fx.Node, fx.Node]] = []
    differences: list[Difference] = []
    done_ours = done_theirs = 0
    for block in matcher.get_matching_blocks():
        candidates = [(ours[block.a + i], theirs[block.b + i]) for i in range(block.size)]
        _differ(differences, len(pairs), ours[done_ours : block.a], theirs[done_theirs : block.b])
        for our, their in candidates:
            if _sizes_agree(our, their, twin):
                twin[their] = our
                pairs.append((our, their))
            else:
                _differ(differences, len(pairs), [our], [their])
        done_ours, done_theirs = block.a + block.size, block.b + block.size
    return Alignment(twin, pairs, differences)


def _operations(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]


def _differ(differences: list[Difference], place: int, ours: list[fx.Node], theirs: list[fx.Node]) -> None:
    if not ours and not theirs:
        return
    if not differences or differences[-1].place != place:
        differences.append(Difference(place))
    differences[-1].evaluation.extend(ours)
    differences[-1].training.extend(theirs)


def _sizes_agree(our: fx.Node, their: fx.Node, twin: dict[fx.Node, fx.Node]) -> bool:
    """Whether the operands of a candidate pair that are integers, or decide one, are pairs themselves."""
    strict = is_size(our)
    return all(
        twin.get(b) is a if strict or is_size(a) or is_size(b) else True
        for a, b in zip(operands(our), operands(their), strict=True)
    )


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, one for each place."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), found.append)
    return found


def _key(program: Program, node: fx.Node) -> tuple[object, ...]:
    args = list(node.args)
    for index in FLAGS.get(node.target, ()):
        if index < len(args):
            args[index] = None
    if node.target in _RECURRENT and args[_RECURRENT[node.target]] == 0:
        args[_RECURRENT[node.target] + 1] = None  # the mode matters to its dropout alone
    while node.target in FLAGS and len(args) <= max(FLAGS[node.target]):
        args.append(None)
    target: object = node.target
    if node.op == "call_module":
        target = _module_key(program.graph_module.get_submodule(str(node.target)))
    elif node.op == "get_attr":
        target = (str(node.target),)
    return target, module_path(node), repr(_anonymous((args, dict(node.kwargs))))


def _anonymous(value: Any) -> Any:
    """Arguments with every node called alike."""
    return fx.map_arg(value, lambda node: "*" if not is_size(node) else "#")


def _module_key(module: nn.Module) -> tuple[object, ...]:
    settings = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    return type(module), repr(sorted((key, repr(value)) for key, value in settings.items() if key != "training"))
