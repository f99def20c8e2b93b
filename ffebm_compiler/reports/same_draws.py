"""Same draws: let two runs of a network draw the same random numbers, whatever their precision and their devices.

Of one seed, a float64 tensor gets other numbers than a float32 one, and reads with noise draw in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.passes.unchanged import generators_unchanged

__all__ = ["DrawnIn", "DrawsNoted", "noise_apart"]


class DrawnIn(TorchDispatchMode):
    """Every operation that draws does so in another dtype, and its result is cast to the dtype that was asked for.

    Args:
        dtype: what is drawn in, in the place of `computed`.
        computed: the floating-point dtype of the computation.
    """

    def __init__(self, dtype: torch.dtype, computed: torch.dtype = torch.float64) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype, self.computed = dtype, computed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation. What it would compute without this mode says whether it draws."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _states()
        results = func(*args, **(kwargs or {}))
        if not _have_changed(before):
            return results
        _restore(before)
        given, structure = pytree.tree_flatten((args, kwargs or {}))
        cast = [self._cast(leaf, self.computed, self.dtype) for leaf in given]
        some_args, some_kwargs = pytree.tree_unflatten(cast, structure)
        results = pytree.tree_map(
            lambda leaf: self._cast(leaf, self.dtype, self.computed), func(*some_args, **some_kwargs)
        )
        written = _written(func, args, kwargs or {})
        for before, after in zip(given, cast, strict=True):
            if any(before is each for each in written) and before is not after:
                before.copy_(after)
        in_place = func._schema.name.endswith("_") and written
        return written[0] if in_place else results

    def _cast(self, leaf: Any, before: torch.dtype, after: torch.dtype) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(after) if leaf.dtype is before else leaf
        return after if leaf is before else leaf


class DrawsNoted(TorchDispatchMode):
    """Notes the operations that draw random numbers, by torch's names of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        before = _states()
        results = func(*args, **(kwargs or {}))
        if _have_changed(before):
            self.names.add(func._schema.name.removeprefix("aten::").removesuffix("_"))
        return results


def _states() -> list[Tensor]:
    """The states of torch's generators. An operation that may draw, such as attention with dropout, need not do so."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]


def _have_changed(before: list[Tensor]) -> bool:
    return not all(torch.equal(state, former) for state, former in zip(_states(), before, strict=False))


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes to."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    return [
        named[argument.name]
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write and argument.name in named
    ]


@contextmanager
def noise_apart(hybrid: HybridCore) -> Iterator[None]:
    """Let reads draw their noise from generators of their own, so that all else draws as it does without noise.

    Their seeds follow from the present state of torch's generator, which does not change.
    """
    arrays = [block.arrays for block in hybrid.energy_blocks.values() if block.arrays is not None]
    device = next((parameter.device for parameter in hybrid.parameters()), torch.device("cpu"))
    with generators_unchanged():
        seeds = torch.randint(2**62, (len(arrays),), device="cpu").tolist()
    try:
        for each, seed in zip(arrays, seeds, strict=True):
            each.noise = torch.Generator(device).manual_seed(seed)
        yield
    finally:
        for each in arrays:
            each.noise = None
