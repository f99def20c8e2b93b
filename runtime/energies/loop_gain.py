"""Loop gain: decide whether a block has a unique equilibrium, and how strong its feedback may be.

For an edge from the state of layer l to the drive of a later layer m, with operator norm
‖J_{ml}‖ and γ_{l,m} = c_m/c_l,

    a_{lm} = √γ_{l,m} · ‖J_{ml}‖₂ · √(Lip σ_l · Lip σ_m)

is one entry of a symmetric matrix A with zero diagonal. ρ(A) < 1 certifies a unique equilibrium
and linear convergence (in the norm weighted by c/Lip the update is a contraction with factor ρ).
κ = ρ² is the *loop gain*. `feedback=κ` picks c_l = g^{depth(l)} with the one g for which ρ² = κ.

If the feedback has weights of its own, the entry a_{ml}, from the state of l into the field of m, has the norm of
the forward weights, and a_{lm} has the norm of the feedback weights. A is then not symmetric. ρ(A) < 1 still certifies
the same, in the norm weighted by the Perron vector of A.

`edge_norms.py` measures the norms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.program.block_program import BlockProgram

__all__ = [
    "certificate_at",
    "certify",
    "error_shares",
    "gain_for",
    "matrix_of",
    "perron_of",
    "radius",
    "scales_for",
]


def matrix_of(program: BlockProgram, norms: Sequence[tuple[int, int, float]], scales: Sequence[float]) -> np.ndarray:
    """A; entry (m, k) is of the map from k to m."""
    matrix = np.zeros((len(program.layers), len(program.layers)))
    for start, end, norm in norms:
        lips = program.layers[start].activation.lipschitz * program.layers[end].activation.lipschitz
        gain = math.sqrt(scales[max(start, end)] / scales[min(start, end)] * lips) * norm
        matrix[end, start] = gain
        if program.symmetric:
            matrix[start, end] = gain
    return matrix


def perron_of(matrix: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """ρ of a matrix without negative entries, and its right and left vectors, none of them negative."""
    if np.array_equal(matrix, matrix.T):
        values, vectors = np.linalg.eigh(matrix)
        vector = np.abs(vectors[:, -1])
        return float(values[-1]), vector, vector
    sides = []
    for side in (matrix, matrix.T):
        found, columns = np.linalg.eig(side)
        place = int(np.argmax(found.real))
        sides.append((float(found[place].real), np.abs(columns[:, place])))
    return sides[0][0], sides[0][1], sides[1][1]


def radius(program: BlockProgram, norms: Sequence[tuple[int, int, float]], scales: Sequence[float]) -> float:
    """ρ(A) for edge norms and scales."""
    matrix = matrix_of(program, norms, scales)
    if not np.isfinite(matrix).all():
        return math.inf
    if not matrix.size:
        return 0.0
    return float(np.abs(np.linalg.eigvalsh(matrix) if program.symmetric else np.linalg.eigvals(matrix)).max())


def scales_for(program: BlockProgram, gain: float) -> tuple[float, ...]:
    """c_l = g^{depth(l) − depth of the deepest layer}."""
    deepest = max(program.depths, default=0)
    return tuple(gain ** (depth - deepest) for depth in program.depths)


def gain_for(program: BlockProgram, norms: Sequence[tuple[int, int, float]], loop_gain: float) -> float:
    """The g for which ρ(A)² = κ, or 1 if there is no feedback.

    ln ρ² is convex in ln g (Kingman 1961). Its slope is yᵀ(S ∘ A)x / ρ yᵀx for the right and left Perron vectors x and
    y, and the depths S that the edges span. So Newton's method finds g in a few steps, or in one step if every edge
    spans one layer.
    """
    if not any(norm > 0 for _, _, norm in norms) or not all(math.isfinite(norm) for _, _, norm in norms):
        return 1.0
    depths = np.array(program.depths, dtype=float)
    spans = np.abs(depths[:, None] - depths[None, :])
    place = 0.0
    for _ in range(100):
        matrix = matrix_of(program, norms, scales_for(program, math.exp(place)))
        largest, right, left = perron_of(matrix)
        slope = float(left @ (spans * matrix) @ right / (left @ right) / largest) if largest > 0 else 0.0
        if not slope > 0:  # every loop is broken: feedback weights of zero
            return 1.0
        step = (2 * math.log(largest) - math.log(loop_gain)) / slope
        # A long step towards smaller g may leave the range of floats.
        place -= max(-20.0, min(step, 20.0))
        if abs(step) < 1e-13:
            break
    return math.exp(place)


def certificate_at(
    program: BlockProgram, norms: Sequence[tuple[int, int, float]], scales: Sequence[float], coherent: bool = False
) -> Certificate:
    """The certificate of edge norms at given scales. `coherent` is what `EdgeNorms.coherent` says."""
    matrix = matrix_of(program, norms, scales)
    largest = radius(program, norms, scales)
    return Certificate(tuple(norms), tuple(scales), largest, _sweep_radius(matrix, largest), coherent=coherent)


def _sweep_radius(matrix: np.ndarray, largest: float) -> float:
    """ρ((1 − L)⁻¹U), or ρ((1 − U)⁻¹L) for backward sweeps. It is ρ² unless edges close cycles of odd length."""
    if len(matrix) <= 2 or not math.isfinite(largest) or largest >= 1:
        return largest**2
    lower, upper = np.tril(matrix, -1), np.triu(matrix, 1)
    pairs = [(lower, upper)] if np.array_equal(lower, upper.T) else [(lower, upper), (upper, lower)]
    found = max(
        float(np.abs(np.linalg.eigvals(np.linalg.solve(np.eye(len(matrix)) - new, old))).max()) for new, old in pairs
    )
    return max(largest**2, found) if found > largest**2 * (1 + 1e-9) else largest**2


def error_shares(program: BlockProgram, certificate: Certificate) -> np.ndarray | None:
    """W with ‖e_l‖ ≤ κ/(1 − κ) Σ_k W_lk ‖Δs_k‖, the errors that a forward sweep leaves by the changes that it made.

    With A = L + U and M = (1 − L)⁻¹U in the norms n_l = √(c_l/Lip σ_l) ‖·‖, the changes of the next sweep are at most
    M times those of this one, and all that follow sum up to M (1 − M)⁻¹. κ is the contraction ρ(M). None if ρ(M) ≥ 1,
    or if an activation has a learned slope, since Lip σ_l is then not the program's.
    """
    matrix = matrix_of(program, certificate.norms, certificate.scales)
    rate = certificate.contraction
    learned = any(layer.parameters for layer in program.layers)
    if learned or not len(matrix) or not 0 < rate < 1 or not np.isfinite(matrix).all():
        return None
    summed = _summed_sweeps(matrix)
    pairs = zip(certificate.scales, program.layers, strict=True)
    weights = [math.sqrt(scale / layer.activation.lipschitz) for scale, layer in pairs]
    bound = summed * np.outer(1 / np.array(weights), weights)
    return bound * (1 - rate) / rate if np.isfinite(bound).all() and (bound >= 0).all() else None


def _summed_sweeps(matrix: np.ndarray) -> np.ndarray:
    """M (1 − M)⁻¹ with M = (1 − L)⁻¹U. Two layers, which train by the thousand steps, need no library for it."""
    if len(matrix) == 2:
        up, product = float(matrix[0, 1]), float(matrix[0, 1] * matrix[1, 0])
        return np.array([[0.0, up], [0.0, product]]) / (1 - product)
    one = np.eye(len(matrix))
    sweep: np.ndarray = np.linalg.solve(one - np.tril(matrix, -1), np.triu(matrix, 1))
    return sweep @ np.linalg.inv(one - sweep)


def certify(
    program: BlockProgram, norms: Sequence[tuple[int, int, float]], feedback: float | str, coherent: bool = False
) -> Certificate:
    """Scales and spectral radius for a loop gain κ, or for `"symmetric"` (γ = 1)."""
    gain = 1.0 if isinstance(feedback, str) else gain_for(program, norms, feedback)
    return certificate_at(program, norms, scales_for(program, gain), coherent)
