"""The command `ffebm`: demo, plan, convert, check, draw, export, spice, doctor."""

from __future__ import annotations

import inspect
import json
import logging
import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler.cli.doctor import doctor
from ffebm_compiler.cli.errors import Commands, show_warning
from ffebm_compiler.cli.options import Force, NoVerify, Settings, Tolerance, check_alone, check_free, with_settings
from ffebm_compiler.cli.plan import plan
from ffebm_compiler.cli.printing import Json, say, say_json
from ffebm_compiler.passes.containers import leaves_of
from ffebm_compiler.reports.text import block_facts

__all__ = ["main"]

main = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Compile PyTorch networks to feedforward-tied energy-based models, the model class of hybrid analog/digital "
    "accelerators. Start with [bold]ffebm demo[/bold], or with [bold]ffebm plan[/bold] on your own model.",
    epilog="Exit codes: 0 done, 1 a target of the demo or of check was missed, 2 an error, in one line on stderr, 130 "
    "interrupted by Ctrl-C.",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"ffebm-compiler {ffebm.__version__} (torch {torch.__version__})")
        raise typer.Exit


@main.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show the log and warnings of other packages.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(name)s: %(message)s")
    if not verbose:
        warnings.simplefilter("ignore")
        warnings.simplefilter("default", ffebm.FFEBMWarning)
    warnings.showwarning = show_warning


@main.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder: new, empty, or of an earlier demo.")] = Path(
        "out/demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of weights and batches.")] = 0,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of backpropagation.")] = 8,
    ep_epochs: Annotated[int, typer.Option("--ep-epochs", help="Epochs of equilibrium propagation.")] = 5,
    sweep: Annotated[bool, typer.Option("--sweep", help="Add a table of accuracy against loop gain.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the final table only.")] = False,
    as_json: Json = False,
) -> None:
    """Train a small CNN on digits, convert, check, fine-tune with EP, draw and export it (a minute).

    Ends with a table of numbers and targets; exit code 1 if one was missed.
    """
    from ffebm_compiler.demo.main import DemoSettings, run_demo

    met = run_demo(DemoSettings(out, seed, epochs, ep_epochs, sweep), Console(quiet=as_json), quiet)
    if as_json:
        say_json(json.loads((out / "results.json").read_text(encoding="utf-8")))
    if not met:
        raise typer.Exit(1)


main.command()(plan)
main.command()(doctor)


