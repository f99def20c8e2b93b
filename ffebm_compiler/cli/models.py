"""Build models and inputs from their names on the command line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ffebm_compiler.cli.libraries import timm_model, torchvision_model, transformers_model
from ffebm_compiler.cli.model_files import MODEL_FILES, model_of_file
from ffebm_compiler.cli.named_code import named_object
from ffebm_compiler.cli.named_model import NamedModel, built, evaluating
from ffebm_compiler.convert import DEFAULT_FEEDBACK
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import short
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hardware.presets import resolve_hardware

__all__ = ["feedback_of", "hardware_of", "load_model", "random_inputs"]

_SHAPE = re.compile(r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?")
_DTYPES = {
    name: getattr(torch, name)
    for name in ("float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
}


def load_model(name: str) -> NamedModel:
    """The model with this name, in eval mode.

    `package.module:callable` or `folder/file.py:callable` calls the callable. `timm:resnet18`, `torchvision:resnet18`,
    `transformers:bert` (a model type), `transformers:BertModel` (a class) and
    `transformers:BertConfig(num_hidden_layers=2)` build the architecture with random weights. Nothing is downloaded.
    A name that ends in .pt2 is a file of `torch.export.save`.

    Raises:
        InputError: the name, the import, the call or its result is wrong.
    """
    if name.lower().endswith(MODEL_FILES) and (":" not in name or Path(name).exists()):
        return model_of_file(Path(name))
    file, of_file, attribute = name.partition(".py:")
    library, colon, attribute = (f"{file}.py", ":", attribute) if of_file else name.partition(":")
    if not colon or not library or not attribute:
        raise InputError(
            f"the model is named {name!r}; expected package.module:callable, file.py:callable, timm:NAME, "
            "torchvision:NAME, transformers:NAME or a .pt2 file"
        )
    with_library: Mapping[str, Callable[[str], NamedModel]] = {
        "timm": timm_model,
        "torchvision": torchvision_model,
        "transformers": transformers_model,
    }
    if library in with_library:
        return evaluating(name, with_library[library](attribute))
    return evaluating(name, NamedModel(built(name, named_object(library, attribute))))


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
                f"--input is {short(text)}; expected sizes joined by x, e.g. 1x3x32x32, if need be with a dtype and "
                f"the argument's name, e.g. mask=1x16:bool. The dtypes are {', '.join(_DTYPES)}"
            )
        digits = [size.lstrip("0") for size in match["shape"].split("x")]
        sizes = [
            int(size[:20] or "0") for size in digits
        ]  # int() refuses thousands of digits; 20 are too large as well
        if 0 in sizes or math.prod(sizes) > 1 << 30:
            raise InputError(f"--input is {short(text)}; expected sizes of at least 1 and at most 2^30 values")
        if dtype.is_floating_point:
            value = torch.randn(sizes, generator=generator, device="cpu").to(dtype)
        else:
            value = torch.randint(0, 2, sizes, generator=generator, device="cpu").to(dtype)
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
