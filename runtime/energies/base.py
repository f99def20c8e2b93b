"""What an energy is: the answers that phases, estimators, certificates and reports ask for.

Every energy of a block has the form

    E(s; θ, x) = Σ_l c_l [ F_l(s_l; θ) − ⟨s_l, d_l(s_1..s_{l−1}, x; θ)⟩ ]

with the drives d_l of the block's program, scales c_l > 0 and a potential F_l of its own. Its stationary points are

    s_l = σ_l(h_l),    h_l = d_l + Σ_{m>l} γ_{l,m} J_{ml}ᵀ s_m ,    γ_{l,m} = c_m/c_l ,    σ_l = (∂F_l)⁻¹ .

An `Energy` is a value without state: it has no weights and no measurements. A `Setting` is an energy together with what
the amplifiers of one block are set to. A `Gauge` measures one block and says what its amplifiers should be set to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["Energy", "Evaluated", "Gauge", "Setting"]

Evaluated = Callable[[], tuple[Frame, list[Tensor]]]
"""A block evaluated once without feedback, for one sample and without its random masks, and its states."""


class Energy(ABC):
    """An energy of blocks. Subclasses are frozen dataclasses: their options are their fields."""

    name: ClassVar[str]
    """What `convert` and files call it."""
    amplified: ClassVar[bool]
    """Whether an amplifier with a gain of its own follows every layer."""
    default_feedback: ClassVar[float]
    """The feedback that a block has where none is given."""

    @abstractmethod
    def check_feedback(self, feedback: object) -> float | str:
        """The feedback, checked.

        Raises:
            InputError: for anything that is no feedback of this energy.
        """

    @abstractmethod
    def check_program(self, program: BlockProgram) -> None:
        """Refuse a block with feedback that this energy cannot describe.

        Raises:
            UnsupportedError: naming the block, the layer and its activation or operator, and what to do.
        """

    @abstractmethod
    def activations(self, frame: Frame, setting: Setting) -> tuple[Activation, ...]:
        """σ_l = (∂F_l)⁻¹ of every layer: the state of a field, with its slope and its stable quotient.

        Args:
            frame: the block's program with its weights, evaluated once so that all shapes are known.
            setting: what the block's amplifiers are set to.
        """

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
            setting: what its amplifiers are set to.
            states: s_l, batch first.
            preactivations: h_l with s_l = σ_l(h_l); needed where an activation is not monotone.

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
        """Add to `gradients` what the weight gradient holds beside that of the drives.

        It is `factor` −Σ_l c_l ⟨v_l, ∂_θ ∂F_l(m_l; θ)⟩ with v_l = e_l/c_l: bilinear in the error currents e and the
        midpoint m where F_l is quadratic in what depends on weights.
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
        """Add to `gradients` what the loss has through the amplifiers, which follow the weights.

        It is dL/da da/dθ for everything a that an amplifier of this block is set to by a measurement.

        Args:
            frame: the block at its equilibrium.
            setting: what its amplifiers are set to.
            feedback: what they hold.
            measured: the block as it was measured: one sample, without random masks.
            currents: e_l, the derivative of the loss by h_l.
            middle: s_l, or the midpoint of the states that are compared.
            gradients: by weight, None where there is none yet.
            needed: which weights are asked for.
        """

    @abstractmethod
    def gauge(self, program: BlockProgram) -> Gauge:
        """What measures a block of this energy."""

    @abstractmethod
    def contraction(self, program: BlockProgram, certificate: Certificate, feedback: float | str) -> float | None:
        """Factor by which a Gauss–Seidel sweep contracts, where it is certified to."""

    @abstractmethod
    def projection(self, program: BlockProgram, certificate: Certificate, limit: float) -> dict[int, float]:
        """Weight index -> factor in (0, 1) that brings the loop gain to `limit`; empty where nothing needs it.

        Raises:
            InputError: where an edge between two states holds no weight that could be scaled.
        """

    @abstractmethod
    def describe(self, feedback: float | str, symmetric: bool = True) -> str:
        """The energy and its feedback, as a phrase for a report; `symmetric` as of the block's program."""

    @abstractmethod
    def remedy(self, feedback: float | str, loop_gain: float) -> str:
        """What to change where a block does not settle, as the end of a sentence."""


@dataclass(frozen=True)
class Setting:
    """The energy of a block and what its amplifiers are set to: constant while it settles and its gradient is taken."""

    energy: Energy
    scales: tuple[float, ...]
    """c_l, with γ_{l,m} = c_m/c_l."""
    amplifiers: tuple[float, ...] = ()
    """A_l, the gain of the amplifier behind each layer; empty where the energy has none."""

    def activations(self, frame: Frame) -> tuple[Activation, ...]:
        """σ_l of every layer of an evaluated frame."""
        return self.energy.activations(frame, self)


class Gauge(ABC):
    """Measures one block: what its feedback amounts to, and what its amplifiers have to be for a feedback.

    It keeps what makes the next measurement cheap. All methods are called without gradients.
    """

    @abstractmethod
    def certify(self, frame: Frame, states: Sequence[Tensor], feedback: float | str) -> Certificate:
        """Measured to convergence, with the amplifiers set for a feedback."""

    @abstractmethod
    def at(self, frame: Frame, states: Sequence[Tensor], present: Certificate) -> Certificate:
        """Measured to convergence, with the amplifiers as `present` has them."""

    @abstractmethod
    def needed(self, evaluated: Evaluated, present: Certificate, feedback: float | str) -> Certificate | None:
        """What `certify` returns, where the amplifiers would be set to something else than they are; else None."""

    @abstractmethod
    def follow(
        self, frame: Frame, evaluated: Evaluated, present: Certificate, feedback: float | str, converge: bool
    ) -> Certificate:
        """After a change of the weights in training, with the amplifiers set anew where the feedback asks for it.

        Args:
            frame: the block at these weights for one sample, with all shapes known.
            evaluated: evaluates it.
            present: the certificate before the change.
            feedback: what is to be held.
            converge: whether to measure to convergence, whatever an estimate says.
        """

    @abstractmethod
    def with_feedback(self, found: Certificate, feedback: float | str) -> Certificate | None:
        """The same measurement with the amplifiers set for another feedback; None where it has to be measured again."""

    @abstractmethod
    def with_setting(self, found: Certificate, present: Certificate) -> Certificate | None:
        """The same measurement with the amplifiers of `present`; None where it has to be measured again."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Any]]:
        """What is kept, by edge: numbers and tensors only."""

    @abstractmethod
    def restore(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` returned."""
