"""The source's forward signature and attributes, as a hybrid shows them to tools.

The hybrid's own attributes come first, then those of the source. Values and properties (`config`,
`device`, `dtype`) are read from the source, which has the same tensors. Methods of the source's class run with the
hybrid as `self`, so that they call the hybrid's forward and never the source's own.
"""

from __future__ import annotations

import inspect
import types
import warnings
from typing import Any

import torch
from torch import nn

from ffebm_compiler.errors import FFEBMWarning, UnsupportedError
from ffebm_compiler.passes.held import own_attributes

__all__ = [
    "attribute_of_source",
    "bind_forward",
    "free_name",
    "separate_tied",
    "signature_of",
    "warn_of_captured",
    "without_bound_forward",
]


def free_name(name: str, source: nn.Module) -> str:
    """`name`, followed by underscores if the source has a module, parameter or buffer of that name."""
    while name in source._modules or name in source._parameters or name in source._buffers:
        name += "_"
    return name


def signature_of(source: nn.Module) -> inspect.Signature | None:
    """The signature of a source's forward; None if it has no eager forward."""
    return None if type(source) is nn.Module else inspect.signature(source.forward)


def bind_forward(hybrid: nn.Module, signature: inspect.Signature | None) -> None:
    """Replace `hybrid.forward` by a bound method with the signature that tools look for."""
    if signature is None:
        return

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [
        parameter.replace(name="self_") if parameter.name == "self" else parameter
        for parameter in signature.parameters.values()
    ]
    forward.__signature__ = signature.replace(parameters=[self_parameter, *parameters])  # type: ignore[attr-defined]
    forward.__doc__ = type(hybrid).forward.__doc__
    hybrid.__dict__["forward"] = types.MethodType(forward, hybrid)


def without_bound_forward(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a hybrid without the method that `bind_forward` added, since a copy binds its own."""
    bound = getattr(attributes.get("forward"), "__func__", None)
    ours = getattr(bound, "__module__", None) == __name__
    return {name: value for name, value in attributes.items() if name != "forward" or not ours}


def separate_tied(source: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Copy a tied tensor of a transformers model if a state dict holds it under a second name.

    transformers' Trainer writes the state dict of a hybrid with safetensors, which refuses shared memory.
    """
    if not getattr(source, "_tied_weights_keys", None):
        return
    seen: set[int] = set()
    for name, parameter in source.named_parameters(remove_duplicate=False):
        if id(parameter) in seen and prefix + name in state:
            state[prefix + name] = state[prefix + name].clone()
        seen.add(id(parameter))


def warn_of_captured(source: nn.Module | None, name: str, value: Any) -> None:
    """Set an attribute of the source and warn that the graph holds the former value if the forward reads it."""
    if source is None or name not in own_attributes(source) or isinstance(value, nn.Module | nn.Parameter):
        return
    before, source.__dict__[name] = source.__dict__[name], value
    plain = (bool, int, float, str, tuple, torch.Tensor, type(None))
    if before is value or not isinstance(value, plain) or not isinstance(before, plain):
        return
    if not isinstance(value, torch.Tensor) and not isinstance(before, torch.Tensor) and before == value:
        return
    warnings.warn(
        f"attribute {name!r} of the source was captured as it was at conversion, and the hybrid goes on with the "
        "former value if its forward reads it: set it on the source and convert again",
        FFEBMWarning,
        stacklevel=3,
    )


def _no_generation(*args: Any, **kwargs: Any) -> Any:
    """Refuse to generate, since generation calls the model with longer inputs and a cache at every step."""
    raise UnsupportedError(
        "a hybrid has no generate(), since it takes inputs of the captured structure only: take the next token from "
        "hybrid(input_ids).logits yourself, or use hybrid.to_digital().generate(...), which runs without energy blocks"
    )


def attribute_of_source(hybrid: nn.Module, source: nn.Module, name: str) -> Any:
    """The source's attribute `name`, as the hybrid shows it.

    Raises:
        AttributeError: the source has no such attribute.
    """
    missing = AttributeError(f"neither the hybrid nor its source, a {type(source).__name__}, has an attribute {name!r}")
    if name.startswith("__"):
        raise missing
    if name == "accepts_loss_kwargs":  # transformers' Trainer asks whether it may pass `num_items_in_batch`
        return "num_items_in_batch" in hybrid.__dict__["_call_form"].keywords
    if name == "generate" and hasattr(source, "generation_config"):
        return _no_generation
    found = inspect.getattr_static(type(source), name, None)
    if isinstance(found, types.FunctionType):
        return types.MethodType(found, hybrid)
    try:
        return getattr(source, name)
    except AttributeError:
        raise missing from None
