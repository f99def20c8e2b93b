"""Resistive energies without amplifiers: circuits whose nodes are the states, `Unamplified` and `DRN`.

With |J_l| the operator of the absolute values of all coefficients of layer l (on states, clamped inputs and wires, but
not on the bias, which is a current source and loads nothing),

    D^l = |J_l| 1 + Σ_{m>l} γ_{l,m} |J_{ml}|ᵀ 1 ,
    E(s; θ, x) = Σ_m c_m [ ½ Σ_ij |J_m|_ij (± source_j − s_i)² − ⟨b_m, s_m⟩ ] .

A state is the mean of its neighbours, weighted by conductances, and moved by the bias and the diodes: s_l =
σ_l(h_l/D^l) with a projection σ_l. D follows the weights, and nothing is set or held. A unit that no conductance
reaches is held at 0, and no gradient moves it. E is convex for every γ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.energies.base import Gauge, Setting
from ffebm_compiler.runtime.energies.conductive import Conductive, checked_gain, gain_of, refuse_activation
from ffebm_compiler.runtime.energies.loads import (
    at_ones,
    loads_of,
    magnitudes_of,
    own_loads,
)
from ffebm_compiler.runtime.energies.row_sums import RowSums
from ffebm_compiler.runtime.program.block_program import BlockProgram, Layer
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["DRN", "GROUNDED", "Unamplified", "grounded"]

_NEAREST = {
    "tanh": "hard tanh",
    "softsign": "hard tanh",
    "sigmoid": "a clamp from 0 to 1",
    "hardsigmoid": "a clamp from 0 to 1",
    "sloped_clamp": "a clamp of slope 1",
    "softshrink": "none, since a threshold needs a current of its own",
    "log_sigmoid": "a clamp with an upper bound of 0",
}
"""The projection that is nearest to an activation, by name; ReLU for all others."""

GROUNDED = math.inf
"""D of a unit that no conductance reaches. Its state does not move, so that its slope and its gradients are 0."""


def grounded(total: Tensor) -> Tensor:
    """D from the conductance of every unit, one that has no reciprocal in the dtype counting as none."""
    return total.masked_fill(total < torch.finfo(total.dtype).tiny, GROUNDED)


class _Passive(Conductive):
    """What both energies share."""

    amplified = False
    starts_loaded = True
    floating = True

    def check_activation(self, program: BlockProgram, layer: Layer) -> None:
        """Admit projections: ReLU, split ReLU and clamps of slope 1."""
        if not layer.activation.projects:
            why = f"is not made by ideal diodes alone, as energy={self.name!r} needs it"
            refuse_activation(program, layer, why, _NEAREST.get(layer.activation.name, "ReLU"))

    def gains(self, frame: Frame) -> tuple[float, ...]:
        """Empty, since there are no amplifiers."""
        return ()

    def diagonals(self, frame: Frame, setting: Setting) -> list[Tensor | None]:
        """|J_l| 1 + Σ_{m>l} γ_{l,m} |J_{ml}|ᵀ 1."""
        magnitudes = magnitudes_of(frame, self.nonnegative)
        found: list[Tensor | None] = []
        for own, load in zip(own_loads(magnitudes), loads_of(magnitudes, setting), strict=True):
            found.append(grounded(own if load is None else own + load))
        return found

    def value(
        self,
        frame: Frame,
        setting: Setting,
        states: Sequence[Tensor],
        preactivations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The sum over all conductances, with ½ Σ |J| x² of the clamped inputs, which no state changes."""
        total = super().value(frame, setting, states, preactivations)
        magnitudes = magnitudes_of(frame, self.nonnegative)
        like = next(weight for weight in magnitudes.weights if weight is not None)
        for index, layer in enumerate(frame.program.layers):
            ones = like.new_ones(magnitudes.shapes[layer.drive])
            for register, part in magnitudes.pullback(index, ones, inputs=True).items():
                total = total + 0.5 * setting.scales[index] * (part * frame.inputs[register] ** 2).sum()
        return total

    def add_own_loads(
        self,
        magnitudes: Frame,
        products: Sequence[Tensor | None],
        found: list[Tensor | None],
        wanted: Sequence[bool],
    ) -> None:
        """A conductance loads the state of its own layer too."""
        ones, states = at_ones(magnitudes)
        for index, product in enumerate(products):
            if product is None:
                continue
            ones.pullback(
                index,
                product,
                registers=ones.operand_registers(index, states),
                gradients=found,
                needed=wanted,
                bias=False,
            )

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
        """Nothing, since γ is constant and there are no other settings."""

    def gauge(self, program: BlockProgram) -> Gauge:
        """A gauge that measures the spectral radius of the whole block."""
        return RowSums(self, program)