@main.command()
@with_settings()
def convert(
    settings: Settings,
    costs: Annotated[bool, typer.Option("--costs", help="Add the modelled energy and latency.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Save the hybrid to this folder, for ffebm.load.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model, run it on random input, and print how each block settles and how far it is from the source.

    Example: ffebm convert mypackage.models:resnet --input 1x3x32x32 --feedback 0.3
    """
    hybrid, args, kwargs = settings.converted()
    if out is not None:
        hybrid.save(out)
    comparison = hybrid.compare(*args, **kwargs)
    if as_json:
        found = {"plan": hybrid.plan.to_dict(), "blocks": block_facts(hybrid), "deviation": asdict(comparison)}
        more = {"costs": hybrid.cost_report().to_dict()} if costs else {}
        say_json({**found, **more, "saved": None if out is None else str(out)})
        return
    say(hybrid.summary())
    say(str(comparison))
    if costs:
        say(str(hybrid.cost_report()))
    if out is not None:
        say(f"saved to {out}")


@main.command()
@with_settings()
def check(
    settings: Settings,
    min_cosine: Annotated[
        float | None,
        typer.Option("--min-cosine", help="Exit with 1 if the cosine of --gradient is below this anywhere."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare gradients with unrolled ones in float64, on random input: of EP, implicit differentiation, --gradient.

    Example: ffebm check ffebm_compiler.demo.models:DigitsCNN --input 4x1x8x8 --fold-batchnorm --min-cosine 0.999
    """
    if min_cosine is not None and math.isnan(min_cosine):
        raise ffebm.InputError("--min-cosine is nan, which no cosine reaches: give a number such as 0.999")
    hybrid, args, kwargs = settings.converted()
    given = dict(zip(inspect.signature(hybrid).parameters, args, strict=False)) | kwargs if kwargs else args
    report = ffebm.check_gradients(hybrid, given, _random_loss)
    name, agreement = report.worst(report.own)
    if as_json:
        say_json({**asdict(report), "worst": {"parameter": name, **asdict(agreement)}})
    else:
        say(str(report))
        say(f"worst cosine of {report.own}: {agreement.cosine:.6f} ({name})")
    if min_cosine is not None and not agreement.cosine >= min_cosine:
        raise typer.Exit(1)


@main.command()
@with_settings(
    model=Annotated[
        str, typer.Argument(metavar="MODEL", help="As for plan; or a .json file of ffebm plan --out, alone.")
    ]
)
def draw(
    settings: Settings,
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture: .html, .svg, .png, .pdf or .dot.")] = Path(
        "partition.html"
    ),
    force: Force = False,
    what_if: Annotated[bool, typer.Option("--what-if", help="A page shows the plan under other options too.")] = False,
    as_json: Json = False,
) -> None:
    """Draw what is analog, what is digital and what crosses between them, as a page or a picture.

    Example: ffebm draw torchvision:resnet50 --fold-batchnorm --out resnet50.html
    """
    from ffebm_compiler.drawing.formats import check_format, save_picture

    check_format(out)
    check_free(out, force)
    if settings.model.lower().endswith(".json"):
        check_alone(context, ("model", "out", "force", "what_if", "as_json"))
        save_picture(ffebm.Plan.from_json(settings.model), out, what_if=what_if, source=settings.model)
    else:
        hybrid, _, _ = settings.converted()
        save_picture(hybrid.plan, out, hybrid, what_if, settings.model)
    if as_json:
        say_json({"wrote": str(out)})
    else:
        say(f"wrote {out}")


@main.command()
@with_settings()
def export(
    settings: Settings,
    out: Annotated[Path, typer.Option("--out", "-o", help="FILE.onnx: the whole hybrid. Else a folder.")],
    force: Force = False,
    no_verify: NoVerify = False,
    tolerance: Tolerance = 1e-4,
    as_json: Json = False,
) -> None:
    """Write ONNX: the whole hybrid as one file, or every digital part, the blocks' weights and a manifest.

    A folder must be new, empty, or of an earlier export. An existing file is replaced only with --force. The export is
    then run in onnxruntime and compared with the hybrid, at two batch sizes. Everything is in eval mode.

    Example: ffebm export mypackage.models:resnet --input 1x3x32x32 --weights trained.pt --out onnx/
    """
    from ffebm_compiler.cli.export import write_onnx

    check_free(out if out.suffix.lower() == ".onnx" else None, force)
    hybrid, args, kwargs = settings.converted()
    wrote = write_onnx(hybrid, out, args, kwargs, None if no_verify else tolerance)
    if as_json:
        say_json(asdict(wrote))
    else:
        say(str(wrote))


@main.command()
@with_settings()
def spice(
    settings: Settings,
    out: Annotated[Path, typer.Option("--out", "-o", help="The netlist, e.g. block.cir.")],
    block: Annotated[str, typer.Option("--block", help="The block, as ffebm plan names it.")] = "block_1",
    emission: Annotated[
        float, typer.Option("--emission", help="Emission coefficient of the diodes: 1 is silicon, small is ideal.")
    ] = 1e-3,
    volts: Annotated[float, typer.Option("--volts", help="The largest voltage of a crossbar's node, in V.")] = 5.0,
    siemens: Annotated[float, typer.Option("--siemens", help="Conductance of the largest weight, in S.")] = 1e-3,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the circuit of a resistive block as a netlist for ngspice, on random input.

    Example: ffebm spice ffebm_compiler.demo.models:digits_mlp --input 1x1x8x8 --energy resistive --out block.cir
    """
    check_free(out, force)
    hybrid, args, kwargs = settings.converted()
    if kwargs:
        raise ffebm.InputError(
            f"ffebm spice takes inputs by position, and {', '.join(kwargs)} has a name: give every input by --input "
            "SHAPE without a name, in the order of forward"
        )
    hybrid.export_spice(out, block=block, inputs=args, emission=emission, volts=volts, siemens=siemens)
    if as_json:
        say_json({"wrote": str(out), "block": block})
    else:
        say(f"wrote {out}: run it by ngspice -b {out}")


def _random_loss(outputs: Any) -> Tensor:
    """Mean of ⟨output, r⟩ over the outputs, with a fixed normal r. Infinite values (masked scores) are left out."""
    tensors = [leaf for leaf in leaves_of(outputs) if isinstance(leaf, Tensor)]
    found = [torch.view_as_real(leaf) if leaf.is_complex() else leaf for leaf in tensors]
    found = [leaf for leaf in found if leaf.is_floating_point()]
    if not found:
        raise ffebm.InputError("the model returns no floating-point tensor, so that there is no gradient to check")
    if all(bool(leaf.isinf().all()) for leaf in found):
        raise ffebm.InputError("all outputs of the model are infinite, so that there is no gradient to check")
    if any(bool(leaf.isnan().any()) for leaf in found):
        raise ffebm.InputError(
            "the model's outputs hold NaN on random input, so that there is no gradient to check: check its weights, "
            "or call ffebm.check_gradients(hybrid, inputs, loss_fn) with inputs of your own"
        )
    generator = torch.Generator().manual_seed(1)
    terms = [
        (leaf.masked_fill(leaf.isinf(), 0) * torch.randn(leaf.shape, generator=generator, device="cpu").to(leaf)).mean()
        for leaf in found
    ]
    return torch.stack(terms).sum()
