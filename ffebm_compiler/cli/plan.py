"""`ffebm plan`: print how a model is split, or with `--sweep` how it would be split for other hardware."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import ffebm_compiler as ffebm
from ffebm_compiler.cli.options import Force, Settings, check_free, with_settings
from ffebm_compiler.cli.printing import Json, say, say_json
from ffebm_compiler.errors import InputError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.passes.partition.compare import SweepRow, sweep
from ffebm_compiler.plan import Plan
from ffebm_compiler.reports.text import count, table_text

__all__ = ["plan", "sweep_settings", "sweep_text"]

_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}


@with_settings(without=("energy", "feedback", "gradient", "feedback_weights"))
def plan(
    settings: Settings,
    as_json: Json = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the plan as JSON to this file.")] = None,
    force: Force = False,
    explain: Annotated[
        list[str] | None, typer.Option("--explain", "-e", help="Say where this module or parameter goes, and why.")
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            "--sweep",
            metavar="FIELD=VALUES",
            help="Print a table of plans for other hardware instead, e.g. tile_rows=64,128,256; repeat it for a grid.",
        ),
    ] = None,
    what_if: Annotated[
        bool,
        typer.Option("--what-if", help="Add the plan under other options: blocks, conversions, modelled energy."),
    ] = False,
) -> None:
    """Print how a model is split into energy blocks and digital parts; nothing is built.

    Example: ffebm plan timm:resnet18 --input 1x3x64x64 --fold-batchnorm --explain layer4.0.conv1
    """
    if what_if and (sweep or explain):
        raise InputError("--what-if adds a table to the printed plan: leave out --sweep and --explain")
    if sweep and (out is not None or explain):
        raise InputError("--sweep prints a table of many plans: leave out --out and --explain")
    check_free(out, force)
    fabric = settings.fabric()
    module, args, kwargs = settings.source()
    planned = functools.partial(ffebm.plan, module, args, kwargs, **settings.options())
    made = planned(hardware=fabric)
    if out is not None:
        made.to_json(out)
    if sweep:
        text = sweep_text(made, sweep, lambda fabric: planned(hardware=fabric), as_json)
        typer.echo(text) if as_json else say(text)
    elif explain:
        reasons = {path: made.explain(path) for path in explain}
        if as_json:
            say_json(reasons)
        else:
            say("\n".join(f"{path}: {reason}" for path, reason in reasons.items()))
    elif as_json:
        say_json({**made.to_dict(), **({"what_if": asdict(made.what_if())} if what_if else {})})
    else:
        say(str(made))
        if what_if:
            say(str(made.what_if()))


def sweep_settings(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The fields and values of `FIELD=VALUE,VALUE` options.

    Raises:
        InputError: where one is malformed or names a field a second time.
    """
    settings: dict[str, list[Any]] = {}
    for text in texts:
        field, equals, listed = text.partition("=")
        field, values = field.strip(), [_value(word.strip()) for word in listed.split(",") if word.strip()]
        if not equals or not field or not values:
            raise InputError(
                f"--sweep {text!r} must name a field of the hardware and values, such as tile_rows=64,128,256"
            )
        if field in settings:
            raise InputError(f"--sweep gives {field!r} twice: put all its values into one, joined by commas")
        settings[field] = values
    return settings


def _value(word: str) -> Any:
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


def sweep_text(plan: Plan, texts: Sequence[str], replan: Callable[[Hardware], Plan], as_json: bool) -> str:
    """The table, or the JSON, of a sweep.

    Raises:
        InputError: for malformed settings.
        HardwareError: for an unknown field or a value that it refuses.
    """
    settings = sweep_settings(texts)
    rows = sweep(plan, settings, replan)
    if as_json:
        return json.dumps([asdict(row) for row in rows], indent=1)
    columns = (
        *(field.replace("_", " ") for field in settings),
        "blocks",
        "conversions",
        "tiles",
        "cores",
        "utilisation",
        "analog MACs",
    )
    return table_text(f"{plan.model} on {plan.hardware.name}, per sample", columns, [_cells(row) for row in rows])


def _cells(row: SweepRow) -> tuple[str, ...]:
    return (
        *("none" if value is None else str(value) for value in row.settings.values()),
        str(row.blocks),
        count(row.conversions),
        str(row.tiles),
        str(row.cores),
        f"{100 * row.utilisation:.1f} %",
        f"{100 * row.analog_macs:.1f} %",
    )
