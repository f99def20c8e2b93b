"""The interface of an energy, which phases, estimators, certificates and reports use.

Every energy of a block has the form

    E(s; θ, x) = Σ_l c_l [ F_l(s_l; θ) − ⟨s_l, d_l(s_1..s_{l−1}, x; θ)⟩ ]

with the drives d_l of the block's program, scales c_l > 0 and a potential F_l of its own. Its stationary points are

    s_l = σ_l(h_l),    h_l = d_l + Σ_{m>l} γ_{l,m} J_{ml}ᵀ s_m ,    γ_{l,m} = c_m/c_l ,    σ_l = (∂F_l)⁻¹ .

An `Energy` is a value without state, so it has no weights and no measurements. A `Setting` is an energy together with
the settings of one block's amplifiers. A `Gauge` measures one block and says how its amplifiers should be set.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.circuit import Circuit
from ffebm_compiler.runtime.energies.followed_norm import Launched
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["Energy", "Evaluated", "Gauge", "Setting"]

Evaluated = Callable[[], tuple[Frame, list[Tensor]]]
"""Evaluates a block once without feedback, for one sample and without random masks. Returns its frame and states."""


class Energy(ABC):
    """An energy of blocks. Subclasses are frozen dataclasses: their options are their fields."""

    name: ClassVar[str]
    """The energy's name in `convert` and in files."""
    amplified: ClassVar[bool]
    """Whether every layer is followed by an amplifier with a gain of its own."""
    default_feedback: ClassVar[float | str]
    """The feedback of a block if none is given."""
    starts_loaded: ClassVar[bool] = False
    """Whether a free phase starts at the energy's own σ_l of the drives, since the source's states are far away."""
    elements: ClassVar[str] = ""
    """What a circuit with this energy is made of, as a phrase; empty if it is that of no circuit."""
    by_loop_gain: ClassVar[bool] = False
    """Whether feedback is set by the loop gain κ, by which a nudge of the outputs moves the other states."""
    bounds_masks: ClassVar[bool] = False
    """Whether the certified contraction holds whatever random masks a forward draws."""
    coherent: ClassVar[bool] = True
    """Whether the errors of all units may have one sign at any weights, as where these are conductances."""
    floating: ClassVar[bool] = False
    """Whether nothing but conductances sets a state, so that units which no source reaches have none of their own."""
    nonnegative: ClassVar[bool] = False
    """Whether weights are conductances themselves, so that none is negative."""

    @abstractmethod
    def check_feedback(self, feedback: object) -> float | str:
        """The checked feedback.

        Raises:
            InputError: this energy has no such feedback.
        """

    @abstractmethod
    def check_program(self, program: BlockProgram) -> None:
        """Refuse a block with feedback that this energy cannot describe.

        Raises:
            UnsupportedError: names the block, the layer, its activation or operator, and what to do.
        """

    @abstractmethod
    def activations(self, frame: Frame, setting: Setting) -> tuple[Activation, ...]:
        """σ_l = (∂F_l)⁻¹ of every layer. It gives the state for a field, with its slope and its stable quotient.

        Args:
            frame: the block's program with its weights, evaluated once so that all shapes are known.
            setting: the settings of the block's amplifiers.
        """

    def diagonals(self, frame: Frame, setting: Setting) -> list[Tensor | None]:
        """D^l of every layer, the conductance by which its field is divided; None for 1, as of every layer here."""
        return [None] * len(frame.program.layers)

    @abstractmethod
    def value(
        self,
        frame: Frame,
        setting: Setting,
        states: Sequence[Tensor],
        preactivations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """E, summed over the batch: a scalar tensor, dimensionless.

        Args:
            frame: the block's program with its inputs and weights.
            setting: the settings of its amplifiers.
            states: s_l, batch first.
            preactivations: h_l with s_l = σ_l(h_l), which is needed if an activation is not monotone.

        Raises:
            UnsupportedError: for a non-monotone activation without pre-activations, and for a block whose feedback has
                weights of its own, which has no energy.
        """

    @abstractmethod
    def add_weight_terms(
        self,
        frame: Frame,
        setting: Setting,
        currents: Sequence[Tensor | None],
        middle: Sequence[Tensor],
        gradients: list[Tensor | None],
        needed: Sequence[bool],
        factor: float = 1.0,
    ) -> None:
        """Add to `gradients` the part of the weight gradient that does not come from the drives.

        This part is −`factor` Σ_l c_l ⟨v_l, ∂_θ ∂F_l(m_l; θ)⟩ with v_l = e_l/c_l. If the terms of F_l with weights are
        quadratic in the state, it is bilinear in the error currents e and the midpoint m.
        """

    @abstractmethod
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
        """Add to `gradients` the gradient of the loss through the amplifiers, which follow the weights.

        It is dL/da da/dθ for every setting a of an amplifier that comes from a measurement.

        Args:
            frame: the block at its equilibrium.
            setting: the settings of its amplifiers.
            feedback: the feedback that they hold.
            measured: the block as it was measured, for one sample and without random masks.
            currents: e_l, the derivative of the loss by h_l.
            middle: s_l, or the midpoint of the compared states.
            gradients: the gradient of each weight; None if there is none yet.
            needed: for each weight, whether its gradient is needed.
        """

    def circuit(self, frame: Frame, setting: Setting) -> Circuit:
        """The circuit whose operating point is the equilibrium of an evaluated block.

        Raises:
            UnsupportedError: this energy is that of no circuit.
        """
        raise UnsupportedError(
            f"{frame.program.name}: its energy, {self.name!r}, is not that of a circuit of resistors and diodes, so "
            "that there is no netlist. Convert the model with energy='resistive'"
        )

    @abstractmethod
    def gauge(self, program: BlockProgram) -> Gauge:
        """The gauge that measures a block with this energy."""

    @abstractmethod
    def contraction(self, program: BlockProgram, certificate: Certificate, feedback: float | str) -> float | None:
        """Factor by which a Gauss–Seidel sweep is certified to contract; None without a certificate."""

    def error_shares(self, program: BlockProgram, certificate: Certificate) -> np.ndarray | None:
        """W with ‖e_l‖ ≤ κ/(1 − κ) Σ_k W_lk ‖Δs_k‖ for the errors e that a forward sweep leaves; None if unknown."""
        return None

    @abstractmethod
    def projection(self, program: BlockProgram, certificate: Certificate, limit: float) -> dict[int, float]:
        """Weight index -> factor in (0, 1). Together they bring the loop gain down to `limit`. Empty if it is lower.

        Raises:
            InputError: an edge between two states holds no weight that could be scaled.
        """

    @abstractmethod
    def describe(self, feedback: float | str, symmetric: bool = True) -> str:
        """The energy and its feedback, as a phrase for a report. `symmetric` is that of the block's program."""

    @abstractmethod
    def remedy(self, feedback: float | str, loop_gain: float) -> str:
        """What to change if a block does not settle, as the end of a sentence."""


@dataclass(frozen=True)
class Setting:
    """The energy of a block and the settings of its amplifiers, constant while it settles and its gradient is taken."""

    energy: Energy
    scales: tuple[float, ...]
    """c_l, with γ_{l,m} = c_m/c_l."""
    amplifiers: tuple[float, ...] = ()
    """A_l, the gain of the amplifier behind each layer; empty if the energy has no amplifiers."""
    coherent: bool = True
    """Whether the errors of all units may have one sign, so that a sweep contracts as it is certified to, and a norm
    behind the block subtracts most of the error currents."""

    @property
    def typical(self) -> float:
        """What a sweep is expected to contract by, in units of what it is certified to: less where slopes vanish."""
        return 1.0 if self.coherent else 0.6  # measured on the networks of tests/networks.py, and of training_step.py

    def activations(self, frame: Frame) -> tuple[Activation, ...]:
        """σ_l of every layer of an evaluated frame."""
        return self.energy.activations(frame, self)


@dataclass(frozen=True)
class Uncertified:
    """A block that is to be certified: evaluated once for one sample, and the feedback to set."""

    gauge: Gauge
    frame: Frame
    states: Sequence[Tensor]
    feedback: float | str


@dataclass(frozen=True)
class Change:
    """A change of the weights in training, after which a block is measured."""

    frame: Frame
    """The block at these weights for one sample, with all shapes known."""
    evaluated: Evaluated
    """Evaluates the block."""
    present: Certificate
    """The certificate before the change."""
    feedback: float | str
    """The feedback to hold."""
    converge: bool
    """Whether to measure to convergence even if the estimate has not jumped."""
    slack: float | None = None
    """Relative distance from the feedback at which the amplifiers are set again; None: the energy's own."""
    read: tuple[Launched, np.ndarray] | None = None
    """What `launch` returned, and its inner products as they were read; None: all is measured now."""


class Gauge(ABC):
    """Measures the loop gain of one block, and finds the settings of its amplifiers for a feedback.

    It keeps vectors that make the next measurement cheap. All methods are called without gradients.
    """

    @abstractmethod
    def certify(self, frame: Frame, states: Sequence[Tensor], feedback: float | str) -> Certificate:
        """Measure to convergence, with the amplifiers set for a feedback."""

    @classmethod
    def certify_each(cls, blocks: Sequence[Uncertified]) -> list[Certificate]:
        """The result of `certify` for each block. All have gauges of this class."""
        return [block.gauge.certify(block.frame, block.states, block.feedback) for block in blocks]

    @abstractmethod
    def at(self, frame: Frame, states: Sequence[Tensor], present: Certificate) -> Certificate:
        """Measure to convergence, with the amplifiers as in `present`."""

    @abstractmethod
    def needed(self, evaluated: Evaluated, present: Certificate, feedback: float | str) -> Certificate | None:
        """The result of `certify`, if it sets the amplifiers otherwise than `present`; else None."""

    @abstractmethod
    def follow(self, change: Change) -> Certificate:
        """Measure after a change of the weights in training, and set the amplifiers again if the feedback needs it."""

    def launch(self, frame: Frame) -> Launched | None:
        """Launch the kernels of the next `follow`, which a CUDA graph may capture; None if that cannot be done apart.

        The kept vectors must have memory of their own then (`own`).
        """
        return None

    def own(self) -> None:
        """Give the kept vectors memory of their own, which captured kernels may read in every later step."""
        return

    def relaunch(self, launched: Launched) -> bool:
        """Prepare what `launch` returned for a replay of its kernels. Returns False if they cannot be used again."""
        return False

    @abstractmethod
    def with_feedback(self, found: Certificate, feedback: float | str) -> Certificate | None:
        """The same measurement with the amplifiers set for another feedback; None if it must be measured again."""

    @abstractmethod
    def with_setting(self, found: Certificate, present: Certificate) -> Certificate | None:
        """The same measurement with the amplifiers of `present`; None if it must be measured again."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Any]]:
        """The kept numbers and tensors of each edge."""

    @abstractmethod
    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the result of `state`."""
