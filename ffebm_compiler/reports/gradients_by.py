"""Gradients by an estimator, in a dtype: what `check_gradients` compares.

Promise: the hybrid and the random generators are left as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler.errors import FFEBMError, UnsupportedError
from ffebm_compiler.gradient_choice import assign_digital
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.inference import ordinary
from ffebm_compiler.passes.unchanged import generators_unchanged
from ffebm_compiler.recast import dtype_of
from ffebm_compiler.reports.loss import checked_loss
from ffebm_compiler.reports.same_draws import DrawnIn, noise_apart
from ffebm_compiler.runtime.estimators.choice import estimator_of
from ffebm_compiler.runtime.solvers.measured import Measured

__all__ = ["ESTIMATORS", "gradients_by", "own_dtype"]

ESTIMATORS = ("ep", "implicit", "unrolled")
"""Those that every hybrid is checked with, beside its own."""


def own_dtype(hybrid: HybridCore) -> torch.dtype:
    """The dtype of a hybrid's first floating-point parameter; float32 if it has none."""
    return dtype_of(hybrid) or torch.float32


def gradients_by(
    hybrid: HybridCore,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    estimator: str,
    dtype: torch.dtype,
    quiet: bool = False,
) -> dict[str, Tensor]:
    """The gradients of a hybrid's parameters in float64: parameter name -> gradient.

    A loss may not take an output of another dtype than the hybrid's (class weights, targets). Then the outputs are
    cast to the hybrid's before the loss.

    Args:
        hybrid: a hybrid. A copy of it computes.
        inputs: a tensor, a tuple of positional arguments, or a dictionary of keyword arguments.
        loss_fn: takes the output and returns a scalar loss.
        estimator: its name; another one than those of `ESTIMATORS` means that of each block.
        dtype: the floating-point dtype to compute in. Complex tensors are in the complex one of the same width.
        quiet: let blocks that do not settle pass without a warning.

    Raises:
        InputError: the loss is no finite scalar.
        UnsupportedError: the model or the loss does not run in `dtype`.
    """
    own = own_dtype(hybrid)
    try:
        return _computed(hybrid, inputs, loss_fn, estimator, dtype, quiet)
    except FFEBMError:
        raise
    except RuntimeError:
        if dtype is own:
            raise
    try:
        return _computed(hybrid, inputs, lambda output: loss_fn(_cast(output, own)), estimator, dtype, quiet)
    except FFEBMError:
        raise
    except RuntimeError as error:
        raise _not_in(dtype, "gradient", error) from error


def _not_in(dtype: torch.dtype, what: str, error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"the reference is computed in {dtype}, in which the model's {what} cannot be computed "
        f"({type(error).__name__}: {str(error).splitlines()[0]}): let forward and loss_fn make tensors in the dtype of "
        "what they are given, as by torch.zeros(4, dtype=x.dtype)"
    )


def _computed(
    hybrid: HybridCore,
    inputs: Any,
    loss_fn: Callable[[Any], Tensor],
    estimator: str,
    dtype: torch.dtype,
    quiet: bool,
) -> dict[str, Tensor]:
    model, own = copy.deepcopy(hybrid), own_dtype(hybrid)
    model._apply(lambda tensor: _cast(tensor, dtype))  # `to` would take the imaginary parts of parameters away
    for block in model.energy_blocks.values():
        block.quiet = block.quiet or quiet
    model.zero_grad(set_to_none=True)
    if estimator in ESTIMATORS:  # the hybrid's own settings of it where it has some
        assign_digital(model, None)
        through = any(block.estimator.through_feedback for block in model.energy_blocks.values())
        for block in model.energy_blocks.values():
            if block.estimator.name != estimator:
                block.estimator = estimator_of(estimator)
                if through:  # like is compared with like
                    block.estimator = replace(block.estimator, through_feedback=True)  # type: ignore[type-var]
    for block in model.energy_blocks.values():
        if isinstance(block.solver, Measured) and not block.estimator.compares_states:
            block.solver = None  # what is measured is compared with what is computed
    given = _cast(pytree.tree_map_only(Tensor, Tensor.detach, ordinary(inputs)), dtype)
    draws = nullcontext() if dtype is own else DrawnIn(own, dtype)
    with generators_unchanged(), torch.enable_grad(), model.held_feedback():
        torch.manual_seed(0)
        with noise_apart(model):
            with draws if model._call_form.random else nullcontext():
                args = given if isinstance(given, tuple | list) else () if isinstance(given, dict) else (given,)
                try:
                    output = model(*args, **(given if isinstance(given, dict) else {}))
                except RuntimeError as error:
                    if dtype is own or isinstance(error, FFEBMError):
                        raise
                    raise _not_in(dtype, "output", error) from error
            with draws:
                loss = checked_loss(loss_fn(output), output)
            if loss.requires_grad:
                loss.backward()
    return {name: _cast(p.grad, torch.float64) for name, p in model.named_parameters() if p.grad is not None}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            return leaf.to(dtype.to_complex())
        return leaf.to(dtype) if leaf.is_floating_point() else leaf

    return pytree.tree_map_only(Tensor, cast, value)
