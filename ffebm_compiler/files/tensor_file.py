"""Reading safetensors files, whatever their header claims."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ffebm_compiler.errors import FFEBMError

__all__ = ["read_tensors"]


def read_tensors(path: Path, error: type[FFEBMError], remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; its bytes are mapped: nothing is allocated that the file does not hold.

    Args:
        path: the file.
        error: class of the errors.
        remedy: ends the sentence.

    Raises:
        FFEBMError: of the class `error`, where it cannot be read, its header is malformed, or torch has no such dtype.
    """
    try:
        return load_file(path)
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror or cause}): {remedy}") from cause
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, OverflowError) as cause:
        raise error(f"{path} is malformed ({type(cause).__name__}: {cause}): {remedy}") from cause
