"""Forward gradients: refuse `torch.func.jvp` and dual numbers inside a forward.

The exporter records the numbers of their levels, which no later call has.

Promise: torch's functions are as before when the context ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch._functorch.eager_transforms as eager_transforms
import torch.autograd.forward_ad as forward_ad

from ffebm_compiler.passes.explain_capture import NotTraceable

__all__ = ["no_forward_gradients"]


@contextlib.contextmanager
def no_forward_gradients() -> Iterator[None]:
    """Refuse a forward that computes a directional derivative."""
    places: tuple[tuple[Any, str], ...] = (
        (eager_transforms, "jvp_increment_nesting"),
        (forward_ad, "enter_dual_level"),
    )
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, _refused)
        yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


def _refused(*args: Any, **kwargs: Any) -> Any:
    raise NotTraceable(
        "a directional derivative is taken inside the forward (torch.func.jvp, jacfwd or dual numbers), which a graph "
        "does not hold; convert the submodules whose derivative it takes, and take it outside"
    )
