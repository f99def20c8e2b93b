"""Gradient estimators by name."""

from __future__ import annotations

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.estimators.base import Estimator
from ffebm_compiler.runtime.estimators.equilibrium_propagation import EquilibriumPropagation
from ffebm_compiler.runtime.estimators.implicit import ImplicitDifferentiation, Unrolled

__all__ = ["EquilibriumPropagation", "Estimator", "ImplicitDifferentiation", "Unrolled", "estimator_of"]


def estimator_of(gradient: object) -> Estimator:
    """The estimator that a name or an estimator object stands for.

    Raises:
        InputError: for any other name or object.
    """
    if isinstance(gradient, Estimator):
        return gradient
    names = {"ep": EquilibriumPropagation, "implicit": ImplicitDifferentiation, "unrolled": Unrolled}
    if not isinstance(gradient, str) or gradient not in names:
        raise InputError(
            f"gradient is {gradient!r}; expected 'ep', 'implicit', 'unrolled' or an estimator object such as "
            "EquilibriumPropagation(beta=0.01, variant='centered')"
        )
    return names[gradient]()
