"""Convert every model of the zoo and write down what happened.

    python benchmarks/zoo.py [--only PATTERN ...] [--out benchmarks/results/zoo.json] [--table docs/zoo.md]

Per model: weights placed and refused (counted from the source's parameters), MACs placed, blocks,
compile time, the deviation from the source with single-layer blocks and at the default feedback,
whether the free phase settles, and whether `backward()` with EP gives finite gradients to every
parameter that the source trains. Exit status 1 where any of it fails.

How the free phase settles is measured twice: with default settings, and with the batch norm folded
and every kind of wiring allowed inside blocks, which makes more and larger blocks settle.

With `--workers 2` two models are measured at a time, each in a process of its own; then the slowest `convert` is timed
again with nothing beside it, until the slowest of all is a figure of a quiet process.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from measuring import add_out, keep
from zoo_models import MODELS, load_torchvision

import ffebm_compiler as ffebm
from ffebm_compiler.errors import ConvergenceWarning
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.passes.dialect import WIRING_KINDS

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "folded": {"fold_batchnorm": True, "block_ops": WIRING_KINDS},
}
"""How the settling is measured; all else is default."""

RESIDUAL = 1e-4
"""Relative residual that the free phase must reach, or warn."""


def _loss(output: Any) -> Tensor:
    terms = [
        t.float().square().mean() for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return torch.stack(terms).sum()


def _trained(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Parameters to which the source's own backward gives a gradient."""
    model.zero_grad()
    _loss(model(*args, **kwargs)).backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return names


def _deviation(found: Any, expected: Any) -> float:
    worst = 0.0
    for have, want in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(want, Tensor) and want.is_floating_point():
            worst = max(worst, float((have - want).double().norm() / want.double().norm().clamp_min(1e-12)))
    return worst


