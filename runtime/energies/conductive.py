"""What all energies of conductances have in common: states under a load, and a certificate of the whole block.

    E(s; θ, x) = Σ_l c_l [ G_l(s_l) + ½ ⟨D^l − 1, s_l²⟩ − ⟨s_l, d_l⟩ ]

Conductances load what they connect, and the energies differ in the diagonal D. `Loaded` solves
∂G_l(s_l) + (D^l − 1) s_l ∋ h_l exactly. E is convex, so that every γ settles, and a Gauss–Seidel sweep is an exact
block coordinate descent.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError, UnsupportedError
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.base import Energy, Setting
from ffebm_compiler.runtime.energies.circuit import Circuit
from ffebm_compiler.runtime.energies.conductances import circuit_of
from ffebm_compiler.runtime.energies.loaded import Loaded
from ffebm_compiler.runtime.energies.loads import add_load_gradients, magnitudes_of, multiplying_weights, over_samples
from ffebm_compiler.runtime.program.block_program import BlockProgram, Layer
from ffebm_compiler.runtime.program.frame import Frame

__all__ = ["Conductive", "checked_gain", "gain_of", "refuse_activation"]


class Conductive(Energy):
    """An energy of conductances. Blocks with feedback hold every operator except max pooling."""

    @abstractmethod
    def diagonals(self, frame: Frame, setting: Setting) -> list[Tensor | None]:
        """D^l of every layer, in a shape that broadcasts over its state; None for 1."""

    @abstractmethod
    def gains(self, frame: Frame) -> tuple[float, ...]:
        """A_l, the gains of the amplifiers that an evaluated block needs; empty without amplifiers."""

    @abstractmethod
    def check_activation(self, program: BlockProgram, layer: Layer) -> None:
        """Refuse an activation that this circuit does not make.

        Raises:
            UnsupportedError: names the layer, its activation and the nearest that there is.
        """

    def check_program(self, program: BlockProgram) -> None:
        """Admit tied feedback and activations that diodes make, but no max pooling."""
        if not program.symmetric:
            raise UnsupportedError(
                f"{program.name}: a resistive energy is a circuit whose conductances carry both directions, and its "
                "feedback has weights of its own here, by feedback_weights or by devices with mismatch: use "
                "feedback_weights='tied' and mismatch=0, or energy='hopfield'"
            )
        for layer in program.layers:
            self.check_activation(program, layer)
            if any(instruction.operator.selects for instruction in layer.instructions):
                raise UnsupportedError(
                    f"{program.name}: layer {layer.name!r} holds max pooling, which conductances cannot do, since they "
                    "add currents. Use average pooling (nn.AvgPool2d), which is the nearest to it, keep the pooling "
                    "digital (leave 'max_pool' out of block_ops), or use energy='hopfield'"
                )

    def activations(self, frame: Frame, setting: Setting) -> tuple[Activation, ...]:
        """σ_l at the diagonal D^l. A layer without a load has its own activation."""
        found = frame.memory.get(setting)
        if found is None:
            found = frame.memory[setting] = tuple(
                activation if diagonal is None else Loaded(activation, diagonal)
                for activation, diagonal in zip(frame.activations, self.diagonals(frame, setting), strict=True)
            )
        return found

    def value(
        self,
        frame: Frame,
        setting: Setting,
        states: Sequence[Tensor],
        preactivations: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Σ_l c_l [G_l(s_l) + ½⟨D^l − 1, s_l²⟩ − ⟨s_l, d_l⟩]."""
        drives = [frame.drive(index, states) for index in range(len(states))]
        terms = [
            scale * (activation.potential(state).sum() - (state * drive).sum())
            for scale, activation, state, drive in zip(
                setting.scales, self.activations(frame, setting), states, drives, strict=True
            )
        ]
        return torch.stack(terms).sum()

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
        """−∂Σ_l ⟨e_l ∘ m_l, D^l⟩/∂θ, over the edges that feed back and the layer's own conductances if they load it."""
        program = frame.program
        wanted = [need and place in multiplying_weights(program) for place, need in enumerate(needed)]
        if not any(wanted):
            return
        magnitudes = magnitudes_of(frame, self.nonnegative)
        products = [
            None if e is None else over_samples(e * m, magnitudes) for e, m in zip(currents, middle, strict=True)
        ]
        found: list[Tensor | None] = [None] * program.weights
        add_load_gradients(magnitudes, setting, products, found, wanted)
        self.add_own_loads(magnitudes, products, found, wanted)
        self.add_by_magnitudes(frame, found, gradients, -factor)

    def add_own_loads(
        self,
        magnitudes: Frame,
        products: Sequence[Tensor | None],
        found: list[Tensor | None],
        wanted: Sequence[bool],
    ) -> None:
        """Add to `found` the derivatives of what a layer's own conductances load it with: nothing with amplifiers."""

    def add_by_magnitudes(
        self, frame: Frame, found: Sequence[Tensor | None], gradients: list[Tensor | None], factor: float
    ) -> None:
        """Add `factor` times the derivatives by |θ| to those by θ: `factor` sign(θ) ∘ found."""
        for place, part in enumerate(found):
            weight, present = frame.weights[place], gradients[place]
            if part is not None and weight is not None:
                term = weight.sign() * part
                gradients[place] = (
                    term * factor if present is None else torch.add(present, term.to(present.dtype), alpha=factor)
                )

    def circuit(self, frame: Frame, setting: Setting) -> Circuit:
        """Resistors, diodes and amplifiers; see `circuit.py` and `conductances.py`."""
        return circuit_of(frame, setting)

    def contraction(self, program: BlockProgram, certificate: Certificate, feedback: float | str) -> float | None:
        """ρ² on a chain, and more with odd cycles. It is known at symmetric feedback, too."""
        return certificate.contraction if certificate.certified else None

    def projection(self, program: BlockProgram, certificate: Certificate, limit: float) -> dict[int, float]:
        """Empty, since the block settles at every γ."""
        return {}


def refuse_activation(program: BlockProgram, layer: Layer, why: str, nearest: str) -> None:
    """Refuse an activation and name the nearest one.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"{program.name}: the activation {layer.activation.name} of layer {layer.name!r} {why}. The nearest that this "
        f"energy has is {nearest}. Or keep the layer digital (force_digital={layer.name!r}), give each layer a block "
        "of its own (hardware=Hardware(layers_per_block=1)), or use energy='hopfield'"
    )


def checked_gain(feedback: object, what: str) -> float | str:
    """A gain γ > 0, or `"symmetric"`.

    Args:
        feedback: what was given.
        what: what it should be, for the message.

    Raises:
        InputError: it is neither.
    """
    if feedback == "symmetric":
        return "symmetric"
    number = isinstance(feedback, Real) and not isinstance(feedback, bool)
    if not number or not 1e-12 <= feedback <= 1e12:  # type: ignore[operator]
        raise InputError(
            f"feedback is {feedback!r}; expected {what}, a number from 1e-12 to 1e12 (0.01 is the default, and all of "
            "them settle), or 'symmetric', which is 1"
        )
    return float(feedback)  # type: ignore[arg-type]


def gain_of(feedback: float | str) -> float:
    """γ of a feedback: itself, and 1 if it is symmetric."""
    return 1.0 if isinstance(feedback, str) else feedback
