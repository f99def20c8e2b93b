"""Experiment 3: how near each gradient is to the exact one, layer by layer, as sweeps and β vary.

    .venv/bin/python examples/gradient_analysis.py [--quick] [--out results/gradient_analysis]

One batch through the papers' network of 6 layers at small width (images of 32 × 32 pixels), at its initialisation.
The exact gradient is autograd through 200 sweeps in float64. Beside it, in float32 and with the feedback γ as it is:

- EP with β from 1e-4 to 1, one-sided and centered, and implicit differentiation;
- backpropagation through the last K sweeps (truncated), K from 1 to 8;
- EP where both phases stop after T sweeps, T from 1 to 8;
- EP where only the nudged phase does. "From BPTT" is its largest relative distance, over the layers, from
  backpropagation through the last T sweeps: they are equal where the free phase has settled and β is small, sweep by
  sweep (Ernoult et al. 2019, arXiv 1905.13633).

`runs.csv` has the cosine of every layer's weights, and the part of the exact gradient g that a gradient e has found,
⟨e, g⟩/⟨g, g⟩. The picture draws, for each layer, that part by the number of sweeps and 1 − cosine by β. A minute on one
thread.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import add_places, chosen, positive, read_options, told
from experiment import Experiment
from experiment_data import load
from experiment_training import Row
from papers_networks import papers_plan, six_layers
from splitting import scaled
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.estimators.base import Estimator

BETAS = (1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0)
STOPPED = ("EP, T sweeps", "EP, T nudged sweeps")
COUNTS = (1, 2, 3, 4, 6, 8)


def gradients(
    hybrid: ffebm.HybridModel, x: Tensor, y: Tensor, nudged: ffebm.GaussSeidel | None = None
) -> dict[str, Tensor]:
    """The gradients of the mean cross-entropy by the weights of the layers, at the feedback as it is.

    Args:
        hybrid: the network, with its estimator.
        x: inputs of a batch.
        y: labels.
        nudged: the solver of the phases after the free one; None: the same.
    """
    hybrid.zero_grad()
    with hybrid.held_feedback():
        if nudged is not None:  # a forward that starts at the equilibrium stays there, in however few sweeps
            hybrid(x)
            hybrid.set_solver(replace(nudged, start="last"))
        loss = F.cross_entropy(hybrid(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
    named = hybrid.named_parameters()
    return {name: p.grad.double() for name, p in named if p.grad is not None and p.dim() > 1}


def settings(quick: bool) -> list[Row]:
    """A key for each row: the method, and the number that varies."""
    betas, counts = (BETAS[::3], COUNTS[:2]) if quick else (BETAS, COUNTS)
    rows: list[Row] = [{"method": "implicit", "at": 0.0}]
    rows += [{"method": f"EP, {variant}", "at": beta} for variant in ("positive", "centered") for beta in betas]
    rows += [{"method": "truncated", "at": count} for count in counts]
    return rows + [{"method": method, "at": count} for method in STOPPED for count in counts]


def estimator(key: Row) -> Estimator:
    """The estimator of a row."""
    if key["method"] == "implicit":
        return ffebm.Implicit()
    if key["method"] == "truncated":
        return ffebm.TruncatedBackprop(int(key["at"]))
    if key["method"] in STOPPED:
        return ffebm.EquilibriumPropagation(1e-4)
    return ffebm.EquilibriumPropagation(float(key["at"]), key["method"].split(", ")[1])


def part(found: Tensor, exact: Tensor) -> str:
    """⟨e, g⟩/⟨g, g⟩ of a gradient e and the exact one g."""
    return f"{float((found * exact).sum() / exact.square().sum()):.8f}"


def picture(experiment: Experiment, layers: list[str]) -> Path:
    """Two panels for each layer: the part of the gradient that so many sweeps have found, and 1 − cosine by β."""
    figure, axes = experiment.panels(2, len(layers))
    runs = experiment.rows("runs")
    for column, layer in enumerate(layers):
        for method, value, line, label in (
            (STOPPED[1], "part by BPTT", "-", "backprop through the last T sweeps"),
            (STOPPED[1], "part", "o--", STOPPED[1]),
            (STOPPED[0], "part", "s:", STOPPED[0]),
        ):
            own = [run for run in runs if run["method"] == method]
            y = [float(run[f"{layer}, {value}"]) for run in own]
            axes[0][column].plot([float(run["at"]) for run in own], y, line, mfc="none", label=label)
        for method, line in (("EP, positive", "o-"), ("EP, centered", "s-")):
            own = [run for run in runs if run["method"] == method]
            y = [1 - float(run[layer]) for run in own]
            axes[1][column].plot([float(run["at"]) for run in own], y, line, mfc="none", label=method)
        axes[0][column].set(title=layer, xlabel="sweeps T", ylabel="part of the gradient")
        axes[1][column].set(xlabel="β", ylabel="1 − cosine", xscale="log")
        axes[1][column].set_yscale("symlog", linthresh=1e-8)
        axes[1][column].set_ylim(bottom=0)
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].legend(fontsize="small")
    return experiment.drawn(figure)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_places(parser, "results/gradient_analysis")
    parser.add_argument("--feedback", type=float, default=0.5)
    parser.add_argument("--width", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=32)
    options = read_options(parser, width=2, batch=4)
    torch.set_num_threads(1)
    with told(parser):
        data = scaled(load(options.data, options.folder))
        x, y = data.scaled(data.training[0][: options.batch]), data.training[1][: options.batch]
        names = ("data", "folder", "feedback", "width", "batch", "quick")
        experiment = Experiment(options.out, "gradients", chosen(options, *names))
        torch.manual_seed(0)
        source = six_layers(6, options.width, classes=data.classes)
        plan = papers_plan(source, x[:2])
        hybrid = ffebm.convert(source, x[:2], plan=plan, feedback=options.feedback).eval()
        exact = copy.deepcopy(hybrid).double()
        settled = ffebm.GaussSeidel(rtol=1e-14, max_sweeps=200, relaxation=1.0, on_failure="warn")
        exact.set_solver(settled)
        exact.set_gradient("unrolled")
        truth = gradients(exact, x.double(), y)

        def one(key: Row, _: Path) -> Iterator[Row]:
            stopped = None
            if key["method"] in STOPPED:
                stopped = ffebm.GaussSeidel(rtol=1e-12, max_sweeps=int(key["at"]), on_failure="warn", relaxation=1.0)
            alone = key["method"] == STOPPED[1]
            network = exact if alone else hybrid  # equal sweep by sweep needs more digits than float32 has
            given = (x.double(), y) if alone else (x, y)
            network.set_solver(settled if alone else stopped)
            network.set_gradient(estimator(key))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ffebm.ConvergenceWarning)  # T sweeps are fewer than it needs
                found = gradients(network, *given, nudged=stopped if alone else None)
            row: Row = {"epoch": key["at"]}
            for name, expected in truth.items():
                row[name] = f"{float(F.cosine_similarity(found[name].flatten(), expected.flatten(), 0)):.8f}"
                row[f"{name}, part"] = part(found[name], expected)
            if alone:
                exact.set_solver(settled)
                exact.set_gradient(ffebm.TruncatedBackprop(int(key["at"])))
                through_time = gradients(exact, *given)
                row |= {f"{name}, part by BPTT": part(through_time[name], g) for name, g in truth.items()}
                far = max(float((found[n] - t).norm() / t.norm()) for n, t in through_time.items())
                row["from BPTT"] = f"{far:.1e}"
            yield row

        experiment.run(settings(options.quick), one)
        layers = list(truth)
        print(f"{'':24} {'at':>8} {'worst':>10} {'first layer':>12} {'from BPTT':>10}")
        for run in experiment.rows("runs"):
            worst = min(float(run[name]) for name in layers)
            ends = f"{worst:10.6f} {float(run[layers[0]]):12.6f} {run.get('from BPTT', ''):>10}"
            print(f"{run['method']:24} {float(run['at']):8g} {ends}".rstrip())
        print(f"curves: {picture(experiment, layers)}")


if __name__ == "__main__":
    main()
