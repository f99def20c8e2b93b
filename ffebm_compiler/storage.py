"""Save hybrids: JSON and safetensors, no pickle.

A folder holds `hybrid.json` (settings, and the structure of the example inputs), `plan.json` and
`weights.safetensors` (the `state_dict`, each tensor once). `loading.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from ffebm_compiler.errors import ExportError
from ffebm_compiler.example_inputs import check_described
from ffebm_compiler.files.checked_json import Malformed
from ffebm_compiler.files.paths import path_of
from ffebm_compiler.files.whole_files import saying
from ffebm_compiler.files.whole_folders import whole_folder
from ffebm_compiler.hybrid_state import state_of
from ffebm_compiler.module_paths import state_of_module
from ffebm_compiler.stored_containers import stored_recipe

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore

__all__ = ["FILES", "SCHEMA", "save"]

SCHEMA = 2
"""Schema version of `hybrid.json`."""
FILES = ("hybrid.json", "plan.json", "weights.safetensors", "loop_gain.safetensors")


def save(hybrid: HybridCore, path: str | Path) -> None:
    """Write a hybrid into a folder. An earlier save there is replaced as a whole, or left as it is if writing fails.

    Raises:
        ExportError: the path cannot be written or holds something else, or a setting of the
            hybrid cannot be stored.
    """
    target = path_of(path, "the folder to write")
    conversion = hybrid.conversion
    if conversion is None or conversion.dynamic_shapes == "custom":
        raise ExportError(
            "a hybrid converted with custom dynamic_shapes cannot be saved: write the plan with "
            "hybrid.plan.to_json('plan.json') and the weights with torch.save(hybrid.state_dict(), 'weights.pt'). "
            "Later call convert(..., plan=ffebm.Plan.from_json('plan.json')) and load_state_dict"
        )
    with saying(target, "the hybrid cannot be saved", ExportError):
        if target.exists() and not (target.is_dir() and {f.name for f in target.iterdir()} <= set(FILES)):
            raise ExportError(f"{target} exists and is no saved hybrid: choose another folder, or remove it first")
    state = state_of(hybrid)
    _check_storable(state)
    settings = {
        "schema": SCHEMA,
        "model": hybrid.plan.model,
        "training": hybrid.training,
        # Modules in another mode than the rest, such as a frozen batch norm in eval mode.
        "other_mode": [name for name, module in hybrid.named_modules() if module.training != hybrid.training],
        "frozen": [name for name, parameter in hybrid.named_parameters() if not parameter.requires_grad],
        "energy": state["energy"],
        "conversion": {
            "structure": conversion.structure,
            "leaves": list(conversion.leaves),
            "dynamic_shapes": conversion.dynamic_shapes,
        },
        "feedback_weights": None if hybrid.feedback_weights is None else asdict(hybrid.feedback_weights),
        "state": _without_tensors(state),
    }
    try:
        settings["conversion"]["containers"] = stored_recipe(conversion.containers)
        check_described(conversion.structure, conversion.leaves, "the example inputs")
        text = json.dumps(settings, indent=1)
    except TypeError as error:
        raise ExportError(
            f"an example input cannot be written as JSON ({error}): pass tensors, numbers or texts"
        ) from error
    except Malformed as error:
        raise ExportError(
            f"the example inputs cannot be stored ({error}): convert with plain tensors, in a tuple or a dict"
        ) from error
    weights = hybrid.plain_state_dict(keep_vars=True)
    _check_captured(hybrid, weights)
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise ExportError(
                f"{name!r} of the state is a {type(value).__name__}, which cannot be stored without pickle: let "
                "get_extra_state return a tensor, or write hybrid.state_dict() with torch.save"
            )
        if value.layout is not torch.strided:
            raise ExportError(
                f"{name!r} of the state is a tensor of layout {value.layout}, which safetensors does not hold: keep it "
                "dense, or write hybrid.state_dict() with torch.save"
            )
    with whole_folder(target, failure="the hybrid cannot be saved") as fresh:
        fresh.write("hybrid.json", text + "\n")
        fresh.write("plan.json", json.dumps(hybrid.plan.to_dict(), indent=1) + "\n")
        fresh.write("weights.safetensors", to_bytes(_unique(weights)))
        fresh.write("loop_gain.safetensors", to_bytes(_tensors_of(state)))


def _unique(state: dict[str, Any]) -> dict[str, Tensor]:
    """Each tensor once, under its first name, since safetensors refuses shared memory."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.detach().contiguous().clone()
    return kept


def _check_captured(hybrid: HybridCore, weights: Mapping[str, object]) -> None:
    """Refuse a hybrid whose tensors have other names than at conversion, since `load` makes it from the source."""
    present = dict(state_of_module(hybrid, hybrid._run)).keys()
    added = [name for name in weights if name in present and name not in hybrid._captured]
    gone = sorted(hybrid._captured.keys() - present - weights.keys())
    if added or gone:
        what = f"{added[0]!r} was added to" if added else f"{gone[0]!r} was taken from"
        raise ExportError(
            f"{what} the hybrid after conversion, and ffebm.load() makes the hybrid from its source, which "
            f"{'lacks' if added else 'has'} it: change the source and convert it again, or write hybrid.state_dict() "
            "with torch.save"
        )


def _check_storable(state: Mapping[str, Any]) -> None:
    if state["energy"] is None:
        raise ExportError(
            "the energy of the blocks is of a class of your own, which cannot be stored: write the plan with "
            "hybrid.plan.to_json('plan.json') and the weights with torch.save(hybrid.state_dict(), 'weights.pt'). "
            "Later call convert(..., energy=..., plan=ffebm.Plan.from_json('plan.json')) and load_state_dict"
        )
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
    return {name: value for name, value in state.items() if name != "energy"} | {"blocks": blocks}
