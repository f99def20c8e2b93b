"""Convert every model of the zoo and write down what happened.

    python benchmarks/zoo.py [--only PATTERN ...] [--out benchmarks/results/zoo.json] [--table docs/zoo.md]

Per model: weights placed and refused (counted from the source's parameters), MACs placed, blocks,
compile time, the deviation from the source with single-layer blocks and at the default feedback,
sweeps, and whether `backward()` with EP gives finite gradients to every parameter that the
source trains. Exit status 1 where any of it fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from zoo_models import MODELS, load_torchvision

import ffebm_compiler as ffebm
from ffebm_compiler.hardware import Hardware


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


def measure(name: str) -> dict[str, Any]:
    """The zoo's row of one model."""
    torch.manual_seed(0)
    model, args, kwargs = MODELS[name]()
    model.eval()
    trained = _trained(model, args, kwargs)
    started = time.perf_counter()
    hybrid = ffebm.convert(model, args, kwargs)
    seconds = time.perf_counter() - started
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
        "macs": plan.total_macs,
        "macs_placed": plan.analog_macs,
        "blocks": len(plan.blocks),
        "multi_layer_blocks": sum(len(block.layers) > 1 for block in plan.blocks),
        "reasons": sorted({plan.weights[n].reason for n in matrices if plan.weights[n].block is None}),
        "rejected": dict(plan.rejected),
        "seconds": seconds,
        "deviation_single": alone,
    }
    output = hybrid(*args, **kwargs)
    row["deviation"] = _deviation(output, expected)
    row["sweeps"] = max((b.module.last.sweeps for b in hybrid.blocks if b.module.last), default=0)
    row["converged"] = all(b.module.last is None or b.module.last.converged for b in hybrid.blocks)
    _loss(output).backward()
    grads = {n: p.grad for n, p in hybrid.named_parameters()}
    row["without_gradient"] = sorted(
        n for n in trained if grads.get(n) is None or not bool(torch.isfinite(grads[n]).all())
    )
    row["notes"] = list(plan.notes)
    return row


def failures(row: dict[str, Any]) -> list[str]:
    """What a row misses."""
    if "error" in row:
        return [row["error"]]
    missed = []
    if row["unaccounted"]:
        missed.append(f"unaccounted weights {row['unaccounted'][:3]}")
    if row["deviation_single"] > 1e-5:
        missed.append(f"single-layer deviation {row['deviation_single']:.1e}")
    if not row["converged"]:
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
        f"{row['deviation']:8.1e} {row['sweeps']:6}"
    )


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/zoo.md."""
    lines = [
        "# The zoo",
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
        "| model | matrices | MACs | blocks | compile | alone | default | sweeps |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        missed = failures(row)
        if missed:
            lines.append(f"| {row['model']} | missed: {'; '.join(missed)} | | | | | | |")
            continue
        share = 100 * row["macs_placed"] / max(1, row["macs"])
        lines.append(
            f"| {row['model']} | {row['placed']}/{row['matrices']} | {share:.1f} % | {row['blocks']} "
            f"({row['multi_layer_blocks']}) | {row['seconds']:.1f} s | {row['deviation_single']:.0e} | "
            f"{row['deviation']:.0e} | {row['sweeps']} |"
        )
    good = sum(not failures(row) for row in rows)
    lines += ["", f"{good} of {len(rows)} models convert and meet every number."]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="glob patterns of model names")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="also write the table as Markdown")
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    rows = []
    print(
        f"{'model':44} {'placed':>9} {'MACs':>7} {'blocks':>9} {'compile':>8} {'single':>8} "
        f"{'default':>8} {'sweeps':>6}"
    )
    for name in MODELS:
        if not any(fnmatch.fnmatch(name, pattern) for pattern in options.only):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row = measure(name)
        except Exception as error:
            row = {"model": name, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            if options.trace:
                traceback.print_exc()
        rows.append(row)
        missed = failures(row)
        if "error" not in row:
            print(line(row), flush=True)
        for sentence in missed:
            print(f"  MISSED {name}: {sentence}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if options.table:
        options.table.write_text(markdown(rows), encoding="utf-8")
    bad = sum(bool(failures(row)) for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} models convert and meet every number")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
