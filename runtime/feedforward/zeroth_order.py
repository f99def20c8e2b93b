"""Zeroth-order gradients of digital parts, with two more forward passes in place of a backward pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.one_derivative import IN_A_PART, refuse_batched, refuse_forward_mode, without_derivative
from ffebm_compiler.runtime.widest import widest

__all__ = ["Perturbed", "PerturbedPart", "ZerothOrder", "directions"]

_PART = "a digital part that is perturbed (zeroth-order)"


@dataclass(frozen=True)
class ZerothOrder:
    """Simultaneous perturbation of a digital part F, without backpropagation through it.

    With the error δ at its outputs, all floating-point inputs s and parameters ω that need a gradient (together t), and
    independent signs z,

        g = 1/n Σ_i z_i ⟨F(t + σ z_i) − F(t − σ z_i), δ⟩ / 2σ ,    i = 1..n.

    Its mean over z is the gradient, up to O(σ²), and its cosine to the gradient is about √(n/dim t). Each evaluation
    has the dropout masks and other random draws of the forward pass, and updates no statistics. The signs follow from
    `seed`, the part, and the number of its calls, so that a run can be repeated and resumed.

    Autograd still differentiates the wiring at a block's outputs (reshapes, sums), and static operations on parameters
    such as a folded batch norm. A block of one layer has its exact gradient, which is local (an outer product).

    Raises:
        InputError: a setting is out of range.

    Sources: Spall 1992 (simultaneous perturbation).
    """

    samples: int = 1
    """n, the number of directions. Each costs two forward passes of the part."""
    sigma: float = 1e-3
    """σ, the size of the perturbation, the same for all entries."""
    seed: int = 0
    name = "zeroth-order"

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise InputError(f"samples is {self.samples!r}; expected a positive integer")
        number = isinstance(self.sigma, float | int) and not isinstance(self.sigma, bool)
        if not number or not 0 < self.sigma < math.inf:
            raise InputError(f"sigma is {self.sigma!r}; expected a positive number such as 1e-3")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InputError(f"seed is {self.seed!r}; expected an integer from 0 to 2**31 - 1")


class PerturbedPart(Protocol):
    """The methods of a digital part that are needed to evaluate it."""

    place: int

    def run(self, *operands: Any) -> Any: ...
    def frozen_statistics(self) -> AbstractContextManager[None]: ...


def directions(settings: ZerothOrder, place: int, call: int, like: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The directions z_1..z_n, signs ±1 for every tensor. They are the same on any device and rank.

    Args:
        settings: the settings with n and the seed.
        place: index of the part in the network.
        call: number of its earlier calls.
        like: the tensors that are perturbed, in the order of the part's operands.
    """
    generator = torch.Generator().manual_seed(((settings.seed << 20) + place) * 1_000_003 + call)
    for _ in range(settings.samples):
        yield [
            (2 * torch.randint(0, 2, t.shape, generator=generator, device="cpu") - 1).to(t.device, t.dtype)
            for t in like
        ]


class Perturbed(torch.autograd.Function):
    """The outputs of a digital part. Backward perturbs its operands."""

    @staticmethod
    def forward(ctx: Any, part: PerturbedPart, settings: ZerothOrder, call: int, *operands: Any) -> tuple[Any, ...]:
        tensors = [value for value in operands if isinstance(value, Tensor)]
        ctx.random = torch.get_rng_state(), get_device_states(*tensors)
        versions = [value._version for value in tensors]
        outputs = part.run(*operands)
        # The part has updated these statistics, and their values no longer matter to it.
        written = [value._version != version for value, version in zip(tensors, versions, strict=True)]
        pairs = list(zip(tensors, written, strict=True))
        ctx.written = [value.detach().clone() if is_new else None for value, is_new in pairs]
        ctx.save_for_backward(*(None if is_new else value for value, is_new in pairs))
        ctx.operands = [None if isinstance(value, Tensor) else value for value in operands]
        ctx.places = [place for place, value in enumerate(operands) if isinstance(value, Tensor)]
        ctx.part, ctx.settings, ctx.call = part, settings, call
        kind = tensors[0].device.type
        ctx.autocast = kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        ctx.set_materialize_grads(False)
        found = outputs if isinstance(outputs, tuple | list) else (outputs,)
        ctx.mark_non_differentiable(
            *(value for value in found if isinstance(value, Tensor) and not value.is_floating_point())
        )
        return tuple(found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> NoReturn:
        refuse_forward_mode(_PART, IN_A_PART)

    @staticmethod
    def backward(ctx: Any, *errors: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_batched(_PART, IN_A_PART, errors)
        with torch.no_grad():
            found = Perturbed._gradients(ctx, *errors)
        graph = torch.is_grad_enabled()
        return without_derivative(_PART, IN_A_PART, found, (*ctx.saved_tensors, *errors)) if graph else found

    @staticmethod
    def _gradients(ctx: Any, *errors: Tensor | None) -> tuple[Tensor | None, ...]:
        operands = list(ctx.operands)
        for place, saved, written in zip(ctx.places, ctx.saved_tensors, ctx.written, strict=True):
            operands[place] = written if saved is None else saved
        needed = ctx.needs_input_grad[3:]
        moved = [
            place
            for place, value in enumerate(operands)
            if isinstance(value, Tensor) and needed[place] and value.is_floating_point()
        ]
        nothing: list[Tensor | None] = [None] * (3 + len(operands))
        if not moved or all(error is None for error in errors):
            return tuple(nothing)
        centre = [operands[place] for place in moved]
        totals = [torch.zeros_like(value) for value in centre]
        settings: ZerothOrder = ctx.settings
        for signs in directions(settings, ctx.part.place, ctx.call, centre):
            change = 0.0
            for side in (1, -1):
                shifted = list(operands)
                for place, value, sign in zip(moved, centre, signs, strict=True):
                    shifted[place] = value.add(sign, alpha=side * settings.sigma)
                change += side * _product(_evaluate_again(ctx, shifted), errors)
            for total, sign in zip(totals, signs, strict=True):
                total.add_(sign, alpha=change / (2 * settings.sigma * settings.samples))
        for place, total in zip(moved, totals, strict=True):
            nothing[3 + place] = total
        return tuple(nothing)


def _evaluate_again(ctx: Any, operands: Sequence[Any]) -> Any:
    """Evaluate the part at other operands, with the random draws of the forward pass and without new statistics."""
    state, (devices, device_states) = ctx.random
    kind, enabled, dtype = ctx.autocast
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices, device_type=_random_kind(kind)))
        torch.set_rng_state(state)
        if devices:
            set_device_states(devices, device_states)
        stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
        stack.enter_context(ctx.part.frozen_statistics())
        outputs = ctx.part.run(*operands)
    return outputs if isinstance(outputs, tuple | list) else (outputs,)


def _random_kind(kind: str) -> str:
    return "cuda" if kind == "cpu" else kind


def _product(outputs: Sequence[Any], errors: Sequence[Tensor | None]) -> float:
    """Σ ⟨F, δ⟩ over the outputs that have an error, in float64."""
    return sum(
        float((value * error).sum(dtype=widest(value)))
        for value, error in zip(outputs, errors, strict=True)
        if error is not None
    )
