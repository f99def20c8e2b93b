"""Choose a gradient estimator by its name."""

from __future__ import annotations

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.estimators.adjoint_sweeps import RecurrentBackprop, TruncatedBackprop
from ffebm_compiler.runtime.estimators.base import Estimator
from ffebm_compiler.runtime.estimators.clamped import ContrastiveLearning, CoupledLearning
from ffebm_compiler.runtime.estimators.cost_nudge import CostNudge
from ffebm_compiler.runtime.estimators.equilibrium_propagation import EquilibriumPropagation
from ffebm_compiler.runtime.estimators.implicit import ImplicitDifferentiation, Unrolled

__all__ = [
    "ESTIMATORS",
    "ContrastiveLearning",
    "CostNudge",
    "CoupledLearning",
    "EquilibriumPropagation",
    "Estimator",
    "Implicit",
    "ImplicitDifferentiation",
    "RecurrentBackprop",
    "TruncatedBackprop",
    "Unrolled",
    "estimator_of",
]

Implicit = ImplicitDifferentiation
"""The short name."""

ESTIMATORS: tuple[type[Estimator], ...] = (
    EquilibriumPropagation,
    ImplicitDifferentiation,
    Unrolled,
    ContrastiveLearning,
    CoupledLearning,
    CostNudge,
    TruncatedBackprop,
    RecurrentBackprop,
)


def estimator_of(gradient: object) -> Estimator:
    """The estimator that a name or an estimator object stands for.

    Raises:
        InputError: the name is unknown, or the object is no estimator.
    """
    if isinstance(gradient, Estimator):
        return gradient
    names = {kind.name: kind for kind in ESTIMATORS}
    if not isinstance(gradient, str) or gradient not in names:
        raise InputError(
            f"gradient is {gradient!r}; expected {', '.join(map(repr, names))} or an estimator object such as "
            "EquilibriumPropagation(beta=0.01, variant='centered')"
        )
    return names[gradient]()
