"""Build models and inputs from their names on the command line."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.cli.libraries import timm_model, torchvision_model, transformers_model
from ffebm_compiler.cli.model_files import MODEL_FILES, model_of_file
from ffebm_compiler.cli.named_model import NamedModel, built, first_line
from ffebm_compiler.convert import DEFAULT_FEEDBACK
from ffebm_compiler.errors import InputError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import resolve_hardware

__all__ = ["feedback_of", "hardware_of", "load_model", "load_weights", "random_inputs"]

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}


def load_model(name: str) -> NamedModel:
    """The model with this name, in eval mode.

    `package.module:callable` calls the callable. `timm:resnet18`, `torchvision:resnet18`, `transformers:bert` (a model
    type), `transformers:BertModel` (a class) and `transformers:BertConfig(num_hidden_layers=2)` build the architecture
    with random weights. Nothing is downloaded. A name that ends in .pt2 is a file of `torch.export.save`.

    Raises:
        InputError: the name, the import, the call or its result is wrong.
    """
    if name.lower().endswith(MODEL_FILES) and (":" not in name or Path(name).exists()):
        return model_of_file(Path(name))
    library, colon, attribute = name.partition(":")
    if not colon or not library or not attribute:
        raise InputError(
            f"the model is named {name!r}; expected package.module:callable, timm:NAME, torchvision:NAME, "
            "transformers:NAME or a .pt2 file"
        )
    with_library: Mapping[str, Callable[[str], NamedModel]] = {
        "timm": timm_model,
        "torchvision": torchvision_model,
        "transformers": transformers_model,
    }
    model = with_library[library](attribute) if library in with_library else _callable(library, attribute)
    model.module.eval()
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a `state_dict` from a .safetensors file or one of `torch.save` (read without running code).

    Raises:
        InputError: where the file cannot be read or does not fit the model.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # every format has its own errors
        raise InputError(
            f"the weights {path} cannot be loaded ({first_line(error)}): expected a state_dict of this model, as "
            ".safetensors or from torch.save"
        ) from error


def random_inputs(texts: Sequence[str], seed: int) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """(args, kwargs) of random tensors for descriptions such as `1x3x32x32`, `1x16:int64`, `mask=1x16:bool`.

    Floating-point values are normal, integers and booleans 0 or 1 (valid indices of any embedding).

    Raises:
        InputError: for a description of another form, or none.
    """
    if not texts:
        raise InputError("no input is described: add --input with its shape, batch first, e.g. --input 1x3x32x32")
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in texts:
        match = _SHAPE.fullmatch(text)
        dtype = _DTYPES.get(match["dtype"] or "float32") if match else None
        if match is None or dtype is None:
            raise InputError(
                f"--input is {text!r}; expected sizes joined by x, e.g. 1x3x32x32, if need be with a dtype and the "
                f"argument's name, e.g. mask=1x16:bool. The dtypes are {', '.join(_DTYPES)}"
            )
        sizes = [int(size) for size in match["shape"].split("x")]
        if 0 in sizes or math.prod(sizes) > 1 << 30:
            raise InputError(f"--input is {text!r}; expected sizes of at least 1 and at most 2^30 values")
        if dtype.is_floating_point:
            value = torch.randn(sizes, generator=generator).to(dtype)
        else:
            value = torch.randint(0, 2, sizes, generator=generator).to(dtype)
        if match["name"]:
            kwargs[match["name"]] = value
        else:
            args.append(value)
    return tuple(args), kwargs


def hardware_of(text: str) -> Hardware:
    """A preset's hardware, or that of a TOML or JSON file.

    Raises:
        HardwareError: for an unknown preset or a file that describes no hardware.
    """
    if text.lower().endswith((".toml", ".json")):
        return Hardware.from_file(text)
    return resolve_hardware(text)


def feedback_of(text: str | None) -> float | str:
    """The feedback as a number or `"symmetric"`; `"default"` if the text is None. `convert` checks its range.

    Raises:
        InputError: the text is neither.
    """
    if text is None:
        return DEFAULT_FEEDBACK
    if text == "symmetric":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"--feedback is {text!r}; expected a number such as 0.1, or symmetric") from error


def _callable(module_name: str, attribute: str) -> NamedModel:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.insert(0, folder)  # as `python -m` does
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # the module runs its own code
        hint = f": name it without .py, {module_name[:-3]}:{attribute}" if module_name.endswith(".py") else ""
        raise InputError(f"the module {module_name!r} cannot be imported ({first_line(error)}){hint}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"{module_name} has no {attribute!r}: name a function or class that returns the model when it is "
                "called without arguments"
            )
        found = getattr(found, part)
    return NamedModel(built(f"{module_name}:{attribute}", found))
