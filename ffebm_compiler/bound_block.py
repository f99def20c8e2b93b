"""`BoundBlock`: an energy block as `hybrid.blocks` hands it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.plan_data import BlockPlan
from ffebm_compiler.runtime.block import EnergyBlock, Equilibrium
from ffebm_compiler.runtime.certificate import Certificate

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts

__all__ = ["BoundBlock"]


class BoundBlock:
    """An energy block of a hybrid, with the hybrid's present weights filled in."""

    def __init__(self, hybrid: HybridParts, module: EnergyBlock, plan: BlockPlan) -> None:
        self._hybrid = hybrid
        self.module = module
        self.plan = plan

    def __repr__(self) -> str:
        """Name, layers and loop gain."""
        return f"BoundBlock({self.name}: {', '.join(self.layers)}; loop gain {self.loop_gain:.3g})"

    @property
    def name(self) -> str:
        """Its name in the plan."""
        return self.plan.name

    @property
    def layers(self) -> tuple[str, ...]:
        """Module paths of its layers."""
        return self.plan.layers

    @property
    def states(self) -> tuple[Tensor, ...]:
        """s_l of the last forward, batch first, one per state of the block; empty before the first forward."""
        return self.module.states

    @property
    def state_names(self) -> tuple[str, ...]:
        """Module path of the layer that each state belongs to."""
        return tuple(layer.name for layer in self.module.program.layers)

    @property
    def loop_gain(self) -> float:
        """κ = ρ² of the present weights at the present feedback; 0 for a block without feedback."""
        certificate = self.certificate
        return 0.0 if certificate is None else certificate.loop_gain

    @property
    def certificate(self) -> Certificate | None:
        """Spectral radius at the present weights, and the amplifiers' settings; None for a block without feedback.

        If the weights have changed since the last measurement, reading this measures them to convergence. It never
        changes the feedback.
        """
        return self._hybrid.certificate_of(self.name)

    @property
    def weights(self) -> tuple[Tensor | None, ...]:
        """Its present weights and biases, in the order of the block's operands."""
        return self._hybrid.operands_of(self.name)[1]

    def _inputs(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        slots = self._hybrid.operands_of(self.name)[0]
        given = iter(inputs)
        open_slots = sum(slot is None for slot in slots)
        if len(inputs) != open_slots:
            raise InputError(
                f"{self.name} takes {open_slots} inputs ({', '.join(self.plan.inputs)}), got {len(inputs)}: pass the "
                "values that enter the block, batch first"
            )
        return [next(given) if slot is None else slot for slot in slots]

    def settle(self, *inputs: Tensor) -> Equilibrium:
        """The equilibrium for inputs of the block (batch first), without gradients.

        Raises:
            InputError: the number of inputs is wrong.
            ConvergenceError: the block does not settle.
        """
        return self.module.settle(self._inputs(inputs), self.weights)

    def residual(self, *inputs: Tensor, states: Sequence[Tensor]) -> float:
        """max_l ‖σ_l(h_l(s)) − s_l‖/‖s_l‖: how far states are from the equilibrium for these inputs.

        Raises:
            InputError: the number of inputs or states is wrong.
        """
        return self.module.residual(self._inputs(inputs), self.weights, states)

    def energy(
        self, *inputs: Tensor, states: Sequence[Tensor], preactivations: Sequence[Tensor] | None = None
    ) -> Tensor:
        """E(s; θ, x) = Σ_l c_l [F_l(s_l) − ⟨s_l, d_l⟩], summed over the batch (dimensionless scalar).

        For a Hopfield energy, F_l is the potential G_l of the layer's activation. For a resistive energy it is
        G_l(s_l) + ½⟨D^l − 1, s_l²⟩.

        Raises:
            InputError: the number of inputs or states is wrong.
            UnsupportedError: an activation is not monotone and `preactivations` are missing.
        """
        return self.module.energy(self._inputs(inputs), self.weights, states, preactivations)
