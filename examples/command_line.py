"""The command line that the experiments share: their options, what `--quick` means, errors told in one line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ffebm_compiler as ffebm

__all__ = [
    "add_options",
    "add_places",
    "chosen",
    "device_of",
    "feedback_of",
    "positive",
    "positive_number",
    "read_options",
    "told",
]


def add_options(parser: argparse.ArgumentParser, out: str, epochs: int, seeds: int = 3) -> None:
    """Options of the experiments that train."""
    add_places(parser, out)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--epochs", type=positive, default=epochs or None)
    parser.add_argument("--seeds", type=positive, default=seeds)


def add_places(parser: argparse.ArgumentParser, out: str) -> None:
    """Where the data and the results are, and a quick look."""
    parser.add_argument("--data", default="digits", help="name of a data set of experiment_data.py")
    parser.add_argument("--folder", type=Path, help="folder with the files of the data set")
    parser.add_argument("--quick", action="store_true", help="one seed, few epochs, a small network, where not given")
    parser.add_argument("--out", type=Path, default=Path(out))


def read_options(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None, **quick: Any
) -> argparse.Namespace:
    """The options of the command line. With `--quick` the values in `quick` are the defaults of those not given."""
    options = parser.parse_args(arguments)
    if quick and options.quick:
        parser.set_defaults(**quick)
        options = parser.parse_args(arguments)
    return options


def positive(text: str) -> int:
    """A whole number of at least 1, of the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """A number above 0, of the command line."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, not {text!r}")
    return value


def device_of(options: argparse.Namespace) -> torch.device:
    """The device of the command line.

    Raises:
        InputError: there is none of that name, or it is not here.
    """
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ffebm.InputError(f"device is {options.device!r}, which cannot be used ({reason}): give cpu") from None
    return device


def chosen(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Some of the options, as an experiment's settings."""
    return {name: getattr(options, name) for name in names}


def feedback_of(text: str) -> float | str:
    """`convert`'s feedback from a word of the command line: a loop gain, or symmetric.

    Raises:
        InputError: it is neither.
    """
    if text == "symmetric":
        return text
    try:
        return float(text)
    except ValueError:
        raise ffebm.InputError(f"feedback is {text!r}; expected a loop gain such as 0.1, or symmetric") from None


@contextmanager
def told(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Tell errors of the user in one line, with exit status 2."""
    try:
        yield
    except ffebm.FFEBMError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
