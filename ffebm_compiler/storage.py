"""Save and load hybrids: JSON and safetensors, no pickle.

A folder holds `hybrid.json` (settings, and the structure of the example inputs), `plan.json` and
`weights.safetensors` (the `state_dict`, each tensor once). Loading needs the model's code, as any
`state_dict` does: the model is captured again, with zeros of the stored shapes as example inputs.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ffebm_compiler.checked_json import Malformed
from ffebm_compiler.errors import ExportError, FFEBMError, InputError
from ffebm_compiler.example_inputs import check_described, described, example_inputs
from ffebm_compiler.hybrid_state import METADATA, state_of
from ffebm_compiler.passes.containers import PLAIN, Form, Recipe
from ffebm_compiler.plan import Plan
from ffebm_compiler.recast import dtype_of
from ffebm_compiler.saved_settings import (
    REMEDY,
    check_state,
    check_tracks,
    check_weights,
    read_settings,
)
from ffebm_compiler.stored_containers import stored_recipe
from ffebm_compiler.tensor_file import read_tensors
from ffebm_compiler.whole_files import saying
from ffebm_compiler.whole_folders import recover_folder, whole_folder

if TYPE_CHECKING:
    from ffebm_compiler.hybrid import HybridModel

__all__ = ["Conversion", "load", "save"]

_SCHEMA = 2
_FILES = ("hybrid.json", "plan.json", "weights.safetensors", "loop_gain.safetensors")


@dataclass(frozen=True)
class Conversion:
    """What `convert` was called with, as far as a plan does not hold it."""

    structure: str
    """The pytree of (args, kwargs), as JSON."""
    leaves: tuple[dict[str, Any], ...]
    """Shape and dtype of each tensor among the example inputs; the value of what is none."""
    dynamic_shapes: str | None
    """`"batch"` or None; `"custom"` for what cannot be stored."""
    containers: Recipe = PLAIN
    """How containers of classes of the user's own among the inputs are built."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Conversion:
        """The record of a call."""
        leaves, form = Form.of((args, kwargs))
        kept = dynamic_shapes if dynamic_shapes in ("batch", None) else "custom"
        return cls(pytree.treespec_dumps(form.spec), tuple(map(described, leaves)), kept, form.recipe)

    def examples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example inputs of the same shapes: zeros."""
        leaves = [
            torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"])) if "shape" in leaf else leaf["value"]
            for leaf in self.leaves
        ]
        args, kwargs = Form(pytree.treespec_loads(self.structure), self.containers).build(leaves)
        return args, kwargs


def save(hybrid: HybridModel, path: str | Path) -> None:
    """Write a hybrid into a folder; an earlier save there is replaced as a whole, or left as it is where that fails.

    Raises:
        ExportError: where the path cannot be written or holds something else, or a setting of the
            hybrid cannot be stored.
    """
    target = Path(path)
    conversion = hybrid.conversion
    if conversion is None or conversion.dynamic_shapes == "custom":
        raise ExportError(
            "a hybrid converted with dynamic_shapes of your own cannot be saved: save hybrid.plan.to_json() and "
            "hybrid.state_dict(), and call convert(..., plan=...) again"
        )
    with saying(target, "the hybrid cannot be saved", ExportError):
        if target.exists() and not (target.is_dir() and {f.name for f in target.iterdir()} <= set(_FILES)):
            raise ExportError(f"{target} exists and is no saved hybrid: choose another folder, or remove it first")
    state = state_of(hybrid)
    _check_storable(state)
    settings = {
        "schema": _SCHEMA,
        "model": hybrid.plan.model,
        "training": hybrid.training,
        # Modules that are frozen on their own, such as a batch norm in eval mode while the rest trains.
        "other_mode": [name for name, module in hybrid.named_modules() if module.training != hybrid.training],
        "frozen": [name for name, parameter in hybrid.named_parameters() if not parameter.requires_grad],
        "energy": "hopfield",
        "conversion": {
            "structure": conversion.structure,
            "leaves": list(conversion.leaves),
            "dynamic_shapes": conversion.dynamic_shapes,
        },
        "state": _without_tensors(state),
    }
    try:
        settings["conversion"]["containers"] = stored_recipe(conversion.containers)  # type: ignore[index]
        check_described(conversion.structure, conversion.leaves, "the example inputs")
        text = json.dumps(settings, indent=1)
    except TypeError as error:
        raise ExportError(
            f"an example input cannot be written as JSON ({error}): pass tensors, numbers or texts"
        ) from error
    except Malformed as error:
        raise ExportError(f"the example inputs cannot be stored ({error}): convert with others") from error
    weights = hybrid.state_dict(keep_vars=True)
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{name!r} of the state is a {type(value).__name__}, which cannot be stored without pickle: let "
                "get_extra_state return a tensor, or write hybrid.state_dict() with torch.save"
            )
    with whole_folder(target, failure="the hybrid cannot be saved") as fresh:
        fresh.write("hybrid.json", text + "\n")
        fresh.write("plan.json", json.dumps(hybrid.plan.to_dict(), indent=1) + "\n")
        fresh.write("weights.safetensors", to_bytes(_unique(weights)))
        fresh.write("loop_gain.safetensors", to_bytes(_tensors_of(state)))


def load(path: str | Path, model: nn.Module) -> HybridModel:
    """Read a hybrid that `save` wrote, for a model of the same class and sizes.

    Args:
        path: the folder.
        model: the source, with any weights; never changed.

    Raises:
        InputError: where a file is missing or malformed.
        PlanError: where the model is another than the saved one.
    """
    from ffebm_compiler.convert import convert

    folder = Path(path)
    recover_folder(folder)
    missing = [name for name in _FILES if not os.path.isfile(folder / name)]
    if missing:
        raise InputError(f"{folder} is no saved hybrid: {', '.join(missing)} is missing; write one with hybrid.save()")
    path = folder / "hybrid.json"
    settings, values = read_settings(path, _SCHEMA)
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
        hybrid = convert(model, args, kwargs, hardware=plan.hardware, dynamic_shapes=kept.dynamic_shapes, plan=plan)
    except FFEBMError as error:
        raise type(error)(f"{folder} does not fit the model: {error}") from error
    present = hybrid.state_dict(keep_vars=True)
    check_weights(folder / "weights.safetensors", tensors, present)
    check_state(path, settings, hybrid)
    check_tracks(folder / "loop_gain.safetensors", vectors, settings, hybrid)
    state = _with_tensors(values["state"], vectors)
    aliases = {id(tensor): name for name, tensor in reversed(present.items())}
    full: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in present.items():
        found = tensors.get(aliases[id(tensor)], tensors.get(name))
        if found is not None:
            full[name] = found
            if found.dtype != tensor.dtype:  # converted to another precision before it was saved
                tensor.data = tensor.data.to(found.dtype)
    before, after = dtype_of(model), dtype_of(hybrid)
    if before is not None and after is not None and before is not after:
        hybrid._casts.follow(hybrid, before, after)
    full._metadata = {"": {"version": 1, METADATA: state}}  # type: ignore[attr-defined]
    try:
        hybrid.load_state_dict(full)
    except RuntimeError as error:
        raise InputError(f"the saved weights do not fit the model: {error}") from error
    hybrid.train(settings.training)
    modules, parameters = dict(hybrid.named_modules()), dict(hybrid.named_parameters())
    for name in settings.other_mode:
        modules[name].training = not settings.training
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in settings.frozen)
    return hybrid


def _unique(state: dict[str, Any]) -> dict[str, Tensor]:
    """Each tensor once, under its first name: safetensors refuses shared memory."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.detach().contiguous().clone()
    return kept


def _check_storable(state: Mapping[str, Any]) -> None:
    for name, block in state["blocks"].items():
        for what, known in (("gradient", "gradient estimator"), ("solver", "solver")):
            if block[what] is not None and block[what]["kind"] is None:
                raise ExportError(
                    f"the {known} of {name} is of a class of your own, which cannot be stored: set one of "
                    "ffebm_compiler's before saving"
                )


def _tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state, by block, edge and name."""
    return {
        f"{block}/{edge}/{name}": value.detach().contiguous().clone()
        for block, kept in state["blocks"].items()
        for edge, track in kept["tracks"].items()
        for name, value in track.items()
        if isinstance(value, Tensor)
    }


def _without_tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without its tensors: JSON values."""
    blocks = {
        block: {
            **kept,
            "tracks": {
                edge: {name: value for name, value in track.items() if not isinstance(value, Tensor)}
                for edge, track in kept["tracks"].items()
            },
        }
        for block, kept in state["blocks"].items()
    }
    return {**state, "blocks": blocks}


def _with_tensors(state: dict[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inverse of the two above."""
    for key, value in tensors.items():
        block, edge, name = key.rsplit("/", 2)
        state["blocks"][block]["tracks"][edge][name] = value
    return state
