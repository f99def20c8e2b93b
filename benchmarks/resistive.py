"""What the resistive energy costs a digits MLP: accuracy without retraining and from scratch, sweeps, and the step.

    python benchmarks/resistive.py [--seeds 3] [--epochs 15] [--out benchmarks/results/resistive.json]

The network is 64-128-96-10 with ReLU on scikit-learn's digits, trained by Adam at 2e-3 with a cosine schedule in
batches of 64; every fourth image tests (450). `trained` converts the network that backprop has trained and measures it
at every γ: without retraining, `tuned` by 3 epochs of EP at 1e-4, and `longer` by 10 epochs at 2e-3 with the gradient
through the amplifiers' gains (`through_feedback`). `scratch` trains the hybrid itself by EP. `step` is an EP step of a
stack of linear layers in blocks of two, and of a block of three convolutions (one grouped, one strided), in backprop
steps of its source: medians of CPU time, all in turn. One thread.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Images as rows in [0, 1], labels, and which of them train."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    return images, torch.tensor(digits.target), torch.arange(len(images)) % 4 != 0


def network() -> nn.Module:
    """64-128-96-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 10))


def trained(model: nn.Module, epochs: int, rate: float = 2e-3) -> nn.Module:
    """The model after training, in eval mode."""
    images, labels, train = data()
    images, labels = images[train], labels[train]
    optimizer = torch.optim.Adam(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // 64))
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Per cent of the test images."""
    images, labels, train = data()
    with torch.no_grad():
        return 100 * float((model(images[~train]).argmax(1) == labels[~train]).float().mean())


def without_retraining(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy, loop gain and sweeps at every γ of networks that backprop has trained, and the tuned accuracy."""
    rows: dict[float, list[tuple[float, float, int, float, float]]] = {}
    through = ffebm.EquilibriumPropagation(through_feedback=True)
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        source = trained(network(), options.epochs)
        hybrid = ffebm.convert(source, data()[0][:2], energy="resistive")
        rows.setdefault(0.0, []).append((accuracy(source), 0.0, 0, accuracy(source), accuracy(source)))
        for gamma in options.gammas:
            hybrid.set_feedback(gamma)
            found = accuracy(hybrid)
            last = hybrid.blocks[0].module.last
            tuned = accuracy(trained(copy.deepcopy(hybrid), options.tune, 1e-4))
            longer = copy.deepcopy(hybrid)
            longer.set_gradient(through)
            again = accuracy(trained(longer, options.longer))
            run = (found, hybrid.blocks[0].loop_gain, last.sweeps if last else 0, tuned, again)
            rows.setdefault(gamma, []).append(run)
    return [
        {
            "gamma": gamma,
            "accuracy": [run[0] for run in runs],
            "loop_gain": max(run[1] for run in runs),
            "sweeps": max(run[2] for run in runs),
            "tuned": [run[3] for run in runs],
            "longer": [run[4] for run in runs],
        }
        for gamma, runs in rows.items()
    ]


def from_scratch(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of networks trained by EP at some γ, and by backprop (γ = 0)."""
    rows = []
    for gamma in (0.0, *options.scratch):
        found, loads = [], []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = network()
            if gamma:
                model = ffebm.convert(model, data()[0][:2], energy="resistive", feedback=gamma)
                loads.append([load(model, gamma)])
            found.append(accuracy(trained(model, options.epochs)))
            if isinstance(model, ffebm.HybridModel):
                loads[-1].append(load(model, gamma))
        rows.append({"gamma": gamma, "accuracy": found, "load": loads})
    return rows


def load(hybrid: nn.Module, gamma: float) -> float:
    """The mean of D = 1 + γ A |W|ᵀ 1 over the first hidden layer."""
    assert isinstance(hybrid, ffebm.HybridModel)
    weight = hybrid.get_parameter("2.weight").detach()
    return 1 + gamma * hybrid.blocks[0].module.setting.amplifiers[1] * float(weight.abs().sum(0).mean())


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def steps(options: argparse.Namespace) -> list[dict[str, Any]]:
    """CPU time of EP steps relative to backprop's, both energies at their default feedback."""
    rows = []
    for name, (source, x, fabric) in _sources(options).items():
        runs = {"backprop": step_of(source, x)}
        for energy in ("hopfield", "resistive"):
            hybrid = ffebm.convert(source, x[:2], hardware=fabric, energy=energy)
            runs[energy] = step_of(hybrid.train(), x)
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for turn in range(options.turns + 2):
            for key, run in runs.items():
                started = time.process_time()
                run()
                if turn >= 2:
                    seconds[key].append(time.process_time() - started)
        times = {key: statistics.median(found) for key, found in seconds.items()}
        rows.append({"source": name, **{key: value / times["backprop"] for key, value in times.items()}})
    return rows


def _sources(options: argparse.Namespace) -> dict[str, tuple[nn.Module, Tensor, ffebm.Hardware]]:
    """Stacks of linear layers in blocks of two, and one block of convolutions."""
    found: dict[str, tuple[nn.Module, Tensor, ffebm.Hardware]] = {}
    for width in options.widths:
        torch.manual_seed(0)
        stack = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())])
        found[f"width {width}"] = (stack, torch.randn(options.batch, width), ffebm.Hardware(layers_per_block=2))
    torch.manual_seed(0)
    images = nn.Sequential(
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.ReLU()),
    )
    found["images"] = (images, torch.randn(options.batch // 4, 16, 16, 16), ffebm.Hardware())
    return found


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gammas", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3])
    parser.add_argument("--scratch", type=float, nargs="+", default=[1e-3, 1e-2, 0.1, 0.3])
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--tune", type=int, default=3, help="epochs of EP after the conversion")
    parser.add_argument("--longer", type=int, default=10, help="epochs of EP with the gradient through the amplifiers")
    parser.add_argument("--turns", type=int, default=20)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {"trained": without_retraining(options), "scratch": from_scratch(options), "step": steps(options)}
    print(f"{'γ':>8} {'accuracy %, by seed':>26} {'loop gain':>10} {'sweeps':>7} {'tuned %':>18} {'longer %':>18}")
    for row in results["trained"]:
        keys = ("accuracy", "tuned", "longer")
        shown, tuned, longer = (" ".join(f"{value:.2f}" for value in row[key]) for key in keys)
        figures = f"{row['loop_gain']:10.3g} {row['sweeps']:7}"
        print(f"{row['gamma'] or 'source':>8} {shown:>26} {figures} {tuned:>18} {longer:>18}")
    print(f"\n{'γ':>8} {'from scratch %, by seed':>26} {'mean D before':>14} {'after':>6}")
    for row in results["scratch"]:
        means = [statistics.mean(ends) for ends in zip(*row["load"], strict=True)]
        shown = f"{' '.join(f'{value:.2f}' for value in row['accuracy']):>26}"
        print(f"{row['gamma'] or 'backprop':>8} {shown} " + (f"{means[0]:14.2f} {means[1]:6.2f}" if means else ""))
    print(f"\n{'':>10} {'hopfield':>10} {'resistive':>10}   EP steps in backprop steps")
    for row in results["step"]:
        print(f"{row['source']:>10} {row['hopfield']:10.2f} {row['resistive']:10.2f}")
    keep(results, options.out)


if __name__ == "__main__":
    sys.exit(main())
