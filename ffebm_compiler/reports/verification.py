"""Verification: with feedback off, a hybrid must compute and draw exactly what its source does, in both modes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ffebm_compiler.errors import FFEBMError, InputError, UnsupportedError
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.passes.held import held_tensors
from ffebm_compiler.passes.hidden_compiler import hidden_compiler
from ffebm_compiler.passes.tracing import ordinary_paths
from ffebm_compiler.passes.unchanged import attributes_unchanged, generators_unchanged, tensors_unchanged
from ffebm_compiler.reports.deviation import deviation
from ffebm_compiler.reports.mixed_modes import allow_mixed_modes

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["verify_feedforward"]

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}
_ALLOWED = 30
"""Allowed deviation of an output, in units of its change when round-off is added to the weights."""
_FLOOR = 1e-12
"""The smallest norm of an output that a deviation is relative to."""


def verify_feedforward(hybrid: HybridCore, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that with feedback off a hybrid computes what its source computes, in each mode and in mixed modes.

    Raises:
        FFEBMError: it does not, which is a defect of the compiler.
    """
    source = hybrid.__dict__["_source"]
    if type(source) is nn.Module or (hybrid._call_form.random and not hybrid._draws_in_order):
        return
    modes = (False, True) if hybrid._differs_in_training else (False,)
    _compare(hybrid, source, args, kwargs, modes, hybrid._folded)
    allow_mixed_modes(hybrid, source, lambda: _same_outputs(hybrid, source, args, kwargs))


def _compare(
    hybrid: HybridCore,
    source: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    modes: tuple[bool, ...],
    folded: frozenset[str],
) -> None:
    """Compare a hybrid with the private copy of its source, which has the same tensors.

    Args:
        hybrid, source: the two to compare. Neither changes.
        args, kwargs: the example inputs.
        modes: values of `training` to compare in.
        folded: paths of the modules whose batch norm is folded. They are always in eval mode.

    Raises:
        InputError: the source's outputs are not finite.
        FFEBMError: they deviate, which is a defect of the compiler.
    """
    for training in modes:
        with hybrid.in_mode(training), hybrid.feedforward_mode(), hybrid.held_feedback():
            for path in folded:  # the hybrid's folded norms are frozen, so freeze the source's too
                module_at(source, path).training = False
                if not path:
                    hybrid.training = False
            state = [*held_tensors(source), *hybrid.written_state()]
            wanted = _of_source(source, state, args, kwargs)
            found = _leaves(hybrid, source, state, args, kwargs)
            if len(wanted) != len(found):
                raise FFEBMError(
                    f"the converted graph returns {len(found)} values and the source {len(wanted)} in "
                    f"{_name(training)} mode: this is a defect of the compiler, please report the model"
                )
            error, limit = _deviation(found, wanted)
            if error <= limit:
                continue
            if not all(bool(torch.isfinite(value).all()) for value in wanted if isinstance(value, Tensor)):
                raise InputError(
                    f"the source's own outputs for the example inputs hold NaN or infinite values in {_name(training)} "
                    "mode, so that the hybrid cannot be compared with it: check the weights, and pass ordinary inputs"
                )
            if _agree_with_gradients(found, source, state, args, kwargs):
                raise UnsupportedError(
                    f"in {_name(training)} mode the source computes something else where no gradient is recorded (its "
                    "forward reads torch.is_grad_enabled or a tensor's requires_grad), which a hybrid does not: "
                    "let a setting or the training flag decide instead"
                )
            if _asks_for_types(wanted, source, state, args, kwargs):
                raise UnsupportedError(
                    f"in {_name(training)} mode the source computes something else for tensors of another class (its "
                    "forward reads the exact type of a tensor, which is another one while it is captured): use "
                    "isinstance(x, torch.Tensor) instead"
                )
            if _agree_if_compiled(found, source, state, args, kwargs):
                raise UnsupportedError(
                    f"in {_name(training)} mode the source computes something else where it is compiled or exported "
                    "(its forward asks torch.compiler.is_compiling or is_exporting), as it is while it is captured: "
                    "let a setting decide instead"
                )
            # If round-off alone changes the output as much, the comparison shows nothing.
            if not error <= _ALLOWED * _sensitivity(source, args, kwargs):
                raise FFEBMError(
                    f"the converted graph deviates from the source by {error:.2e} (relative) in {_name(training)} mode "
                    "with feedback off: this is a defect of the compiler, please report the model"
                )


