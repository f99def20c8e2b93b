"""Reading safetensors files, whatever their header claims."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ffebm_compiler.errors import FFEBMError

__all__ = ["read_tensors"]


def read_tensors(path: Path, error: type[FFEBMError], remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Its bytes are mapped, so that a false header cannot make it allocate memory.

    Args:
        path: the file.
        error: class of the errors.
        remedy: ends the error message.

    Raises:
        FFEBMError: of the class `error`; the file cannot be read, its header is malformed, or torch lacks its dtype.
    """
    try:
        return load_file(path)
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause.strerror or cause}): {remedy}") from cause
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, OverflowError) as cause:
        raise error(f"{path} is malformed ({type(cause).__name__}: {cause}): {remedy}") from cause