def settling(hybrid: HybridModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """How one forward in eval mode ends in each block that settles, and the convergence warnings.

    `residual` is not the solver's estimate: it is max_l ‖σ_l(h_l(s)) − s_l‖/‖s_l‖ at the states that it left, evaluated
    anew, with max pooling's winners those of these states.
    """
    hybrid.eval()
    with warnings.catch_warnings(record=True) as caught, hybrid.recording() as record, torch.no_grad():
        warnings.simplefilter("always")
        hybrid(*args, **kwargs)
    found = []
    for block in hybrid.blocks:
        module, program = block.module, block.module.program
        if not program.coupled:
            continue
        assert module.last is not None
        operands, _ = record[block.name]
        inputs, weights = operands[: program.inputs], operands[program.inputs :]
        found.append(
            {
                "block": block.name,
                "sweeps": module.last.sweeps,
                "converged": module.last.converged,
                "residual": module.residual(inputs, weights, module.states),
                "max_pool": any(i.operator.selects for layer in program.layers for i in layer.instructions),
            }
        )
    return {
        "blocks": found,
        "warnings": [str(w.message) for w in caught if issubclass(w.category, ConvergenceWarning)],
    }


def _worst(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """The block with the largest residual, not a number counting as the largest."""
    return max(blocks, key=lambda b: math.inf if math.isnan(b["residual"]) else b["residual"])


def _silent(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The blocks above the residual that is asked for that no warning names."""
    text = "\n".join(found["warnings"])
    above = [block for block in found["blocks"] if not block["residual"] <= RESIDUAL]
    return [block for block in above if not re.search(rf"\b{block['block']}\b", text)]


def measure(name: str) -> dict[str, Any]:
    """The zoo's row of one model."""
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    model.eval()
    trained = _trained(model, args, kwargs)
    hybrid, seconds = _converted(model, args, kwargs)
    plan = hybrid.plan
    matrices = [n for n, p in model.named_parameters() if p.dim() >= 2]
    with torch.no_grad():
        expected = model(*args, **kwargs)
    single = ffebm.convert(model, args, kwargs, hardware=Hardware(layers_per_block=1))
    with torch.no_grad():
        alone = _deviation(single(*args, **kwargs), expected)
    row: dict[str, Any] = {
        "model": name,
        "operations": len(plan.graph.operations),
        "matrices": len(matrices),
        "placed": sum(plan.weights[n].block is not None for n in matrices if n in plan.weights),
        "refused": sum(plan.weights[n].block is None for n in matrices if n in plan.weights),
        "unaccounted": [n for n in matrices if n not in plan.weights or not plan.weights[n].reason],
        "macs": plan.weight_macs,
        "macs_placed": plan.analog_macs,
        "blocks": len(plan.blocks),
        "multi_layer_blocks": sum(len(block.layers) > 1 for block in plan.blocks),
        "reasons": sorted({plan.weights[n].reason for n in matrices if plan.weights[n].block is None}),
        "rejected": dict(plan.rejected),
        "seconds": seconds,
        "deviation_single": alone,
    }
    row["settling"] = {"default": settling(hybrid, args, kwargs)}
    output = hybrid(*args, **kwargs)
    row["deviation"] = _deviation(output, expected)
    _loss(output).backward()
    grads = {n: p.grad for n, p in hybrid.named_parameters()}
    row["without_gradient"] = sorted(
        n for n in trained if grads.get(n) is None or not bool(torch.isfinite(grads[n]).all())
    )
    row["notes"] = list(plan.notes)
    del hybrid, single, output, grads
    folded = ffebm.convert(model, args, kwargs, **SETTINGS["folded"])
    row["settling"]["folded"] = settling(folded, args, kwargs)
    return row


def attempt(name: str, trace: bool = False) -> dict[str, Any]:
    """The zoo's row of one model, or the exception that it raised."""
    torch.set_num_threads(1)
    load_torchvision()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure(name)
    except Exception as error:
        if trace:
            traceback.print_exc()
        return {"model": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}


def attempts(names: list[str], workers: int, trace: bool) -> Iterator[dict[str, Any]]:
    """The rows of some models, in their order."""
    if workers == 1:
        yield from (attempt(name, trace) for name in names)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(partial(attempt, trace=trace), names)


def time_the_slowest_again(rows: list[dict[str, Any]]) -> None:
    """Time the slowest `convert` with nothing beside it, and so on until the slowest of all was timed so."""
    timed = [row for row in rows if "error" not in row]
    again: set[str] = set()
    while timed and (slowest := max(timed, key=lambda row: row["seconds"]))["model"] not in again:
        again.add(slowest["model"])
        slowest["seconds"] = convert_again(slowest["model"])
        print(f"{slowest['model']:44} {slowest['seconds']:.1f} s to convert with nothing beside it", flush=True)


def convert_again(name: str) -> float:
    """The seconds of a model's `convert`."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, args, kwargs = MODELS[name]()
        return _converted(model.eval(), args, kwargs)[1]


def _converted(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[HybridModel, float]:
    started = time.perf_counter()
    hybrid = ffebm.convert(model, args, kwargs)
    return hybrid, time.perf_counter() - started


def failures(row: dict[str, Any]) -> list[str]:
    """What a row misses."""
    if "error" in row:
        return [row["error"]]
    missed = []
    if row["unaccounted"]:
        missed.append(f"unaccounted weights {row['unaccounted'][:3]}")
    if row["deviation_single"] > 1e-5:
        missed.append(f"single-layer deviation {row['deviation_single']:.1e}")
    if _silent(row["settling"]["default"]):
        worst = _worst(_silent(row["settling"]["default"]))
        missed.append(f"residual {worst['residual']:.1e} in {worst['block']} and no warning")
    if not all(block["converged"] for block in row["settling"]["default"]["blocks"]):
        missed.append("a block did not converge")
    if row["without_gradient"]:
        missed.append(f"no finite gradient for {row['without_gradient'][:3]}")
    if row["seconds"] > 60:
        missed.append(f"{row['seconds']:.0f} s to compile")
    return missed


def line(row: dict[str, Any]) -> str:
    """The row as one line of the table."""
    share = 100 * row["macs_placed"] / max(1, row["macs"])
    return (
        f"{row['model']:44} {row['placed']:4}/{row['matrices']:<4} {share:6.1f}% {row['blocks']:4}"
        f"({row['multi_layer_blocks']:3}) {row['seconds']:7.1f}s {row['deviation_single']:8.1e} "
        f"{row['deviation']:8.1e}" + "".join(f" {' '.join(_figures(found)):20}" for found in row["settling"].values())
    )


def _figures(found: dict[str, Any]) -> tuple[str, str, str]:
    """Settling blocks, sweeps and residual of a row."""
    blocks = found["blocks"]
    if not blocks:
        return "0", "–", "–"
    warned = " warned" if found["warnings"] else ""
    return str(len(blocks)), str(max(b["sweeps"] for b in blocks)), f"{_worst(blocks)['residual']:.0e}{warned}"


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """One sentence for each setting: how many blocks settle, and how well."""
    rows = [row for row in rows if "settling" in row]
    sentences = []
    for setting, how in (("default", "With default settings"), ("folded", "Folded")):
        blocks = [{**b, "model": row["model"]} for row in rows for b in row["settling"][setting]["blocks"]]
        networks = len({b["model"] for b in blocks})
        warned = sum(bool(row["settling"][setting]["warnings"]) for row in rows)
        sentence = (
            f"{how}, {len(blocks)} blocks settle in {networks} of {len(rows)} networks and {warned} networks warned"
        )
        for kind, some in (
            ("with max pooling", [b for b in blocks if b["max_pool"]]),
            ("without max pooling", [b for b in blocks if not b["max_pool"]]),
        ):
            if not some:
                continue
            worst, above = _worst(some), sum(not b["residual"] <= RESIDUAL for b in some)
            sentence += (
                f"; of the {len(some)} {kind}, {above} have a residual above {RESIDUAL:.0e}, the largest "
                f"{worst['residual']:.1e} ({worst['model']}, {worst['block']})"
            )
        sentences.append(f"{sentence}.")
    return sentences


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/zoo.md."""
    lines = [
        "# The zoo",
        "",
        "Whether hybrids are their sources, over more architectures and in train mode too, is in [wild.md](wild.md).",
        "",
        "Real architectures with random weights at small sizes, converted by one call with default settings",
        "(`crossbar-256`, loop gain 0.1, batch norm digital). Written by",
        "`python benchmarks/zoo.py --table docs/zoo.md`.",
        "",
        "*Matrices*: parameters of two or more dimensions that are in an energy block, of all; the others (tables,",
        "positions, scales that are added or looked up) have a reason in `plan.weights`. *Blocks*: in parentheses",
        "those of several layers. *Alone*: deviation from the source with blocks of one layer. *Default*: at loop",
        "gain 0.1. Each model's `backward()` with EP gave finite gradients to every parameter that the source trains,",
        "unless it says so.",
        "",
        "*Settling*: blocks with feedback, whose states have to settle. *Sweeps*: the most that a free phase took.",
        "*Residual*: max_l ‖σ_l(h_l(s)) − s_l‖/‖s_l‖ at the states that the free phase left, evaluated anew, the",
        f"largest over the blocks; it must be at most {RESIDUAL:.0e}, or a `ConvergenceWarning` says that it is not",
        "(*warned*). In the columns marked *folded*, batch norm is folded and every kind of wiring may be inside a",
        f"block: `fold_batchnorm=True, block_ops={WIRING_KINDS}`.",
        "",
        *summary(rows),
        "",
        "| model | matrices | MACs | blocks | compile | alone | default | settling | sweeps | residual "
        "| settling, folded | sweeps, folded | residual, folded |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['model']} | missed: {row['error']} {'| ' * 11}|")
            continue
        share = 100 * row["macs_placed"] / max(1, row["macs"])
        lines.append(
            f"| {row['model']} | {row['placed']}/{row['matrices']} | {share:.1f} % | {row['blocks']} "
            f"({row['multi_layer_blocks']}) | {row['seconds']:.1f} s | {row['deviation_single']:.0e} | "
            f"{row['deviation']:.0e} | {' | '.join(_figures(row['settling']['default']))} | "
            f"{' | '.join(_figures(row['settling']['folded']))} |"
        )
    good = sum(not failures(row) for row in rows)
    lines += ["", f"{good} of {len(rows)} models convert and meet every number."]
    missed = [f"- {row['model']}: {'; '.join(failures(row))}" for row in rows if "error" not in row and failures(row)]
    if missed:
        lines += ["", "Missed:", "", *missed]
    silent = [
        f"- {row['model']}: "
        + ", ".join(f"{b['block']} {b['residual']:.1e}" for b in _silent(row["settling"]["folded"]))
        for row in rows
        if "error" not in row and _silent(row["settling"]["folded"])
    ]
    if silent:
        lines += [
            "",
            f"Missed when folded, blocks whose residual is above {RESIDUAL:.0e} without a warning:",
            "",
            *silent,
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="glob patterns of model names")
    add_out(parser)
    parser.add_argument("--table", type=Path, help="also write the table as Markdown")
    parser.add_argument("--workers", type=int, default=1, help="models that are measured at a time")
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    rows = []
    print(
        f"{'model':44} {'placed':>9} {'MACs':>7} {'blocks':>9} {'compile':>8} {'single':>8} "
        f"{'default':>8} {'settling, sweeps, residual':26} folded"
    )
    names = [name for name in MODELS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    for row in attempts(names, options.workers, options.trace):
        rows.append(row)
        missed = failures(row)
        if "error" not in row:
            print(line(row), flush=True)
        for sentence in missed:
            print(f"  MISSED {row['model']}: {sentence}", flush=True)
        keep(rows, options.out)
    if options.workers > 1:
        time_the_slowest_again(rows)
        keep(rows, options.out)
    if options.table:
        write_whole(options.table, markdown(rows))
    bad = sum(bool(failures(row)) for row in rows)
    for sentence in summary(rows):
        print(sentence)
    print(f"{len(rows) - bad} of {len(rows)} models convert and meet every number")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
