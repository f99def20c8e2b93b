"""Verification: with feedback off, a hybrid computes what its source computes, in both modes, draw for draw."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.passes.tracing import ordinary_paths
from ffebm_compiler.passes.unchanged import attributes_unchanged, generators_unchanged, tensors_unchanged

if TYPE_CHECKING:
    from ffebm_compiler.hybrid import HybridModel

__all__ = ["verify_feedforward"]

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}


def verify_feedforward(
    hybrid: HybridModel,
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    modes: tuple[bool, ...],
    folded: frozenset[str],
) -> None:
    """Compare a hybrid with the private copy of its source, which has the same tensors.

    Args:
        hybrid, source: what is compared; neither changes.
        args, kwargs: the example inputs.
        modes: values of `training` to compare in.
        folded: paths of the modules whose batch norm is folded; they are in eval mode throughout.

    Raises:
        FFEBMError: where they deviate, which is a defect of the compiler.
    """
    for training in modes:
        with hybrid.in_mode(training), hybrid.feedforward_mode(), hybrid.held_feedback():
            for path in folded:  # frozen in the hybrid: the source is compared with its norms frozen too
                source.get_submodule(path).training = False
                if not path:
                    hybrid.training = False
            state = [*source.buffers(), *hybrid.written_state()]
            wanted = _leaves(source, source, state, args, kwargs)
            found = _leaves(hybrid, source, state, args, kwargs)
        if len(wanted) != len(found):
            raise FFEBMError(
                f"the converted graph returns {len(found)} values and the source {len(wanted)} in "
                f"{_name(training)} mode: this is a defect of the compiler, please report the model"
            )
        for want, have in zip(wanted, found, strict=True):
            if not isinstance(want, Tensor) or not want.is_floating_point() or not want.numel():
                continue
            error = float((have - want).double().norm() / want.double().norm().clamp_min(1e-12))
            if not error <= _LIMITS.get(want.dtype, 5e-2):
                raise FFEBMError(
                    f"the converted graph deviates from the source by {error:.2e} (relative) in {_name(training)} mode "
                    "with feedback off: this is a defect of the compiler, please report the model"
                )


def _leaves(
    model: nn.Module, source: nn.Module, state: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    with (
        torch.no_grad(),
        generators_unchanged(),
        tensors_unchanged(state),
        attributes_unchanged(source),
        ordinary_paths(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what the source warns of is no news of the conversion's
        return leaves_of(model(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs))))


def _name(training: bool) -> str:
    return "train" if training else "eval"