def _same_outputs(hybrid: HybridCore, source: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a hybrid and the private copy of its source compute the same in the present modes of their modules."""
    state = [*held_tensors(source), *hybrid.written_state()]
    wanted = _of_source(source, state, args, kwargs)
    found = _leaves(hybrid, source, state, args, kwargs)
    return _agree(found, wanted)


def _agree(found: list[Any], wanted: list[Any]) -> bool:
    """Whether there are as many outputs, and none deviates by more than its limit."""
    if len(found) != len(wanted):
        return False
    error, limit = _deviation(found, wanted)
    return error <= limit


def _deviation(found: list[Any], wanted: list[Any]) -> tuple[float, float]:
    """(deviation, limit) of the output whose relative deviation is largest compared with its limit."""
    worst, allowed = 0.0, 1.0
    for have, want in zip(found, wanted, strict=True):
        if not _is_compared(want):
            continue
        error, limit = deviation(have, want, _FLOOR), _LIMITS.get(want.dtype.to_real(), 5e-2)
        if not error / limit <= worst / allowed:
            worst, allowed = error, limit
    return worst, allowed


def _sensitivity(source: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Largest relative change of an output when every weight changes by a few units of round-off.

    A batch norm over two equal values, for example, returns their round-off at full size. Two correct evaluations of
    such a source need not agree at all.
    """
    results = []
    for factor in (0.0, 1.0):
        copied = copy.deepcopy(source)
        for mine, theirs in zip(copied.modules(), source.modules(), strict=True):
            mine.training = theirs.training
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in copied.parameters():
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)
                    parameter.mul_(1 + factor * 8 * torch.finfo(parameter.dtype).eps * noise)
        results.append(_of_source(copied, held_tensors(copied), args, kwargs))
    pairs = zip(*results, strict=True)
    return max((deviation(b, a, _FLOOR) for a, b in pairs if _is_compared(a)), default=0.0)


def _is_compared(output: Any) -> bool:
    """Whether an output is compared. Round-off may change integers, such as the index of the larger of two values."""
    return isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex())


def _agree_with_gradients(
    found: list[Any], source: nn.Module, state: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the source agrees with the hybrid while gradients are recorded, as they were at capture."""
    return _agree(found, _leaves(source, source, state, args, kwargs, gradients=True))


def _agree_if_compiled(
    found: list[Any], source: nn.Module, state: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the source agrees with the hybrid while its code is told that it is compiled, as it is at capture."""
    try:
        with hidden_compiler(compiled=True):
            wanted = _of_source(source, state, args, kwargs)
    except Exception:  # it does something that only a compiler can
        return False
    return _agree(found, wanted)


class _OfAnotherClass(Tensor):
    """A tensor that differs from an ordinary one only in its type."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfAnotherClass:
        """A copy of the same class."""
        return self.as_subclass(Tensor).clone().as_subclass(_OfAnotherClass)


def _asks_for_types(
    wanted: list[Any], source: nn.Module, state: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Whether the source's outputs differ for inputs of a subclass of `torch.Tensor`."""
    given = pytree.tree_map_only(Tensor, lambda value: value.as_subclass(_OfAnotherClass), (args, dict(kwargs)))
    try:
        found = [
            leaf.as_subclass(Tensor) if isinstance(leaf, Tensor) else leaf for leaf in _of_source(source, state, *given)
        ]
    except Exception:  # it does not run on such tensors
        return False
    return not _agree(found, wanted)


def _of_source(source: nn.Module, state: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """The source's outputs. Gradients are recorded only if it does not run without (`retain_grad` does not)."""
    try:
        return _leaves(source, source, state, args, kwargs)
    except Exception:
        return _leaves(source, source, state, args, kwargs, gradients=True)


def _leaves(
    model: nn.Module,
    source: nn.Module,
    state: list[Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    gradients: bool = False,
) -> list[Any]:
    with (
        torch.set_grad_enabled(gradients),
        generators_unchanged(),
        tensors_unchanged(state),
        attributes_unchanged(source),
        ordinary_paths(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # warnings of the source do not concern the conversion
        leaves = leaves_of(model(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs))))
        # an output may be a buffer, which gets its former value back
        return [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _name(training: bool) -> str:
    return "train" if training else "eval"
