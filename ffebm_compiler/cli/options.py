"""The options that the commands share. They are one dataclass, and every command's `--help` is made of it.

A command takes `settings: Settings` and options of its own. `with_settings` gives it the parameters that typer reads.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.cli import completion
from ffebm_compiler.cli.models import feedback_of, hardware_of, load_model, random_inputs
from ffebm_compiler.cli.weights import load_weights
from ffebm_compiler.hardware.fabric import Hardware

__all__ = ["Force", "NoVerify", "Settings", "Tolerance", "check_alone", "check_free", "with_settings"]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="package.module:callable or file.py:callable, called without arguments, returns the nn.Module; or "
        "timm:NAME, torchvision:NAME, transformers:NAME with random weights, e.g. "
        "'transformers:GPT2Config(n_layer=2)'; or a .pt2 file of torch.export.save, which can run code.",
        autocompletion=completion.models,
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare the written files in onnxruntime with the hybrid.")
]
Tolerance = Annotated[
    float, typer.Option("--tolerance", help="Largest relative deviation of outputs; more is an error.", min=0.0)
]
LARGEST_SEED = 2**64 - 1
"""torch takes no larger one."""
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


@dataclass(frozen=True)
class Settings:
    """Everything that a command needs to make a plan or a hybrid."""

    model: Model
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="SHAPE",
            help="An input's shape, batch first, as 1x3x32x32, 1x16:int64 or mask=1x16:bool; repeat it for each input. "
            "Models of a library and .pt2 files have a default.",
        ),
    ] = None
    weights: Annotated[
        Path | None, typer.Option("--weights", help="A state_dict to load first: .safetensors, or from torch.save.")
    ] = None
    hardware: Annotated[
        str,
        typer.Option(
            "--hardware",
            "-w",
            autocompletion=completion.hardware,
            help="ideal, crossbar-64, crossbar-256, pcm-64, pcm-64-one-phase, neurram, isaac, a .toml or a .json file.",
        ),
    ] = "crossbar-256"
    energy: Annotated[
        str,
        typer.Option(
            "--energy",
            autocompletion=completion.words("hopfield", "resistive", "unamplified", "drn"),
            help="What the blocks minimise: hopfield, resistive, unamplified, drn.",
        ),
    ] = "hopfield"
    feedback: Annotated[
        str | None,
        typer.Option(
            "--feedback",
            "-f",
            help="Loop gain between 0 and 1, or symmetric; 0.1 if left out. With --energy resistive or unamplified a "
            "gain above 0; 0.01 if left out. drn takes symmetric alone.",
        ),
    ] = None
    gradient: Annotated[
        str,
        typer.Option(
            "--gradient",
            autocompletion=completion.words(
                "ep", "implicit", "unrolled", "contrastive", "coupled", "cost-nudged", "truncated", "recurrent"
            ),
            help="ep, implicit, unrolled, contrastive, coupled, cost-nudged, truncated or recurrent; docs/training.md.",
        ),
    ] = "ep"
    feedback_weights: Annotated[
        str,
        typer.Option(
            "--feedback-weights",
            autocompletion=completion.words("tied", "free"),
            help="tied, or free: feedback through weights of its own (no energy then).",
        ),
    ] = "tied"
    fold_batchnorm: Annotated[
        bool, typer.Option("--fold-batchnorm", help="Fold batch norm into the layer before it.")
    ] = False
    block_ops: Annotated[
        str,
        typer.Option("--block-ops", help="Wiring allowed inside a block, joined by commas, e.g. add,reshape,avg_pool."),
    ] = "add,reshape"
    digital_drive: Annotated[
        bool,
        typer.Option(
            "--digital-drive", help="Let a block hold activations of digital values, as a ReLU behind batch norm."
        ),
    ] = False
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            autocompletion=completion.words("conversions", "energy"),
            help="What the partition minimises: conversions, or energy (modelled).",
        ),
    ] = "conversions"
    for_: Annotated[
        str,
        typer.Option(
            "--for",
            autocompletion=completion.words("inference", "training"),
            help="With --objective energy: of an inference, or of a training step.",
        ),
    ] = "inference"
    force_digital: Annotated[
        list[str] | None, typer.Option("--force-digital", help="Keep modules of this pattern digital, e.g. 'layer4.*'.")
    ] = None
    force_analog: Annotated[
        list[str] | None,
        typer.Option("--force-analog", help="Layers of this pattern must be analog: an error if one is too large."),
    ] = None
    on_unsupported: Annotated[
        str,
        typer.Option(
            "--on-unsupported",
            autocompletion=completion.words("digital", "error"),
            help="A layer that cannot be analog stays 'digital', or is an 'error'.",
        ),
    ] = "digital"
    seed: Annotated[int, typer.Option("--seed", help="Seed of random weights and inputs.", min=0, max=LARGEST_SEED)] = 0

    def fabric(self) -> Hardware:
        """The hardware."""
        return hardware_of(self.hardware)

    def source(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """The model with its weights, and its own inputs or random ones."""
        torch.manual_seed(self.seed)
        named = load_model(self.model)
        if self.weights is not None:
            load_weights(named.module, self.weights)
        if named.example is not None and not self.inputs:
            return named.module, *named.example
        args, kwargs = random_inputs(self.inputs or named.inputs, self.seed)
        return named.module, args, kwargs

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `plan` and `convert`, without the hardware."""
        return {
            "fold_batchnorm": self.fold_batchnorm,
            "block_ops": tuple(part.strip() for part in self.block_ops.split(",") if part.strip()),
            "digital_drive": self.digital_drive,
            "objective": self.objective,
            "for_": self.for_,
            "force_digital": self.force_digital or (),
            "force_analog": self.force_analog or (),
            "on_unsupported": self.on_unsupported,
        }

    def converted(self) -> tuple[ffebm.HybridModel, tuple[Any, ...], dict[str, Any]]:
        """The converted model, and the inputs that it was converted with."""
        gain, fabric = feedback_of(self.feedback), self.fabric()
        module, args, kwargs = self.source()
        with Console(stderr=True).status(f"converting {self.model}"):
            hybrid = ffebm.convert(
                module,
                args,
                kwargs,
                hardware=fabric,
                feedback=gain,
                energy=self.energy,
                gradient=self.gradient,
                feedback_weights=self.feedback_weights,
                **self.options(),
            )
        return hybrid, args, kwargs


def with_settings(without: Sequence[str] = (), **instead: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a parameter for each field of `Settings`, before its own.

    Args:
        without: fields that the command does not need.
        instead: annotations that replace those of fields.
    """

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        hints = {**get_type_hints(Settings, include_extras=True), **instead}
        shared = [field for field in fields(Settings) if field.name not in without]
        own = get_type_hints(command, include_extras=True)
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in shared
        ]
        parameters += [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.name != "settings"
        ]

        def run(**given: Any) -> None:
            settings = Settings(**{field.name: given.pop(field.name) for field in shared})
            command(settings=settings, **given)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorated


def check_free(path: Path | None, force: bool) -> None:
    """Refuse to replace a file without `force`.

    Raises:
        InputError: the file exists.
    """
    if path is not None and os.path.exists(path) and not force:
        raise ffebm.InputError(f"{path} exists already: add --force to replace it, or name another file with --out")


def check_alone(context: typer.Context, allowed: Sequence[str]) -> None:
    """Refuse options that a stored plan already holds.

    Raises:
        InputError: such an option is given.
    """
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise ffebm.InputError(
                f"{option.opts[0]} is given beside a stored plan, which has its settings already: leave it out, or "
                "name the model instead of the plan"
            )
