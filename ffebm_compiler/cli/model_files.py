"""Models in files: programs that `torch.export.save` wrote."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ffebm_compiler.cli.named_model import NamedModel, first_line
from ffebm_compiler.errors import InputError

__all__ = ["MODEL_FILES", "model_of_file"]

MODEL_FILES = (".pt2", ".onnx", ".pt", ".pth", ".safetensors")
"""Endings of a name that is a file, not a module. Only .pt2 is read. The others are refused with a way forward."""

_ONNX = (
    "{name}: ONNX models are not read. The importer onnx2torch 1.5 lacks operators of the files that torch's exporter "
    "writes (opset 18). Name the PyTorch model, save it by torch.export.save as a .pt2 file, or write a function that "
    "returns what your importer makes of the file, and name it as package.module:callable"
)
_WEIGHTS = (
    "{name} holds tensors without the model that they belong to: name the model, and give this file by --weights. A "
    "file of torch.export.save (.pt2) holds both"
)


def model_of_file(path: Path) -> NamedModel:
    """The model in a .pt2 file, with the example inputs that it was exported with.

    torch reads such a file with pickle, so that it can run code: open none of unknown origin.

    Raises:
        InputError: the file cannot be read, or is of another kind.
    """
    suffix = path.suffix.lower()
    if suffix != ".pt2":
        raise InputError((_ONNX if suffix == ".onnx" else _WEIGHTS).format(name=path))
    if not path.is_file():
        raise InputError(f"there is no file {path}: name one that torch.export.save wrote, or package.module:callable")
    try:
        with _quietly():
            program = torch.export.load(path)
            module: nn.Module = program.module()
    except Exception as error:  # torch raises many kinds
        raise InputError(
            f"{path} cannot be read as an exported program ({first_line(error)}): write it by torch.export.save, with "
            f"a torch no newer than {torch.__version__}"
        ) from error
    return NamedModel(module, example=program.example_inputs)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the log and the warnings of torch, which tries older formats after an error and logs a traceback."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
