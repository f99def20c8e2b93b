"""EP from scratch on scikit-learn's digits, the loop gain held at every step, beside backprop.

    python benchmarks/from_scratch.py [--seeds 3] [--epochs 5] [--out benchmarks/results/from_scratch.json]
    python benchmarks/from_scratch.py --picture docs/pictures/from-scratch.svg

The network is the papers' architecture at small width: twice [convolution, batch norm, a frozen identity convolution
that lets the activation behind batch norm receive feedback, clamp(0, 1), convolution, clamp(0, 1), average pool], then
a linear layer, with torch's initialisation (Nest & Ernoult 2024, arXiv 2409.03306). Adam at 2e-3 with a cosine
schedule, batches of 32, the last incomplete one dropped; 1 440 training and 357 test images, so that one image is 0.28
points. `--feedback` takes loop gains and "symmetric", the literature's γ = 1. `--picture` draws the test accuracy after
every epoch, the mean over the seeds and their range. One thread.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler.files.whole_files import write_whole

BACKPROP = "backprop"


class Clamp(nn.Module):
    """clamp(h, 0, 1), the hard sigmoid of the literature."""

    def forward(self, h: Tensor) -> Tensor:
        """The clamped value."""
        return h.clamp(0, 1)


def network(width: int = 32) -> nn.Sequential:
    """Two blocks and a head."""
    layers: list[nn.Module] = []
    inner = 1
    for outer in (width, 2 * width):
        identity = nn.Conv2d(outer, outer, 1, bias=False)
        with torch.no_grad():
            identity.weight.copy_(torch.eye(outer)[:, :, None, None])
        identity.weight.requires_grad_(False)
        first, second = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        layers += [first, nn.BatchNorm2d(outer), identity, Clamp(), second, Clamp(), nn.AvgPool2d(2)]
        inner = outer
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * inner, 10))


def data() -> tuple[Tensor, Tensor]:
    """Images of 8 × 8 pixels in [-1, 1], and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)


def train(
    feedback: float | str,
    seed: int,
    options: argparse.Namespace,
    build: Callable[[int], nn.Module] = network,
    **settings: Any,
) -> dict[str, Any]:
    """One run: accuracy, seconds, and the loop gains and sweeps of its last step; `settings` are `convert`'s."""
    images, labels = data()
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    model = build(options.width)
    if feedback != BACKPROP:
        model = ffebm.convert(model, images[:2], feedback=feedback, **settings)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], options.rate)
    count = options.train // options.batch
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * count)
    curve: list[float] = []
    started, failed, drift = time.process_time(), "", 0.0
    for _ in range(options.epochs):
        for batch in torch.randperm(options.train)[: count * options.batch].split(options.batch):
            optimizer.zero_grad()
            try:
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
            except ffebm.ConvergenceError as error:
                failed = str(error).split(";")[0]
                break
            optimizer.step()
            schedule.step()
        if isinstance(model, ffebm.HybridModel) and not isinstance(feedback, str):
            for block in model.blocks:
                if block.certificate is not None:
                    drift = max(drift, abs(block.loop_gain / feedback - 1))
        if failed:
            break
        if options.picture is not None:
            curve.append(100 * accuracy_of(model, images[options.train :], labels[options.train :])[0])
    seconds = (time.process_time() - started) / options.epochs
    accuracy, unsettled = accuracy_of(model, images[options.train :], labels[options.train :])
    failed = failed or unsettled
    gains = [b.loop_gain for b in model.blocks if b.certificate] if isinstance(model, ffebm.HybridModel) else []
    return {
        "feedback": feedback,
        "seed": seed,
        "accuracy": 100 * accuracy,
        "seconds_per_epoch": seconds,
        "largest_loop_gain": max(gains, default=None),
        "drift_in_a_step": drift,
        "failed": failed,
        "curve": curve,
    }


def accuracy_of(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, str]:
    """The share of right answers, 0 with a sentence where a block does not settle; the model's mode stays."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            return float((model(images).argmax(1) == labels).float().mean()), ""
    except ffebm.ConvergenceError as error:
        return 0.0, str(error).split(";")[0]
    finally:
        model.train(mode)


def picture(rows: list[dict[str, Any]]) -> str:
    """The test accuracy after every epoch, as an SVG picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "from_scratch", "font.size": 11})
    from matplotlib import pyplot

    names = {BACKPROP: ("backpropagation", "#555555"), "symmetric": ("EP, feedback not held (γ = 1)", "#a33b00")}
    colours = iter(("#7fb2d9", "#2f7fbf", "#0b3c66", "#37a0a0"))
    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    for feedback in dict.fromkeys(row["feedback"] for row in rows):
        curves = [row["curve"] for row in rows if row["feedback"] == feedback]
        epochs = range(1, 1 + min(map(len, curves)))
        values = list(zip(*curves, strict=False))
        known = names.get(feedback)
        label, colour = known or (f"EP, loop gain held at {feedback}", next(colours))
        style = "--" if known else "-"
        axes.plot(epochs, [statistics.mean(each) for each in values], style, marker="o", color=colour, label=label)
        axes.fill_between(epochs, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test accuracy in %", xticks=range(1, 1 + max(len(row["curve"]) for row in rows)))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def main(about: str = "", build: Callable[[int], nn.Module] = network, **settings: Any) -> None:
    """Run the command line, of this network or of another."""
    parser = argparse.ArgumentParser(description=about or __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--feedback", nargs="+", default=["backprop", "0.1", "0.5", "0.9", "symmetric"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--train", type=int, default=1440, help="images to train on; the others test")
    parser.add_argument("--picture", type=Path, help="also draw the accuracy after every epoch")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ffebm.FFEBMWarning)
    rows = []
    print(f"{'feedback':>10} {'accuracy %, by seed':>30} {'mean':>7} {'s/epoch':>8} {'largest κ':>10}")
    for given in options.feedback:
        feedback = given if given in (BACKPROP, "symmetric") else float(given)
        runs = [train(feedback, seed, options, build, **settings) for seed in range(options.seeds)]
        rows += runs
        accuracies = [run["accuracy"] for run in runs]
        gains = [run["largest_loop_gain"] for run in runs if run["largest_loop_gain"] is not None]
        print(
            f"{given:>10} {'  '.join(f'{a:6.2f}' for a in accuracies):>30} {statistics.mean(accuracies):7.2f} "
            f"{statistics.median(run['seconds_per_epoch'] for run in runs):8.2f} "
            f"{f'{max(gains):.3g}' if gains else '':>10}  {next((r['failed'] for r in runs if r['failed']), '')}",
            flush=True,
        )
    keep(rows, options.out)
    if options.picture is not None:
        write_whole(options.picture, picture(rows))


if __name__ == "__main__":
    sys.exit(main())
