"""Initialisation: weights drawn for energy blocks, and blocks scaled to a given loop gain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.bound_block import BoundBlock
from ffebm_compiler.errors import InputError
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.plain_numbers import plain

__all__ = ["conductances_", "goe_", "scale_to_loop_gain"]

_CLOSE = 1e-3
"""Allowed relative distance from the loop gain that is asked for, which is the precision of its measurement."""
_STEPS = 60


def goe_(weight: Tensor, variance: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with matrices of the Gaussian orthogonal ensemble: symmetric, with independent normal entries.

        M = Mᵀ of size k×k,   var M_ij = V/k for i ≠ j,   var M_ii = 2V/k

    The k×k kernel of every pair of channels of a 2-D convolution (of shape (out, in/groups, k, k)) is one such matrix,
    and so is the whole weight of a linear layer (of shape (out, in)). One that is not square is a corner of a matrix of
    size k = max(out, in).

    Args:
        weight: of two or four dimensions; filled in place.
        variance: V, positive. The published networks have 8.4e-5 (6 layers), 5.9e-5 (12), 4.9e-5 (15).
        generator: the random generator; torch's default one if it is left out.

    Returns:
        The weight.

    Raises:
        InputError: the weight has another number of dimensions, kernels that are not square, or integers, or the
            variance is not a positive number.

    Source: the initialisation of Nest & Ernoult 2024 (arXiv 2409.03306).
    """
    if not isinstance(weight, Tensor) or weight.dim() not in (2, 4) or not weight.is_floating_point():
        given = (
            f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        )
        raise InputError(
            f"weight is {given}; expected the floating-point weight of a linear layer, of shape (out, in), or of a 2-D "
            "convolution, of shape (out, in, k, k)"
        )
    rows, cols = weight.shape[-2:]
    if weight.dim() == 4 and rows != cols:
        raise InputError(
            f"weight has kernels of {rows}×{cols}, and a matrix of the Gaussian orthogonal ensemble is symmetric: give "
            "the layer a square kernel, or use torch.nn.init.normal_"
        )
    variance = plain(variance)
    number = isinstance(variance, int | float) and not isinstance(variance, bool)
    if not number or not 0 < variance < math.inf:
        raise InputError(f"variance is {variance!r}; expected a positive number, such as 8.4e-5")
    size = max(rows, cols)
    with torch.no_grad():
        device = weight.device if generator is None else generator.device
        drawn = torch.empty((*weight.shape[:-2], size, size), dtype=weight.dtype, device=device)
        drawn.normal_(0.0, math.sqrt(variance / (2 * size)) if size else 0.0, generator=generator)
        # (N + Nᵀ)_ij has twice the variance of N_ij, and four times on the diagonal.
        return weight.copy_((drawn + drawn.mT)[..., :rows, :cols])


