"""Checks a user runs: how far a hybrid is from its source, and whether its gradients are right."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.errors import GradientError, InputError
from ffebm_compiler.gradient_choice import assign_digital, own_gradient
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.inference import outside_inference
from ffebm_compiler.reports.deviation import largest_deviation
from ffebm_compiler.reports.gradients_by import ESTIMATORS, gradients_by, own_dtype
from ffebm_compiler.reports.same_draws import noise_apart
from ffebm_compiler.reports.text import table_text

__all__ = ["Agreement", "Comparison", "GradientReport", "check_gradients", "compare"]

_ROUNDINGS = 16
"""Up to how many units of rounding of the largest gradient a gradient that is zero may have."""


@dataclass(frozen=True)
class Comparison:
    """Deviation of a hybrid from its source, ‖hybrid − source‖/‖source‖.

    Of an output of integers or booleans, such as labels, it is the share of values that differ. It is infinite where
    one of the two has NaN or an infinite value that the other does not have.
    """

    blocks: Mapping[str, float]
    """Block name -> deviation at the block's outputs, with all feedback on."""
    output: float
    """Deviation at the network's output, or the largest if there are several outputs."""
    sweeps: Mapping[str, int]
    """Free-phase sweeps of each block."""
    layers: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        """A table."""
        rows = [
            (name, ", ".join(self.layers[name]), f"{error:.2e}", str(self.sweeps[name]))
            for name, error in self.blocks.items()
        ]
        rows.append(("output", "", f"{self.output:.2e}", ""))
        table = table_text("deviation from the source", ("block", "layers", "relative", "sweeps"), rows)
        if all(math.isfinite(error) for error in (*self.blocks.values(), self.output)):
            return table
        return f"{table}\ninf: one of hybrid and source has NaN or an infinite value where the other does not"


