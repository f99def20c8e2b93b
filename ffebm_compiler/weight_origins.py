"""The parameter or buffer behind a block's weight, where the weight is a view or a multiple of it.

A weight may be the transpose of a parameter, or the parameter times a scale, such as that of a folded batch norm or a
mask. Scaling the parameter then scales the weight, and setting its values to 0 sets those of the weight to 0. Any other
computation, such as a softplus, allows neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

__all__ = ["Origin", "origin_of"]

aten = torch.ops.aten

_VIEWS = {
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.clone.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.expand.default,
    aten.unflatten.int,
    aten.to.dtype,
    aten._to_copy.default,
}
"""Operations that keep every value, but for its precision."""

_MULTIPLES = {aten.mul.Tensor, aten.mul.Scalar, aten.neg.default}
"""Operations that multiply by a factor, which any operand may be."""

_QUOTIENTS = {aten.div.Tensor, aten.div.Scalar}
"""Operations that divide the first operand."""


class Origin(NamedTuple):
    """A parameter or buffer, and the operations that lead from it to a weight."""

    name: str
    path: tuple[fx.Node, ...]
    """First the node that reads the tensor, last the weight."""

    @property
    def scaled(self) -> bool:
        """Whether the weight is a multiple, and not the tensor's own values."""
        return any(node.target not in _VIEWS for node in self.path[1:])

    def opposed(self, tensor: Tensor, value_of: Callable[[fx.Node], Tensor | None]) -> Tensor:
        """Where the tensor's values make values of the weight that are below 0, as a mask of the tensor's shape.

        Args:
            tensor: the present tensor.
            value_of: the values of the other operands, the factors.
        """
        leaf = tensor.detach().clone().requires_grad_()
        with torch.enable_grad():
            value, before = leaf, self.path[0]
            for node in self.path[1:]:
                operands = {o: value if o is before else value_of(o) for o in node.all_input_nodes}
                args, kwargs = fx.map_arg((node.args, node.kwargs), operands.__getitem__)
                value, before = node.target(*args, **kwargs), node  # type: ignore[operator]
            (factors,) = torch.autograd.grad(value.sum(), leaf)
        return leaf.detach() * factors < 0


def origin_of(node: Any, fetched: Mapping[fx.Node, str], parameters: Set[str]) -> Origin | None:
    """What a weight is a view or a multiple of; None if it is computed otherwise.

    Args:
        node: the weight in the lowered graph.
        fetched: the nodes that read a parameter or buffer, and its name.
        parameters: names of parameters. Of two operands of the weight's size that are multiplied, such as a parameter
            and a mask, the parameter is the origin, and else the first.
    """
    if not isinstance(node, fx.Node):
        return None
    if node in fetched:
        return Origin(fetched[node], (node,))
    if node.target in _VIEWS or node.target in _QUOTIENTS:
        operands = [node.args[0]]
    elif node.target in _MULTIPLES:
        size = node.meta["val"].numel()
        operands = [a for a in node.args if isinstance(a, fx.Node) and a.meta["val"].numel() == size]
    else:
        return None
    origins = (origin_of(operand, fetched, parameters) for operand in operands)
    found = sorted((o for o in origins if o is not None), key=lambda origin: origin.name not in parameters)
    return Origin(found[0].name, (*found[0].path, node)) if found else None
