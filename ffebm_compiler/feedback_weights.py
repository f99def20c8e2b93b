"""`FeedbackWeights`: feedback through weights of its own, as parameters of a hybrid beside the source's.

    s_l = σ_l( d_l + Σ_{m>l} γ_{l,m} B_{ml}ᵀ s_m )

B_{ml} is the map J_{ml} of the edge with feedback weights in place of the forward ones. B = W is tied
feedback.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ffebm_compiler.errors import InputError
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.plain_numbers import plain_fields

__all__ = [
    "FeedbackWeights",
    "feedback_weights_of",
    "register_feedback_weights",
]


@dataclass(frozen=True)
class FeedbackWeights:
    """Feedback through weights B of its own, with the shape of the forward weights W.

    There is no energy then, and equilibrium propagation becomes a local rule. It follows the exact gradient as far
    as B is close to W. With error currents e and states s its gradients are e_l s_kᵀ for W from k to l, and γ e_l s_mᵀ
    for the feedback from m to l.

    Args:
        update: how B is trained. With `"free"` it has its own local gradient, with `"fixed"` it does not change. With
            `"aligned"` W and B both get the sum of the two gradients, so that their difference only decays, by the
            optimizer's `weight_decay` (Kolen & Pollack 1994). `alignment_penalty` brings them together with any of the
            three.
        start: `"tied"` starts B as a copy of W, `"random"` with independent normal entries of W's root mean square.
        seed: seed of the random start.

    Raises:
        InputError: update, start or seed is none of these.

    Sources: Scellier et al. 2018 (arXiv 1808.04873) for equilibrium propagation in vector fields.
    """

    update: Literal["free", "fixed", "aligned"] = "free"
    start: Literal["tied", "random"] = "tied"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        if self.update not in ("free", "fixed", "aligned"):
            raise InputError(f"update is {self.update!r}; expected 'free', 'fixed' or 'aligned'")
        if self.start not in ("tied", "random"):
            raise InputError(f"start is {self.start!r}; expected 'tied' or 'random'")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed!r}; expected an integer of at least 0")


def feedback_weights_of(given: object) -> FeedbackWeights | None:
    """The `FeedbackWeights` for an argument of `convert`; None for tied feedback.

    Raises:
        InputError: the argument is none of `"tied"`, `"free"` and a `FeedbackWeights`.
    """
    if isinstance(given, FeedbackWeights):
        return given
    if given == "tied":
        return None
    if given == "free":
        return FeedbackWeights()
    raise InputError(
        f"feedback_weights is {given!r}; expected 'tied', 'free' or a FeedbackWeights, such as "
        "FeedbackWeights(update='fixed', start='random')"
    )


def register_feedback_weights(hybrid: nn.Module, weights: Mapping[str, Tensor], options: FeedbackWeights) -> None:
    """Make the feedback weights of a hybrid.

    Args:
        hybrid: the hybrid. They become parameters of its submodules.
        weights: name of each -> the forward weight that it belongs to.
        options: how they start, and whether they are trained.
    """
    generator = torch.Generator().manual_seed(options.seed)
    for name, weight in weights.items():
        value = weight.detach().clone(memory_format=torch.contiguous_format)
        if options.start == "random":
            size = 0.0 if value.is_meta else float(torch.linalg.vector_norm(value)) / math.sqrt(max(1, value.numel()))
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu")
            value = (drawn * size).to(value)
        path, _, leaf = name.rpartition(".")
        module_at(hybrid, path).register_parameter(leaf, nn.Parameter(value, requires_grad=options.update != "fixed"))