def compare(hybrid: HybridCore, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Comparison:
    """Run a hybrid in eval mode with and without feedback on the same inputs.

    Without feedback it computes its source's function, which `convert` has verified. Both runs draw the same random
    numbers and start from the same buffers. Afterwards the generators and the buffers are as they were.
    """
    with hybrid._evaluating(), hybrid.feedforward_mode(), hybrid.recording() as plain:
        expected = hybrid(*args, **kwargs)
    with hybrid._evaluating(), noise_apart(hybrid):
        with hybrid.recording() as settled:  # this run comes last, so that the blocks keep its states and sweeps
            output = hybrid(*args, **kwargs)
        sweeps = {block.name: block.module.last.sweeps if block.module.last else 0 for block in hybrid.blocks}
    return Comparison(
        blocks={name: largest_deviation(settled[name][1], plain[name][1]) for name in settled},
        output=largest_deviation(output, expected),
        sweeps=sweeps,
        layers={block.name: block.layers for block in hybrid.blocks},
    )


@dataclass(frozen=True)
class Agreement:
    """Agreement of a gradient with the reference.

    A gradient that is zero, such as that of a bias before batch norm in train mode, has no direction. Where the
    reference is no more than its own rounding, both agree if the found one is no more than its rounding too. Where one
    of the two has NaN or an infinite value, the cosine is 0 and the error infinite.
    """

    cosine: float
    relative_error: float
    """‖g − g_ref‖/‖g_ref‖; relative to the largest gradient of a parameter where the reference is zero."""

    @property
    def angle(self) -> float:
        """Angle to the reference, in degrees."""
        return math.degrees(math.acos(max(-1.0, min(self.cosine, 1.0))))


@dataclass(frozen=True)
class GradientReport:
    """Per parameter, each estimator's gradient against the float64 unrolled one.

    With devices the reference is their own exact gradient: at the weights that they hold, read without noise and
    converters. `ideal` compares with the exact gradient without devices.

    If the feedback has weights of its own, implicit and unrolled gradients are those of the equilibrium.
    Equilibrium propagation is then a local rule at an angle to them (`Agreement.angle`).
    """

    agreements: Mapping[str, Mapping[str, Agreement]]
    """Parameter name -> estimator name -> agreement."""
    own: str = "ep"
    """Name of the hybrid's own estimator."""
    ideal: Mapping[str, Agreement] = field(default_factory=dict)
    """Parameter name -> agreement of the own estimator with the exact gradient without devices; empty without them."""

    @property
    def estimators(self) -> tuple[str, ...]:
        """The estimators that were compared."""
        return ESTIMATORS if self.own in ESTIMATORS else (*ESTIMATORS, self.own)

    def __getitem__(self, name: str) -> Mapping[str, Agreement]:
        """The agreements of one parameter."""
        return self.agreements[name]

    def worst(self, estimator: str) -> tuple[str, Agreement]:
        """The parameter with the smallest cosine, and its agreement.

        Raises:
            InputError: the report does not hold this estimator.
        """
        if estimator not in self.estimators:
            raise InputError(f"estimator is {estimator!r}; expected one of {', '.join(self.estimators)}")
        name = min(self.agreements, key=lambda key: self.agreements[key][estimator].cosine)
        return name, self.agreements[name][estimator]

    def __str__(self) -> str:
        """A table."""
        rows = [
            (
                name,
                *(f"{row[e].cosine:.6f}" for e in self.estimators),
                *(f"{row[e].relative_error:.1e}" for e in self.estimators),
            )
            for name, row in self.agreements.items()
        ]
        columns = ("parameter", *(f"cos {e}" for e in self.estimators), *(f"err {e}" for e in self.estimators))
        if not self.ideal:
            return table_text("gradients against float64 unrolled", columns, rows)
        rows = [(*row, f"{self.ideal[row[0]].cosine:.6f}") for row in rows]
        columns = (*columns, f"cos {self.own}, ideal")
        return table_text("gradients against float64 unrolled, of the devices and without them", columns, rows)


@outside_inference()
def check_gradients(hybrid: HybridCore, inputs: Any, loss_fn: Callable[[Any], Tensor]) -> GradientReport:
    """Compare gradients with autograd through the relaxation in float64: of EP, implicit, unrolled, the hybrid's own.

    Where the hybrid's own goes through γ (`through_feedback`), all do: the reference is then the total gradient.
    Where equilibria are measured, EP's are, and those of the reference are computed.
    Contrastive and coupled learning do not estimate the gradient of the loss: their cosine says how far off they are.
    All draw the same random numbers, in the hybrid's own precision. So is the loss if it does not take float64.

    Args:
        hybrid: the hybrid. It is copied, so that its gradients and statistics do not change.
        inputs: a tensor, a tuple of positional arguments, or a dictionary of keyword arguments.
        loss_fn: takes the hybrid's output and returns a scalar loss.

    Raises:
        InputError: where `hybrid` is no hybrid, `loss_fn` no function, or the loss no finite scalar.
        GradientError: where no parameter receives a gradient.
        UnsupportedError: where the model's forward runs in its own dtype alone.
    """
    if not isinstance(hybrid, HybridCore):
        raise InputError(
            f"hybrid is a {type(hybrid).__name__}; expected a hybrid, which convert(model, inputs) returns"
        )
    if not callable(loss_fn):
        raise InputError(
            f"loss_fn is a {type(loss_fn).__name__}; expected a function of the hybrid's output that returns a scalar, "
            "e.g. lambda output: cross_entropy(output, labels)"
        )
    reference = gradients_by(hybrid, inputs, loss_fn, "unrolled", torch.float64, quiet=True)
    if not reference:
        raise GradientError(
            "no parameter of the hybrid receives a gradient: set requires_grad=True on one, and let loss_fn depend on "
            "the output without detach() or no_grad()"
        )
    own = own_dtype(hybrid)
    kind = own_gradient(hybrid)
    names = dict.fromkeys((*ESTIMATORS, kind))
    found = {name: gradients_by(hybrid, inputs, loss_fn, name, own) for name in names}
    ideal: dict[str, Agreement] = {}
    if hybrid.devices is not None:
        exact = copy.deepcopy(hybrid)
        assign_digital(exact, None)
        exact.set_devices(None)
        wanted = gradients_by(exact, inputs, loss_fn, "unrolled", torch.float64)
        ideal = _agreements(found[kind], wanted, own)
    compared = {estimator: _agreements(found[estimator], reference, own) for estimator in names}
    return GradientReport(
        {name: {estimator: compared[estimator][name] for estimator in names} for name in reference},
        kind,
        ideal,
    )


def _agreements(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Agreement]:
    """The agreement of every gradient, each computed in `dtype`, with its reference in float64."""
    norms = [float(gradient.norm()) for gradient in expected.values()]
    size = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
    products = torch.bfloat16 if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda") else dtype
    zero, rounding = (_ROUNDINGS * torch.finfo(each).eps * size for each in (torch.float64, products))
    return {name: _agreement(found.get(name), gradient, size, zero, rounding) for name, gradient in expected.items()}


def _agreement(found: Tensor | None, expected: Tensor, largest: float, zero: float, rounding: float) -> Agreement:
    if found is None:
        return Agreement(0.0, 1.0)
    norm, size = float(expected.norm()), float(found.norm())
    if not math.isfinite(norm) or not math.isfinite(size):
        return Agreement(0.0, math.inf)
    if norm <= zero:
        return Agreement(1.0 if size <= rounding else 0.0, size / largest if largest else size)
    cosine = float((found * expected.conj()).real.sum()) / (norm * size) if size else 0.0
    return Agreement(cosine, float((found - expected).norm()) / norm)