@dataclass(frozen=True)
class Unamplified(_Passive):
    """Signed weights on differential lines, without amplifiers behind the layers. `feedback` is γ, a positive number.

    A state is the weighted mean of its neighbours, so that signals shrink from layer to layer. It admits projections as
    activations: ReLU and clamps of slope 1.
    """

    name = "unamplified"
    elements = "resistors on lines ±s, diodes"
    default_feedback = 0.01

    def check_feedback(self, feedback: object) -> float | str:
        """A gain γ > 0, or `"symmetric"`."""
        return checked_gain(feedback, "the feedback gain γ of an unamplified resistive energy")

    def describe(self, feedback: float | str, symmetric: bool = True) -> str:
        """A phrase with γ."""
        return f"resistive energy without amplifiers, γ = {gain_of(feedback):.3g}"

    def remedy(self, feedback: float | str, loop_gain: float) -> str:
        """Advises more sweeps or a smaller γ."""
        return (
            f"its energy is convex, with a loop gain of {loop_gain:.3g} at γ = {gain_of(feedback):.3g}: lower "
            "`feedback`, or allow more sweeps: solver=GaussSeidel(max_sweeps=...)"
        )


@dataclass(frozen=True)
class DRN(_Passive):
    """A deep resistive network: resistors, diodes and sources alone. Weights are conductances g ≥ 0, and γ = 1.

        E = ½ Σ g_ij (s_i − s_j)² − ⟨b, s⟩ ,     ∂E/∂g_ij = ½ (s_i − s_j)²

    Its equilibrium is the operating point of the circuit. Optimizers may not leave a conductance below 0: after every
    step, the hybrid clamps those that they moved. A hidden layer whose units all are at or above 0 passes on one sign
    only, so that such networks read ±x, and their hidden layers are split ReLUs.

    Source: Scellier 2024 (arXiv 2402.11674).
    """

    name = "drn"
    elements = "resistors and diodes alone"
    default_feedback = "symmetric"
    nonnegative = True

    def check_feedback(self, feedback: object) -> float | str:
        """`"symmetric"` alone."""
        if feedback == "symmetric":
            return "symmetric"
        raise InputError(
            f"feedback is {feedback!r}; a deep resistive network (energy='drn') has no amplifiers, so that its gain is "
            "1: leave `feedback` out, or use 'symmetric'. energy='resistive' and 'unamplified' have a gain γ"
        )

    def check_program(self, program: BlockProgram) -> None:
        """Refuse negative coefficients too, which no resistor has."""
        super().check_program(program)
        for layer in program.layers:
            for instruction in layer.instructions:
                if instruction.operator.absolute() != instruction.operator:
                    raise UnsupportedError(
                        f"{program.name}: layer {layer.name!r} subtracts a value or multiplies one by a negative "
                        f"number, and a resistor has no negative conductance. Use "
                        "energy='unamplified' or 'resistive', which have differential lines, or keep the layer digital "
                        f"(force_digital={layer.name!r})"
                    )

    def add_by_magnitudes(
        self, frame: Frame, found: Sequence[Tensor | None], gradients: list[Tensor | None], factor: float
    ) -> None:
        """Add `factor` times the derivatives, since a conductance is its own magnitude."""
        for place, part in enumerate(found):
            present = gradients[place]
            if part is not None:
                gradients[place] = part * factor if present is None else torch.add(present, part, alpha=factor)

    def describe(self, feedback: float | str, symmetric: bool = True) -> str:
        """A phrase."""
        return "deep resistive network of conductances and diodes, γ = 1"

    def remedy(self, feedback: float | str, loop_gain: float) -> str:
        """Advises more sweeps, or more conductance to the inputs."""
        return (
            f"its energy is convex, with a loop gain of {loop_gain:.3g}: allow more sweeps "
            "(solver=GaussSeidel(max_sweeps=...)), or raise the conductances of the first layer"
        )
