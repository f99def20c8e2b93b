"""Load the weights that `--weights` names, or say why a file does not hold those of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.cli.named_model import first_line
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import clipped, short

__all__ = ["load_weights"]

_EXPECTED = "expected a state_dict of this model, as .safetensors or from torch.save"
_STATE = "save the state_dict of the model alone, torch.save(model.state_dict(), FILE)"


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a `state_dict` from a .safetensors file or one of `torch.save` (read without running code).

    Raises:
        InputError: where the file cannot be read or does not fit the model.
    """
    try:
        state = _state_of(path)
    except Exception as error:  # every format has its own errors
        raise _refusal(path, *_unreadable(error)) from error
    other = _no_state(state)
    if other is not None:
        raise _refusal(path, *other)
    try:
        model.load_state_dict(state)
    except Exception as error:  # hooks of the model run their own code
        raise _refusal(path, *_misfit(model, state, error)) from error


def _refusal(path: Path, why: str, remedy: str = _EXPECTED) -> InputError:
    return InputError(f"the weights {path} cannot be loaded ({clipped(why)}): {remedy}")


def _state_of(path: Path) -> Any:
    if path.suffix.lower() == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable(error: Exception) -> tuple[str, str]:
    """Why a file cannot be read, and what to do, without torch's advice on unsafe loading."""
    held = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if held:
        return f"it holds an object, {held[1]}, and not tensors alone", _STATE
    found = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
    return (found[1].strip() if found else first_line(error)), _EXPECTED


def _no_state(state: Any) -> tuple[str, str] | None:
    """Why an object is no state_dict, and what to do. None if it may be one."""
    if not isinstance(state, Mapping):
        return f"it holds an object of type {type(state).__name__}", _EXPECTED
    nested = [name for name, value in state.items() if isinstance(value, Mapping) and _tensors(value)]
    if not nested or _tensors(state):
        return None
    why = f"it is a checkpoint of {', '.join(map(short, state))}, and the weights may be in {short(nested[0])}"
    return why, f"save them alone, torch.save(checkpoint[{short(nested[0])}], FILE)"


def _tensors(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _misfit(model: nn.Module, state: Mapping[str, Any], error: Exception) -> tuple[str, str]:
    """How the names and sizes of tensors differ from the model's, and what to do."""
    own = model.state_dict()
    first = next(iter(own), "")
    prefix = next((name.removesuffix(first) for name in state if str(name).endswith(f".{first}")), "")
    if prefix and {f"{prefix}{key}" for key in own} <= set(state):
        return (
            f"its names begin with {prefix!r}, as those of a model inside of another do, such as DataParallel's",
            f"save the state_dict of the inner model, or the tensors under their names without {prefix!r}",
        )
    lines = [line.strip() for line in str(error).strip().splitlines()]
    listed = isinstance(error, RuntimeError) and len(lines) > 1  # the first line names the model's class alone
    return " ".join(lines[1:]) if listed else first_line(error), _EXPECTED
