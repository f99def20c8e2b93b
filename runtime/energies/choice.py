"""Choose an energy by its name."""

from __future__ import annotations

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.energies.base import Energy
from ffebm_compiler.runtime.energies.hopfield import Hopfield
from ffebm_compiler.runtime.energies.passive import DRN, Unamplified
from ffebm_compiler.runtime.energies.resistive import Resistive

__all__ = ["DEFAULT_ENERGY", "ENERGIES", "energy_of", "name_of"]

DEFAULT_ENERGY: Energy = Hopfield()
"""The energy of blocks if none is chosen."""

ENERGIES: dict[str, type[Energy]] = {kind.name: kind for kind in (Hopfield, Resistive, Unamplified, DRN)}


def name_of(energy: Energy) -> str | None:
    """The name for which `energy_of` returns this energy; None for an energy of a class of the user's."""
    return energy.name if ENERGIES.get(energy.name) is type(energy) else None


def energy_of(energy: object) -> Energy:
    """The energy that a name or an energy object stands for.

    Raises:
        InputError: the name is unknown, or the object is no energy.
    """
    if isinstance(energy, Energy):
        return energy
    if not isinstance(energy, str) or energy not in ENERGIES:
        raise InputError(f"energy is {energy!r}; expected {' or '.join(map(repr, ENERGIES))}")
    return ENERGIES[energy]()
