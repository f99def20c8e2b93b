"""Refused hooks: what a forward hangs into autograd's graph beside `Tensor.register_hook` is refused with its line.

Hooks of autograd's nodes, of several gradients, of accumulated gradients and of what autograd saves belong to a
graph that the source builds at every call. The hybrid builds another one, in which their nodes are not there.

Promise: a forward that is traced sets no such hook; torch is left as it was found.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.graph import saved_tensors_hooks

from ffebm_compiler.passes.explain_capture import NotTraceable

__all__ = ["GRADIENT_FUNCTION", "GradientFunction", "no_refused_hooks"]

GRADIENT_FUNCTION = vars(torch._C.TensorBase)["grad_fn"].__get__
"""What reads `tensor.grad_fn`."""


class GradientFunction:
    """A node of autograd's graph, of which a forward may ask only whether there is one."""

    def __init__(self, node: object) -> None:
        self.__dict__["node"] = node

    def __eq__(self, other: object) -> bool:
        """Whether both are the same node."""
        return isinstance(other, GradientFunction) and self.__dict__["node"] is other.__dict__["node"]

    def __hash__(self) -> int:
        """That of the node."""
        return hash(self.__dict__["node"])

    def __getattr__(self, name: str) -> Any:
        """Refuse: hooks are the common case."""
        raise NotTraceable(
            f"autograd's graph is used here (grad_fn.{name}: a hook on a node, or on the backward pass of a "
            "module), which a captured graph does not hold; use Tensor.register_hook on the value"
        )


@contextmanager
def no_refused_hooks() -> Iterator[None]:
    """Refuse hooks on what autograd saves and on gradients that are accumulated, where a forward sets them."""
    enter, accumulated = saved_tensors_hooks.__enter__, Tensor.register_post_accumulate_grad_hook
    several = graph._get_grad_fn_or_grad_acc

    def refuse_saved(self: saved_tensors_hooks) -> None:
        kind = type(self)
        if kind is saved_tensors_hooks or not kind.__module__.startswith("torch."):  # torch's own only save memory
            raise NotTraceable(
                "hooks on saved tensors are set here (saved_tensors_hooks), which a captured graph does not hold; set "
                "them around the call of the hybrid"
            )
        enter(self)

    def refuse_accumulated(tensor: Tensor, hook: object) -> Any:
        raise NotTraceable(
            "a hook on an accumulated gradient is set here (register_post_accumulate_grad_hook), which a captured "
            "graph does not hold; set it on the parameter, outside of forward"
        )

    def refuse_several(tensor: Any) -> Any:
        raise NotTraceable(
            "a hook on several gradients is set here (register_multi_grad_hook), which a captured graph does not hold; "
            "use Tensor.register_hook on each value"
        )

    graph._get_grad_fn_or_grad_acc = refuse_several  # type: ignore[assignment]
    saved_tensors_hooks.__enter__ = refuse_saved  # type: ignore[method-assign]
    Tensor.register_post_accumulate_grad_hook = refuse_accumulated  # type: ignore[method-assign]
    try:
        yield
    finally:
        graph._get_grad_fn_or_grad_acc = several
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        Tensor.register_post_accumulate_grad_hook = accumulated  # type: ignore[method-assign]
