"""Check a model before it is captured: it must be an ordinary eager module with finite numbers.

Promise: a refusal names the part and says what to do, before anything slow happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from ffebm_compiler.errors import InputError, UnsupportedError

__all__ = ["check_finite", "check_model", "has_no_memory"]

_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)
_FLOAT = "pass the float model. convert(..., devices=ffebm.Devices(weight_bits=8)) simulates weights of few bits"


def check_model(model: object) -> None:
    """Refuse anything but an ordinary eager module, and say what to pass instead."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"convert needs a torch.nn.Module, got {type(model).__name__}: pass the model object itself, "
            "not its class, its weights or a function"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is a TorchScript module, which hides its Python forward: pass the eager nn.Module")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise InputError(f"the model is wrapped in {type(model).__name__}: convert model.module, then wrap the hybrid")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
            raise InputError(
                f"parameter {name!r} is not initialised yet (a lazy module): run the model once on an input first"
            )
        if tensor.layout in _COMPRESSED:
            raise InputError(
                f"{name!r} is a sparse tensor of layout {tensor.layout}, which torch.export cannot trace: register it "
                "as to_sparse_coo(), or dense"
            )
        if tensor.is_quantized:
            raise InputError(f"{name!r} is quantised: {_FLOAT}")
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        if getattr(torch.nn.modules.module, f"_global_{kind}_hooks"):
            raise UnsupportedError(
                f"torch has a {kind.replace('_', ' ')} hook for all modules of the process (register_module_..._hook): "
                "a hybrid runs blocks in place of modules, so the hook would see those; remove it before converting"
            )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"module {name!r} is a TorchScript module, which hides its Python forward: put the eager nn.Module in "
                "its place"
            )
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
            raise InputError(f"module {name!r} is quantised: {_FLOAT}")
        if module._backward_hooks or module._backward_pre_hooks:
            raise UnsupportedError(
                f"module {name!r} has a backward hook (register_full_backward_hook), which is never called, since "
                "a hybrid runs blocks in place of modules; use Tensor.register_hook in forward, or remove it"
            )


def has_no_memory(model: nn.Module) -> bool:
    """Whether a parameter or buffer is on the meta device: it has a shape and no values."""
    return any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def check_finite(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse NaN or infinite weights, and NaN in the example inputs."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        tensor = parameter.detach()  # torch compares no tensor of inference mode that requires a gradient
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(f"parameter {name!r} has {bad} values that are NaN or infinite: check the checkpoint")
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    for index, leaf in enumerate(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)):
        if leaf.is_floating_point() and not leaf.is_meta and bool(torch.isnan(leaf).any()):
            raise InputError(f"example input {index} of shape {tuple(leaf.shape)} holds NaN: check the data")
