"""The Hopfield energy of a block.

    E(s; θ, x) = Σ_l c_l [ G_l(s_l) − ⟨s_l, d_l(s_1..s_{l−1}, x; θ)⟩ ],

G_l the potential of the layer's activation (∂G_l = σ_l⁻¹). Where an activation is not monotone
G_l is written in the pre-activation, h σ(h) − Λ(h): an equilibrium is then a stationary point of
E, not a minimum.

Sources: Hopfield 1984; Scellier & Bengio 2017 (arXiv 1602.05179); Nest & Ernoult 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ffebm_compiler.runtime.frame import Frame

__all__ = ["hopfield_energy"]


def hopfield_energy(
    frame: Frame,
    scales: Sequence[float],
    states: Sequence[Tensor],
    preactivations: Sequence[Tensor] | None = None,
) -> Tensor:
    """E, summed over the batch: a scalar tensor, dimensionless.

    Args:
        frame: the block's program with its inputs and weights.
        scales: c_l.
        states: s_l, batch first.
        preactivations: h_l with s_l = σ_l(h_l); needed where an activation is not monotone.

    Raises:
        UnsupportedError: for a non-monotone activation without pre-activations.
    """
    total: Tensor | None = None
    for index, activation in enumerate(frame.activations):
        state = states[index]
        if preactivations is not None and not activation.monotone:
            potential = activation.energy_of_preactivation(preactivations[index]).sum()
        else:
            potential = activation.potential(state).sum()
        term = scales[index] * (potential - (state * frame.drive(index, states)).sum())
        total = term if total is None else total + term
    assert total is not None
    return total
