"""The options that the commands share, and what they do with them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.cli_models import feedback_of, hardware_of, load_model, load_weights, random_inputs

__all__ = [
    "BlockOps",
    "Feedback",
    "Fold",
    "Force",
    "ForceAnalog",
    "ForceDigital",
    "HardwareName",
    "Inputs",
    "Model",
    "NoVerify",
    "OnUnsupported",
    "Seed",
    "Tolerance",
    "Weights",
    "check_alone",
    "check_free",
    "converted",
    "names_of",
    "prepared",
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:callable, called without arguments, returns the nn.Module; or timm:NAME, "
        "torchvision:NAME, transformers:NAME with random weights.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="SHAPE",
        help="An input's shape, batch first, as 1x3x32x32, 1x16:int64 or mask=1x16:bool; repeat it for each input. "
        "Models of a library have a default.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="A state_dict to load first: .safetensors, or from torch.save.")
]
HardwareName = Annotated[
    str, typer.Option("--hardware", "-w", help="ideal, crossbar-64, crossbar-256, or a .toml or .json file.")
]
Fold = Annotated[bool, typer.Option("--fold-batchnorm", help="Fold batch norm into the layer before it.")]
BlockOps = Annotated[
    str, typer.Option("--block-ops", help="Wiring allowed inside a block, joined by commas, e.g. add,reshape,avg_pool.")
]
ForceDigital = Annotated[
    list[str] | None, typer.Option("--force-digital", help="Keep modules of this pattern digital, e.g. 'layer4.*'.")
]
ForceAnalog = Annotated[list[str] | None, typer.Option("--force-analog", help="Insist on modules of this pattern.")]
OnUnsupported = Annotated[
    str, typer.Option("--on-unsupported", help="A layer that cannot be analog stays 'digital', or is an 'error'.")
]
Feedback = Annotated[str, typer.Option("--feedback", "-f", help="Loop gain between 0 and 1, or symmetric.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random weights and inputs.", min=0)]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not run what was written in onnxruntime beside the hybrid.")
]
Tolerance = Annotated[
    float, typer.Option("--tolerance", help="Largest relative deviation of outputs; more is an error.", min=0.0)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def prepared(
    name: str, inputs: list[str] | None, weights: Path | None, seed: int
) -> tuple[nn.Module, tuple[Tensor, ...], dict[str, Tensor]]:
    """The named model with its weights, and random inputs."""
    torch.manual_seed(seed)
    model = load_model(name)
    if weights is not None:
        load_weights(model.module, weights)
    args, kwargs = random_inputs(inputs or model.inputs, seed)
    return model.module, args, kwargs


def converted(
    name: str,
    inputs: list[str] | None,
    weights: Path | None,
    hardware: str,
    feedback: str,
    fold_batchnorm: bool,
    block_ops: str,
    force_digital: list[str] | None,
    force_analog: list[str] | None,
    on_unsupported: str,
    seed: int,
) -> tuple[ffebm.HybridModel, tuple[Tensor, ...], dict[str, Tensor]]:
    """The named model converted, and the random inputs that it was converted with."""
    gain, fabric = feedback_of(feedback), hardware_of(hardware)
    module, args, kwargs = prepared(name, inputs, weights, seed)
    with Console(stderr=True).status(f"converting {name}"):
        hybrid = ffebm.convert(
            module,
            args,
            kwargs,
            hardware=fabric,
            feedback=gain,
            fold_batchnorm=fold_batchnorm,
            block_ops=names_of(block_ops),
            force_digital=force_digital or (),
            force_analog=force_analog or (),
            on_unsupported=on_unsupported,
        )
    return hybrid, args, kwargs


def names_of(text: str) -> tuple[str, ...]:
    """The names in a list joined by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def check_free(path: Path | None, force: bool) -> None:
    """Refuse to replace a file unless told to.

    Raises:
        InputError: where the file exists.
    """
    if path is not None and os.path.exists(path) and not force:
        raise ffebm.InputError(f"{path} exists already: add --force to replace it, or name another file with --out")


def check_alone(context: typer.Context, allowed: Sequence[str]) -> None:
    """Refuse options that mean nothing for a stored plan.

    Raises:
        InputError: where one is given.
    """
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise ffebm.InputError(
                f"{option.opts[0]} is given beside a stored plan, which has its settings already: leave it out, or "
                "name the model instead of the plan"
            )
