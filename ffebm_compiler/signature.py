"""The captured structure of a hybrid's inputs and outputs, against which its calls are checked."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler.call_arguments import as_captured, check_keys, check_order
from ffebm_compiler.errors import InputError
from ffebm_compiler.passes.containers import Form
from ffebm_compiler.passes.order_of_draws import draws
from ffebm_compiler.passes.size_decisions import SizeDecision
from ffebm_compiler.runtime.finite import in_a_pipeline
from ffebm_compiler.source_view import signature_of

if TYPE_CHECKING:
    from ffebm_compiler.ir import Program

__all__ = ["CallForm"]


@dataclass(frozen=True)
class _Leaf:
    """The requirements on one leaf of the inputs."""

    name: str
    shape: tuple[int | None, ...] | None
    """Sizes of a tensor, with None for free ones; None if the leaf is no tensor."""
    floating: bool
    constant: object


@dataclass(frozen=True)
class CallForm:
    """The inputs that a captured graph takes, and the outputs that it returns."""

    in_spec: Form
    out_spec: Form
    inputs: tuple[_Leaf, ...]
    signature: inspect.Signature | None
    """Signature of the source's forward; None if it has none."""
    random: bool
    """Whether the graph draws random numbers in at least one mode."""
    outputs: int | None = None
    """Number of leading outputs that belong to eval mode, if train mode returns another structure; else None."""
    out_spec_in_training: Form | None = None
    refused_in_training: str = ""
    """Why the model could not be captured in train mode, or an empty text."""
    in_one_mode: tuple[tuple[str, ...], ...] = ()
    """Paths of modules that must be in one mode."""
    keywords_in_order: bool = False
    """Whether the source's forward reads the order of the keywords in its `**kwargs`."""
    decisions: tuple[SizeDecision, ...] = ()
    """What the source's forward decided by sizes that are free."""
    decisions_in_training: tuple[SizeDecision, ...] = ()

    def __deepcopy__(self, memo: dict[int, object]) -> CallForm:
        """Itself, since it never changes."""
        return self

    @classmethod
    def of(cls, program: Program) -> CallForm:
        """The call form of a captured program."""
        leaves = []
        for node in program.graph.nodes:
            if node.op != "placeholder" or node.name not in program.inputs:
                continue
            value = node.meta.get("val")
            if isinstance(value, Tensor):
                shape = tuple(None if _is_free(size) else int(size) for size in value.shape)
                leaves.append(_Leaf(node.name, shape, value.is_floating_point(), None))
            else:
                leaves.append(_Leaf(node.name, None, False, value))
        random = any(draws(program, node) for node in program.graph.nodes)
        return cls(
            program.in_spec,
            program.out_spec,
            tuple(leaves),
            signature_of(program.source),
            random,
            program.outputs,
            program.out_spec_in_training,
            program.refused_in_training,
            program.in_one_mode,
            program.keywords_in_order,
            program.decisions,
            program.decisions_in_training,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the flat inputs."""
        return tuple(leaf.name for leaf in self.inputs)

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the keyword arguments that were captured."""
        captured = pytree.tree_unflatten([None] * self.in_spec.num_leaves, self.in_spec.spec)
        return tuple(captured[1])

    def leaves(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool = False) -> list[Any]:
        """The flat inputs of a call.

        Raises:
            InputError: structure, rank, a fixed size or the kind of dtype differs, a tensor holds NaN, or the source's
                forward would do something else for these sizes.
        """
        flat, form = Form.of((tuple(args), dict(kwargs)))
        if not form.matches(self.in_spec) and self.signature is not None:
            captured = pytree.tree_unflatten([leaf.constant for leaf in self.inputs], self.in_spec.spec)
            if self.keywords_in_order:
                check_order(self.signature, captured[1], dict(kwargs))
            args, kwargs = as_captured(self.signature, captured, tuple(args), dict(kwargs))
            flat, form = Form.of((args, kwargs))
        if not form.matches(self.in_spec) or len(flat) != len(self.inputs):
            check_keys((args, kwargs), pytree.tree_unflatten([None] * self.in_spec.num_leaves, self.in_spec.spec))
            raise InputError(
                f"the inputs do not have the captured structure: got {_describe(args, kwargs)}, expected "
                f"{', '.join(f'{leaf.name} {_shape(leaf.shape)}' for leaf in self.inputs)}. Convert again with "
                "example inputs of this structure"
            )
        if all(_has_rank(value, leaf) for value, leaf in zip(flat, self.inputs, strict=True)):
            # a size that such a decision fixes may have been asked for as a free one
            self._check_decisions(flat, _describe(args, kwargs), training)
        for value, leaf in zip(flat, self.inputs, strict=True):
            _check(value, leaf)
        return flat

    def _check_decisions(self, flat: list[Any], described: str, training: bool) -> None:
        for decision in self.decisions_in_training if training else self.decisions:
            if not decision.is_kept([value.shape if isinstance(value, Tensor) else () for value in flat]):
                raise InputError(
                    f"the inputs have shapes {described}, for which the forward does something else than for the "
                    f"example: there {decision.described(self.names)}. Convert again with an example of these sizes, "
                    "or write the forward without a decision by a size"
                )

    def result(self, outputs: Any, training: bool) -> Any:
        """The outputs in the source's structure."""
        if self.outputs is None or self.out_spec_in_training is None:
            return self.out_spec.build(outputs)
        if training:
            return self.out_spec_in_training.build(outputs[self.outputs :])
        return self.out_spec.build(outputs[: self.outputs])


def _is_free(size: int | torch.SymInt) -> bool:
    """Whether a size may vary. A symbol may be fixed too, since the exporter may have found it to be one number."""
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _shape(shape: tuple[int | None, ...] | None) -> str:
    if shape is None:
        return "(no tensor)"
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    described = [str(tuple(a.shape)) if isinstance(a, Tensor) else type(a).__name__ for a in args]
    described += [f"{k}={tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__}" for k, v in kwargs.items()]
    return ", ".join(described) or "nothing"


def _has_rank(value: Any, leaf: _Leaf) -> bool:
    return isinstance(value, Tensor) and value.dim() == len(leaf.shape) if leaf.shape is not None else True


def _check(value: Any, leaf: _Leaf) -> None:
    if leaf.shape is None:
        if not isinstance(value, Tensor) and value == leaf.constant:
            return
        raise InputError(
            f"input {leaf.name!r} is {value!r}, but the graph was captured with {leaf.constant!r}, which became a "
            "constant: convert again with this value as example input"
        )
    if not isinstance(value, Tensor):
        given, remedy = type(value).__name__, "make it one by torch.as_tensor"
        if not isinstance(value, int | float | complex) and not hasattr(value, "__array__"):
            given = "None" if value is None else given
            remedy = f"pass one, or convert again with {given} in its place" if value is None else "pass one"
        raise InputError(f"input {leaf.name!r} must be a tensor of shape {_shape(leaf.shape)}, got {given}: {remedy}")
    fits = value.dim() == len(leaf.shape) and all(
        want is None or want == have for want, have in zip(leaf.shape, value.shape, strict=True)
    )
    if not fits:
        raise InputError(
            f"input {leaf.name!r} has shape {tuple(value.shape)}, expected {_shape(leaf.shape)}: convert again with an "
            "example of this shape, or free the dimension with dynamic_shapes (a forward may fix it all the same)"
        )
    if value.is_floating_point() != leaf.floating:
        kind = "floating-point" if leaf.floating else "integer or boolean"
        raise InputError(
            f"input {leaf.name!r} has dtype {value.dtype}, expected a {kind} one: call "
            f".{'float' if leaf.floating else 'long'}() on it"
        )
    if leaf.floating and value.device.type == "cpu" and bool(torch.isnan(value).any()):
        raise InputError(
            f"input {leaf.name!r} of shape {tuple(value.shape)} holds NaN: check the data{in_a_pipeline()}"
        )
