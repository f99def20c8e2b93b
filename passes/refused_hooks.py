"""Refused hooks: refuse hooks in autograd's graph other than `Tensor.register_hook`, with the line that sets them.

Hooks on autograd's nodes, on several gradients, on accumulated gradients and on saved tensors belong to the
graph that the source builds at every call. The hybrid builds another graph, which does not have those nodes.

Promise: a forward that is traced sets no such hook. torch is left as it was found.
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
"""The function that torch calls to read `tensor.grad_fn`."""


class GradientFunction:
    """Stands for a node of autograd's graph. A forward may only ask whether there is one."""

    def __init__(self, node: object) -> None:
        self.__dict__["node"] = node

    def __eq__(self, other: object) -> bool:
        """Whether both are the same node."""
        return isinstance(other, GradientFunction) and self.__dict__["node"] is other.__dict__["node"]

    def __hash__(self) -> int:
        """The hash of the node."""
        return hash(self.__dict__["node"])

    def __getattr__(self, name: str) -> Any:
        """Refuse to read an attribute; most often a forward reads one to set a hook."""
        raise NotTraceable(
            f"autograd's graph is used here (grad_fn.{name}, as for a hook on a node or on the backward pass of a "
            "module), which a captured graph does not hold; use Tensor.register_hook on the value"
        )


@contextmanager
def no_refused_hooks() -> Iterator[None]:
    """While the context is open, refuse hooks on saved tensors, on accumulated gradients and on several gradients."""
    enter, accumulated = saved_tensors_hooks.__enter__, Tensor.register_post_accumulate_grad_hook
    several = graph._get_grad_fn_or_grad_acc

    def refuse_saved(self: saved_tensors_hooks) -> None:
        kind = type(self)
        if kind is saved_tensors_hooks or not kind.__module__.startswith(
            "torch."
        ):  # torch's subclasses change no value
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