def conductances_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill a weight with the conductances that a deep resistive network starts from, g = max(U, 0).

    U is uniform between −1/√n and 1/√n with n the inputs of a unit (in/groups times the size of a kernel), so that
    about half of the conductances are 0.

    Args:
        weight: of two or more dimensions, of shape (out, in, ...); filled in place.
        generator: the random generator; torch's default one if it is left out.

    Returns:
        The weight.

    Raises:
        InputError: the weight has another number of dimensions, or integers.

    Source: the initialisation of Scellier 2024 (arXiv 2402.11674).
    """
    if not isinstance(weight, Tensor) or weight.dim() < 2 or not weight.is_floating_point():
        given = (
            f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        )
        raise InputError(
            f"weight is {given}; expected the floating-point weight of a linear layer, of shape (out, in), or of a "
            "convolution, of shape (out, in, ...)"
        )
    bound = 1 / math.sqrt(max(weight[0].numel() if len(weight) else 1, 1))
    with torch.no_grad():
        return weight.uniform_(-bound, bound, generator=generator).clamp_(min=0)


def scale_to_loop_gain(blocks: HybridCore | BoundBlock, loop_gain: float) -> Mapping[str, float]:
    """Multiply the weights between the states of a block by one factor f, so that its loop gain is κ.

    The loop gain is the certificate's, at the present setting of the block's amplifiers. At γ = 1 it is ρ(A)². If
    states are coupled by weights alone, A is homogeneous in the weights and κ(f) = f² κ(1). Wires, such as a residual
    add, are not scaled, and f is then found by measuring. Weights of the block's inputs and biases stay as they are.

    Args:
        blocks: a hybrid, for all its blocks of more than one layer, or one of `hybrid.blocks`.
        loop_gain: κ > 0. Below 1 the block is certain to settle.

    Returns:
        Block name -> f. Blocks without feedback are left out.

    Raises:
        InputError: wires alone have a larger loop gain, the weights are zero, two of the blocks share a weight, or a
            block's loop gain does not follow its weights. The last happens while `feedback` holds the loop gain. Then
            scale a hybrid with `feedback="symmetric"`, or within `hybrid.held_feedback()`.
    """
    loop_gain = plain(loop_gain)
    number = isinstance(loop_gain, int | float) and not isinstance(loop_gain, bool)
    if not number or not 0 < loop_gain < math.inf:
        raise InputError(f"loop_gain is {loop_gain!r}; expected a positive number, below 1 to be certain to settle")
    if isinstance(blocks, BoundBlock):
        hybrid: Any = blocks._hybrid
        names = [blocks.name]
        if not blocks.module.program.coupled:
            raise InputError(f"{blocks.name} has no feedback, since no state of it feeds another: nothing to scale")
    elif isinstance(blocks, HybridCore):
        hybrid = blocks
        names = [block.name for block in blocks.blocks if block.module.program.coupled]
    else:
        raise InputError(f"blocks is a {type(blocks).__name__}; expected a hybrid or one of its blocks")
    found = {name: _coupling(hybrid, name) for name in names}
    owner: dict[int, str] = {}
    for name, weights in found.items():
        for weight in weights:
            other = owner.setdefault(id(weight), name)
            if other != name:
                raise InputError(
                    f"{other} and {name} share a weight of shape {tuple(weight.shape)}, so that one factor would "
                    "change the loop gain of both: scale one of them alone, with hybrid.blocks[i]"
                )
    return {name: _scaled(hybrid, name, weights, float(loop_gain)) for name, weights in found.items()}


def _coupling(hybrid: Any, name: str) -> list[Tensor]:
    """The parameters behind the weights that multiply states of a block, or values computed from them."""
    program = hybrid._energy[name].program
    indices = {*program.coupling_weights, *program.back.coupling_weights}
    return list({id(p): p for p in (hybrid._parameter_behind(name, index) for index in sorted(indices))}.values())


def _scaled(hybrid: Any, name: str, weights: list[Tensor], goal: float) -> float:
    """Scale the weights of one block and return the factor. If that fails, they stay as they were."""
    gain = hybrid._energy[name].gain
    before = [weight.detach().clone() for weight in weights]

    def measured(factor: float) -> float:
        with torch.no_grad():
            for weight, first in zip(weights, before, strict=True):
                weight.copy_(first * factor)
        if gain.locked:  # the amplifiers stay as they are
            return float(hybrid.certificate_of(name).loop_gain)
        hybrid._recertify(name)
        return float(gain.loop_gain)

    factor, low, high = 1.0, 0.0, math.inf
    found = first = measured(factor)
    for _ in range(_STEPS):
        if abs(found / goal - 1) <= _CLOSE:
            return factor
        low, high = (factor, high) if found < goal else (low, factor)
        factor *= min(max(math.sqrt(goal / found), 1e-2), 1e2) if found > 0 else 1e2
        if not low < factor < high:
            factor = math.sqrt(low * high) if low > 0 else high / 10
        if not 1e-12 < factor < 1e12:
            break
        found = measured(factor)
        if found == first > 0:
            break
    held = found == first > 0
    measured(1.0)
    if held:
        raise InputError(
            f"the loop gain of {name} does not follow its weights, since feedback={gain.feedback!r} holds it at "
            f"{first:.3g}: call hybrid.set_feedback({goal:g}), or scale it after hybrid.set_feedback('symmetric') or "
            "within hybrid.held_feedback()"
        )
    raise InputError(
        f"no factor on the weights between the states of {name} gives it a loop gain of {goal:g} (it was {first:.3g}, "
        f"and {found:.3g} at a factor of {factor:.1e}): its weights are zero, or a coupling without a weight, such as "
        "a residual add, has a larger one by itself"
    )
