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
from ffebm_compiler.runtime.feedforward.state import WriteInput, WriteState

__all__ = ["warn_of_train_mode", "warn_of_written_state"]


def warn_of_written_state(hybrid: HybridCore) -> None:
    """Issue an `FFEBMWarning` that names the parameters, buffers and inputs which a forward in eval mode writes."""
    run = [part for path, part in hybrid.lowered.named_modules() if "training_part" not in path.split(".")]
    written = _listed({module.name for module in run if isinstance(module, WriteState)})
    if written:
        warnings.warn(
            f"forward writes {written} at every call, which the export does not. Each of its runs starts from "
            "the present values",
            FFEBMWarning,
            stacklevel=4,
        )
    given = _listed({module.name for module in run if isinstance(module, WriteInput)})
    if given:
        warnings.warn(
            f"forward writes into its inputs ({given}), which the export does not: it leaves them as they are",
            FFEBMWarning,
            stacklevel=4,
        )


def _listed(names: set[str]) -> str:
    return ", ".join(map(repr, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")


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
