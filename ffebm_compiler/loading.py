"""Load hybrids that `storage.save` wrote.

Loading needs the model's code, as it does for a `state_dict`. The model is captured again, with zeros of the stored
shapes as example inputs.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ffebm_compiler.convert import convert
from ffebm_compiler.device_state import restore_devices
from ffebm_compiler.errors import FFEBMError, InputError
from ffebm_compiler.example_inputs import example_inputs
from ffebm_compiler.files.checked_json import Malformed
from ffebm_compiler.files.tensor_file import read_tensors
from ffebm_compiler.files.whole_folders import recover_folder
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.hybrid_state import METADATA
from ffebm_compiler.inference import outside_inference
from ffebm_compiler.plan import Plan
from ffebm_compiler.recast import dtype_of
from ffebm_compiler.saved_settings import REMEDY, check_state, check_tracks, check_weights, read_settings
from ffebm_compiler.storage import FILES, SCHEMA

__all__ = ["load"]


@outside_inference()
def load(path: str | Path, model: nn.Module) -> HybridModel:
    """Read a hybrid that `save` wrote, for a model of the same class and sizes.

    Args:
        path: the folder.
        model: the source, with any weights. It is not changed.

    Raises:
        InputError: a file is missing or malformed.
        PlanError: the model differs from the saved one.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is a {type(path).__name__}; expected the folder that hybrid.save() wrote")
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; expected the source's nn.Module, with any weights")
    folder = Path(path)
    recover_folder(folder)
    missing = [name for name in FILES if not os.path.isfile(folder / name)]
    if missing:
        raise InputError(f"{folder} is no saved hybrid ({_lacking(folder, missing)}): write one with hybrid.save()")
    path = folder / "hybrid.json"
    settings, values = read_settings(path, SCHEMA)
    kept = settings.conversion
    try:
        first = next((p for p in model.parameters() if p.is_floating_point()), None)
        device = None if first is None else first.device
        args, kwargs = example_inputs(kept.structure, kept.leaves, kept.containers, "conversion", device)
    except Malformed as error:
        raise InputError(f"{path} is malformed ({error}): {REMEDY}") from error
    tensors = read_tensors(folder / "weights.safetensors", InputError, REMEDY)
    vectors = read_tensors(folder / "loop_gain.safetensors", InputError, REMEDY)
    plan = Plan.from_json(folder / "plan.json")
    try:
        hybrid = convert(
            model,
            args,
            kwargs,
            hardware=plan.hardware,
            energy=settings.energy,
            dynamic_shapes=kept.dynamic_shapes,
            feedback_weights=settings.feedback_weights or "tied",
            plan=plan,
        )
    except FFEBMError as error:
        raise type(error)(f"{folder} does not fit the model: {error}") from error
    if values["state"].get("devices") is not None:
        restore_devices(hybrid, values["state"]["devices"])
    present = hybrid.plain_state_dict(keep_vars=True)
    check_weights(folder / "weights.safetensors", tensors, present)
    check_state(path, settings, hybrid)
    check_tracks(folder / "loop_gain.safetensors", vectors, settings, hybrid)
    state = _with_tensors({**values["state"], "energy": settings.energy}, vectors)
    aliases = {id(tensor): name for name, tensor in reversed(present.items())}
    full: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in present.items():
        found = tensors.get(aliases[id(tensor)], tensors.get(name))
        if found is not None:
            full[name] = found
            if found.dtype != tensor.dtype:  # the hybrid was converted to another precision before it was saved
                tensor.data = tensor.data.to(found.dtype)
    before, after = dtype_of(model), dtype_of(hybrid)
    if before is not None and after is not None and before is not after:
        hybrid._casts.follow(hybrid, before, after)
    full._metadata = {"": {"version": 1, METADATA: state}}  # type: ignore[attr-defined]
    try:
        hybrid.plain_load_state_dict(full)
    except RuntimeError as error:
        raise InputError(f"the saved weights do not fit the model: {error}") from error
    hybrid.train(settings.training)
    modules, parameters = dict(hybrid.named_modules()), dict(hybrid.named_parameters())
    for name in settings.other_mode:
        modules[name].training = not settings.training
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in settings.frozen)
    return hybrid


def _lacking(folder: Path, missing: list[str]) -> str:
    """Why a folder is no saved hybrid."""
    if not os.path.lexists(folder):
        return "there is no such folder"
    if not os.path.isdir(folder):
        return (
            "it is a file, and a saved hybrid is a folder; hybrid.load_state_dict() takes the content of a state dict"
        )
    return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"


def _with_tensors(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put the tensors back into a state from which `storage` took them out."""
    for key, value in tensors.items():
        block, edge, name = key.rsplit("/", 2)
        state["blocks"][block]["tracks"][edge][name] = value
    return state
