"""Terms for the loss that bring the vector field of a block with feedback weights closer to that of an energy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.plain_numbers import plain

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts
    from ffebm_compiler.runtime.phases.error_phases import AdjointPhase

__all__ = ["alignment_penalty", "jacobian_homeostasis"]


def alignment_penalty(hybrid: HybridParts) -> Tensor:
    """½ Σ ‖W − B‖² over all weights with feedback weights of their own, a scalar to add to the loss.

    Its gradient is W − B for W and B − W for B. It is zero if the feedback is tied.

    Raises:
        InputError: `hybrid` is no hybrid.
    """
    total: Tensor | None = None
    names = getattr(hybrid, "feedback_names", None)
    if names is None:
        raise InputError(f"a hybrid is expected, as ffebm.convert returns it, got a {type(hybrid).__name__}")
    for name, place in names.items():
        term = 0.5 * (hybrid.weight_at(place) - hybrid._tensor(name)).square().sum()
        total = term if total is None else total + term
    return torch.zeros((), device="cpu") if total is None else total


def jacobian_homeostasis(hybrid: HybridParts, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """‖J − Jᵀ‖²_F of the blocks' fields at the states of the last forward, estimated with noise, to add to the loss.

        ‖J − Jᵀ‖²_F = 2 E[ ‖Jε‖² − εᵀJ²ε ],     ε standard normal,
        J_{lk} = √(σ_l' σ_k') √(c_l/c_k) W_{lk}   (k before l),
        J_{lm} = √(σ_l' σ_m') √(c_m/c_l) B_{ml}ᵀ   (m after l).

    J is similar to the Jacobian of the update s ← σ(h(s)), in coordinates in which it is symmetric if B = W. The
    result is a scalar tensor, averaged over the batch and summed over the blocks. It is differentiable with respect to
    W and B, at fixed slopes σ'. It is 0 if the feedback is tied. A single draw may be negative, but not the mean.

    Args:
        hybrid: the hybrid, after a forward.
        samples: number of independent noise vectors for each sample of the batch.
        generator: generator of the noise; torch's default one if it is left out.

    Raises:
        InputError: `samples` is below one, there was no forward yet, or `hybrid` is no hybrid.
        UnsupportedError: an activation is not monotone, so that its slopes have no real root.

    Source: Laborieux & Zenke 2023 (arXiv 2309.02214).
    """
    blocks = getattr(hybrid, "energy_blocks", None)
    if blocks is None:
        raise InputError(f"a hybrid is expected, as ffebm.convert returns it, got a {type(hybrid).__name__}")
    samples = plain(samples)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InputError(f"samples is {samples!r}; expected a number of noise vectors of at least 1")
    total: Tensor | None = None
    for name, block in blocks.items():
        if block.program.symmetric:
            continue
        if not block.program.monotone:
            curved = next(layer for layer in block.program.layers if not layer.activation.monotone)
            raise UnsupportedError(
                f"{name}: the activation {curved.activation.name} of layer {curved.name} is not monotone, so that its "
                "slopes have no real root and the Jacobian no symmetric form. Use a monotone one, or "
                "ffebm.alignment_penalty"
            )
        response = block.response(hybrid.operands_of(name)[1])
        if response is None:
            raise InputError(f"{name} has no states yet: call the hybrid before jacobian_homeostasis")
        for _ in range(samples):
            noise = [_drawn_like(slope, generator) for slope in response.slopes]
            moved = _product(response, noise)
            again = _product(response, moved)
            batch = noise[0].shape[0] if block.program.batched else 1
            for epsilon, first, second in zip(noise, moved, again, strict=True):
                term = 2 * (first.square().sum() - (epsilon * second).sum()) / (batch * samples)
                total = term if total is None else total + term
    return torch.zeros((), device="cpu") if total is None else total


def _drawn_like(value: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise, drawn where its generator is."""
    device = value.device if generator is None else generator.device
    return torch.randn(value.shape, generator=generator, dtype=value.dtype, device=device).to(value.device)


def _product(response: AdjointPhase, values: list[Tensor]) -> list[Tensor]:
    """J x, which is (σ'/c)^½ times the response to u = (c σ')^½ x."""
    roots = [torch.sqrt(slope) for slope in response.slopes]
    for index, (root, value, scale) in enumerate(zip(roots, values, response.scales, strict=True)):
        response.store(index, root * value * scale**0.5)
    forces = [response.force(index) for index in range(len(values))]
    return [
        torch.zeros_like(root) if force is None else root * force / scale**0.5
        for root, force, scale in zip(roots, forces, response.scales, strict=True)
    ]
