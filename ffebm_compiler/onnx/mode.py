"""Mode: warn where it matters that exports are in eval mode and write no state."""

from __future__ import annotations

import warnings

from ffebm_compiler.errors import FFEBMWarning
from ffebm_compiler.hybrid_core import HybridCore
from ffebm_compiler.runtime.feedforward.blocks import (
    ReboundAttention,
    ReboundBatchNorm,
    ReboundDropout,
    ReboundInstanceNorm,
)
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch, TrainingMask
from ffebm_compiler.runtime.feedforward.state import WriteState

__all__ = ["warn_of_train_mode", "warn_of_written_state"]


def warn_of_written_state(hybrid: HybridCore) -> None:
    """Issue an `FFEBMWarning` that names the parameters and buffers which a forward in eval mode writes."""
    written = {
        module.name
        for path, module in hybrid.lowered.named_modules()
        if isinstance(module, WriteState) and "training_part" not in path.split(".")
    }
    if written:
        named = ", ".join(map(repr, sorted(written)[:3])) + (", ..." if len(written) > 3 else "")
        warnings.warn(
            f"forward writes {named} at every call, which the export does not. Each of its runs starts from "
            "the present values",
            FFEBMWarning,
            stacklevel=4,
        )


def warn_of_train_mode(hybrid: HybridCore) -> None:
    """Issue an `FFEBMWarning` that names modules which are in train mode and compute something else in it."""
    names = {id(module): name or "the model" for name, module in hybrid.named_modules()}
    found: dict[str, str] = {}
    for module in hybrid.lowered.modules():
        if isinstance(module, ReboundBatchNorm | ReboundInstanceNorm):
            differs = not module.always
        elif isinstance(module, ReboundDropout | ReboundAttention):
            differs = module.rate > 0
        elif isinstance(module, ModeSwitch | TrainingMask):
            differs = True
        else:
            continue
        if differs and module.active:
            found[names.get(id(module.owner), "the model")] = module.operation
    if not found:
        return
    listed = [f"{operation} of {path}" for path, operation in found.items()]
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    warnings.warn(
        f"the hybrid is in train mode ({', '.join(listed[:3])}{more}), the export is in eval mode, with running "
        "statistics and without dropout: call hybrid.eval() first to leave out this warning",
        FFEBMWarning,
        stacklevel=4,
    )
