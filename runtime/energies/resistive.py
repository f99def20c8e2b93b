"""The resistive energy of a block, with amplifiers: conductances load what they connect.

Signed weights sit on differential lines, and an amplifier of gain A_m follows every layer. With |J_m| the operator of
the absolute values of all coefficients of layer m,

    A_m = max_i (|J_m| 1)_i   over all inputs of layer m (states, clamped inputs and wires, but not the bias),
    D^l = 1 + Σ_{m>l} γ_{l,m} A_m |J_{ml}|ᵀ 1 ,
    E(s; θ, x) = Σ_l c_l [ G_l(s_l) + ½ ⟨D^l − 1, s_l²⟩ − ⟨s_l, d_l(s_1..s_{l−1}, x; θ)⟩ ] .

A state solves ∂G_l(s) + (D^l − 1) s ∋ h_l, and `Loaded` solves that exactly. E is a sum of squares

    c_m |w| A_m ½ (s_source ∓ s_m/A_m)²   and   c_m ½ (1 − row sum/A_m) s_m² + c_m (G_m(s_m) − ½ s_m²)

(for slopes of at most 1). So it is convex and has one minimum for every γ, as long as no A_m is below its row
sum. Otherwise the conductance from a node to ground, A_m − row sum, would be negative. γ and A are settings of the
amplifiers. They are held while a gradient is taken. Whenever γ is measured and set again, A is too.

Sources: Scellier 2024 (arXiv 2402.11674) for the network of resistors and diodes; Kendall et al. 2020
(arXiv 2006.01981) for amplifiers between layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ffebm_compiler.runtime.energies.base import Gauge, Setting
from ffebm_compiler.runtime.energies.conductive import Conductive, checked_gain, gain_of, refuse_activation
from ffebm_compiler.runtime.energies.loads import (
    add_row_sum_gradients,
    loads_of,
    magnitudes_of,
    multiplying_weights,
    over_samples,
    row_sums_of,
)
from ffebm_compiler.runtime.energies.row_sums import RowSums
from ffebm_compiler.runtime.program.block_program import BlockProgram, Layer
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["Resistive"]


_NEAREST = {
    "gelu": "ReLU",
    "quick_gelu": "ReLU",
    "silu": "ReLU",
    "mish": "ReLU",
    "hardswish": "ReLU",
    "softplus": "ReLU",
    "elu": "leaky ReLU",
    "selu": "leaky ReLU",
    "celu": "leaky ReLU",
    "prelu": "leaky ReLU with a slope from 0 to 1",
    "leaky_relu": "leaky ReLU with a slope from 0 to 1",
    "tanh": "hard tanh",
    "softsign": "hard tanh",
    "sigmoid": "hard sigmoid",
    "log_sigmoid": "clamp with an upper bound of 0",
    "sloped_clamp": "clamp with a slope from 0 to 1",
}
"""The activation of straight lines that is nearest to one that no diode makes, by name."""


@dataclass(frozen=True)
class Resistive(Conductive):
    """Σ_l c_l [G_l(s_l) + ½⟨D^l − 1, s_l²⟩ − ⟨s_l, d_l⟩]. `feedback` is γ itself, a positive number.

    `"symmetric"` is γ = 1. Blocks with feedback hold every operator except max pooling, and
    activations of straight lines.
    """

    name = "resistive"
    amplified = True
    elements = "resistors on lines ±s, diodes, amplifiers"
    default_feedback = 0.01

    def check_feedback(self, feedback: object) -> float | str:
        """A gain γ > 0, or `"symmetric"`."""
        return checked_gain(feedback, "the gain γ of the amplifiers of a resistive energy")

    def check_activation(self, program: BlockProgram, layer: Layer) -> None:
        """Admit piecewise linear activations with slopes from 0 to 1."""
        activation = layer.activation
        if not activation.monotone or (activation.lines is None and not activation.cone):
            why = "is not made of rising straight lines"
        elif activation.lipschitz > 1:
            why = f"has a slope of {activation.lipschitz:.3g} and not one from 0 to 1"
        else:
            return
        nearest = _NEAREST.get(activation.name, "ReLU, leaky ReLU, clamp, hard tanh, hard sigmoid or softshrink")
        refuse_activation(program, layer, f"{why}, as diodes and resistors make them", nearest)

    def diagonals(self, frame: Frame, setting: Setting) -> list[Tensor | None]:
        """1 + Σ_{m>l} γ_{l,m} A_m |J_{ml}|ᵀ 1."""
        return [None if load is None else 1 + load for load in loads_of(magnitudes_of(frame), setting)]

    def gains(self, frame: Frame) -> tuple[float, ...]:
        """The largest row sum of every layer."""
        return row_sums_of(frame)

    def add_amplifier_terms(
        self,
        frame: Frame,
        setting: Setting,
        feedback: float | str,
        measured: Frame,
        currents: Sequence[Tensor | None],
        middle: Sequence[Tensor],
        gradients: list[Tensor | None],
        needed: Sequence[bool],
    ) -> None:
        """Through A_m, a layer's largest row sum: dL/dA_m = −Σ_l γ_{l,m} ⟨e_l, m_l ∘ |J_{ml}|ᵀ 1⟩; γ is constant."""
        program, magnitudes = frame.program, magnitudes_of(frame)
        products = [
            None if e is None else over_samples(e * m, magnitudes) for e, m in zip(currents, middle, strict=True)
        ]
        wanted = [need and place in multiplying_weights(program) for place, need in enumerate(needed)]
        found: list[Tensor | None] = [None] * program.weights
        for index in range(len(program.layers)):
            ratio, deviations = magnitudes.deviations(index, products, setting.scales)
            image = magnitudes.tangent(index, deviations)
            if image is not None:
                add_row_sum_gradients(measured, index, -ratio * float(image.sum()), found, wanted)
        self.add_by_magnitudes(frame, found, gradients, 1.0)

    def gauge(self, program: BlockProgram) -> Gauge:
        """A gauge that measures row sums and the spectral radius of the whole block."""
        return RowSums(self, program)

    def describe(self, feedback: float | str, symmetric: bool = True) -> str:
        """A phrase with γ."""
        return f"resistive energy with amplifiers, γ = {gain_of(feedback):.3g}"

    def remedy(self, feedback: float | str, loop_gain: float) -> str:
        """Advises more sweeps, a smaller γ, or amplifiers that fit the weights."""
        return (
            f"its energy is convex, with a loop gain of {loop_gain:.3g} at γ = {gain_of(feedback):.3g}: lower "
            "`feedback`, call hybrid.recertify() if the weights have changed since (evaluation leaves the amplifiers "
            "as they are), or allow more sweeps: solver=GaussSeidel(max_sweeps=...)"
        )
