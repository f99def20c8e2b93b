"""The gradient through γ: the effect of the weights on the loss through amplifiers that hold the loop gain.

With c_l = g^depth(l) and κ = ρ(A)² held, a weight that moves the norms n of the edges moves g:

    d ln g = −2 Σ_e w_e d ln n_e / Σ_e w_e span_e ,    w_e = ∂ ln ρ/∂ ln a_e = 2 x_l x_m a_e/ρ ,

with x the Perron vector of A and span_e the depths that an edge spans (ln a_e = ½ span_e ln g + ln n_e + a constant).
If the feedback has weights of its own, A is not symmetric and each direction of an edge has a norm. Then w_e =
y_m x_l a_e/(ρ yᵀx) with the left Perron vector y. The loss depends on g by

    dL/d ln g = Σ_e span_e γ_e ⟨e_l, J_{ml}ᵀ s_m⟩ ,

and dn_e = uᵀ dJ_{ml} v with the leading singular pair (u, v) of J_{ml}. So every edge adds a term of rank one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ffebm_compiler.runtime.energies.edge_norms import directions, edge_gain
from ffebm_compiler.runtime.energies.loop_gain import matrix_of, perron_of
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["add_gain_terms", "leading_pair"]

_STEPS = 300
_LEAST = 8


def add_gain_terms(
    frame: Frame,
    scales: Sequence[float],
    measured: Frame,
    currents: Sequence[Tensor | None],
    middle: Sequence[Tensor],
    gradients: list[Tensor | None],
    needed: Sequence[bool],
) -> None:
    """Add dL/dg dg/dθ to `gradients`, with the loop gain held.

    Args:
        frame: the block at its equilibrium.
        scales: c_l.
        measured: the block as it is measured, for one sample and without random masks.
        currents: e_l, the derivative of the loss by h_l.
        middle: s_l, or the midpoint of the compared states.
        gradients: the gradient of each weight; None if there is none yet.
        needed: for each weight, whether its gradient is needed.
    """
    program = frame.program
    slope = _by_log_gain(frame, scales, currents, middle)
    found = []
    for start, end, view in directions(measured):
        pair = leading_pair(view, min(start, end), max(start, end))
        if pair is not None:
            found.append((start, end, view, pair))
    if slope == 0 or not found:
        return
    norms = [(start, end, pair[0] * edge_gain(measured, start, end)) for start, end, _, pair in found]
    matrix = matrix_of(program, norms, scales)
    largest, right, left = perron_of(matrix)
    if not largest > 0:
        return
    both = 2 if program.symmetric else 1  # an edge has one norm for both of its directions
    shares = [
        float(both * left[end] * matrix[end, start] * right[start] / (left @ right) / largest)
        for start, end, _, _ in found
    ]
    spanned = sum(
        share * abs(program.depths[end] - program.depths[start])
        for share, (start, end, _, _) in zip(shares, found, strict=True)
    )
    terms: list[Tensor | None] = [None] * program.weights
    for share, (start, end, view, (sigma, out, into)) in zip(shares, found, strict=True):
        earlier, later = min(start, end), max(start, end)
        by_log_norm = -2 * slope * share / spanned
        slots: list[Tensor | None] = [None] * len(program.layers)
        slots[earlier] = into
        view.pullback(
            later,
            out,
            registers=view.tangent_registers(later, slots, view.program.operand_instructions[later]),
            gradients=terms,
            needed=needed,
            bias=False,
            factor=by_log_norm / sigma,
        )
        for index in (earlier, later):  # the norm of an edge counts √Lip of learned slopes
            activation = measured.activations[index]
            for place, part in zip(program.layers[index].parameters, activation.lipschitz_gradients(), strict=True):
                term = part * (0.5 * by_log_norm / activation.lipschitz)
                present = terms[place]
                terms[place] = term if present is None else present + term
    for place, (term_, need) in enumerate(zip(terms, needed, strict=True)):
        if term_ is not None and need:
            present = gradients[place]
            gradients[place] = term_ if present is None else present + term_.to(present.dtype)


def _by_log_gain(
    frame: Frame, scales: Sequence[float], currents: Sequence[Tensor | None], middle: Sequence[Tensor]
) -> float:
    """dL/d ln g."""
    program, total = frame.program, 0.0
    for later, above in enumerate(program.upstream):
        reached = [earlier for earlier in above if currents[earlier] is not None]
        parts = frame.back.pullback(later, middle[later], states=True) if reached else {}
        for earlier in reached:
            current, part = currents[earlier], parts.get(program.layers[earlier].state)
            if current is not None and part is not None:
                span = program.depths[later] - program.depths[earlier]
                product = (current * part).sum(dtype=torch.promote_types(part.dtype, torch.float32))
                total += span * scales[later] / scales[earlier] * float(product)
    return total


def leading_pair(frame: Frame, earlier: int, later: int) -> tuple[float, Tensor, Tensor] | None:
    """(σ, u, v) of J_{ml} with J v = σ u, by Golub–Kahan–Lanczos with full reorthogonalisation; None if J is zero.

    It stops where ‖Jᵀu − σ v‖ is below 1e-5 σ (1e-11 σ in float64).
    """
    program = frame.program
    state, inner = program.layers[earlier].state, frame.shapes[program.layers[earlier].state]
    like = next(weight for weight in frame.weights if weight is not None and weight.is_floating_point())
    goal = 1e-11 if like.dtype == torch.float64 else 1e-5
    start = torch.randn(inner, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(like)
    slots: list[Tensor | None] = [None] * len(program.layers)
    rights = [(start / torch.linalg.vector_norm(start)).reshape(-1)]
    lefts: list[Tensor] = []
    diagonal: list[float] = []
    above: list[float] = []
    outer = inner
    for step in range(1, _STEPS + 1):
        slots[earlier] = rights[-1].reshape(inner)
        image = frame.tangent(later, slots)
        if image is None:
            return None
        outer = image.shape
        left = _orthogonal(image.reshape(-1), lefts)
        alpha = float(torch.linalg.vector_norm(left))
        if alpha <= 1e-30 or (diagonal and alpha <= 1e-14 * diagonal[0]):
            break  # the images of the right vectors lie in the span of the left ones, so B has one more column
        lefts.append(left / alpha)
        diagonal.append(alpha)
        back = frame.pullback(later, lefts[-1].reshape(outer), states=True)[state].reshape(-1)
        right = _orthogonal(back - alpha * rights[-1], rights)
        beta = float(torch.linalg.vector_norm(right))
        vectors, values, _ = np.linalg.svd(_bidiagonal(diagonal, above))
        rested = beta * abs(vectors[-1, 0]) <= goal * values[0] and step >= min(_LEAST, inner.numel())
        if rested or beta <= 1e-14 * values[0] or step == _STEPS:
            break
        above.append(beta)
        rights.append(right / beta)
    if not diagonal:
        return None
    vectors, values, others = np.linalg.svd(_bidiagonal(diagonal, above))
    left = torch.from_numpy(vectors[:, 0].copy()).to(like) @ torch.stack(lefts)
    right = torch.from_numpy(others[0].copy()).to(like) @ torch.stack(rights)
    return float(values[0]), left.reshape(outer), right.reshape(inner)


def _bidiagonal(diagonal: Sequence[float], above: Sequence[float]) -> np.ndarray:
    """B with J V = U B. It is square, or has one more column than rows."""
    matrix = np.zeros((len(diagonal), max(len(diagonal), len(above) + 1)))
    for index, value in enumerate(diagonal):
        matrix[index, index] = value
    for index, value in enumerate(above):
        matrix[index, index + 1] = value
    return matrix


def _orthogonal(vector: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """A vector without its part in the span of orthonormal ones. It is removed twice because of round-off."""
    if not basis:
        return vector
    rows = torch.stack(list(basis))
    for _ in range(2):
        vector = vector - (rows @ vector) @ rows
    return vector
