"""Feedback through weights of its own: the angle to the exact gradient, and training on scikit-learn's digits.

    python benchmarks/vector_fields.py [--seeds 3] [--epochs 8] [--out benchmarks/results/vector_fields.json]

The network is 64-64-32-10 with tanh, one energy block. First table: cosine between equilibrium propagation, which is a
local rule there, and the exact gradient of the first layer, for feedback weights B at a distance ‖B − W‖/‖W‖ from the
forward ones, and for unrelated ones; at loop gains of 0.1, 0.5 and 0.9. Second table: test accuracy of every way to
train the two (Adam at 2e-3, batches of 64, loop gain 0.5; 1 347 training and 450 test images), and the cosine between W
and B at the end.

    tied         B is W
    fixed        random, and stays
    free         random, with its own local gradient
    aligned      random, W and B with the sum of both gradients and weight decay
    penalty      free, with ½ λ ‖W − B‖² in the loss
    homeostasis  free, with λ ‖J − Jᵀ‖² measured by noise in the loss (Laborieux & Zenke 2023)

One thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm

SIZES = (64, 64, 32, 10)
MODES = ("tied", "fixed", "free", "aligned", "penalty", "homeostasis")
UNRELATED = "unrelated"


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (64 values from -0.3 to 0.7) and labels; every fourth image tests."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16 - 0.3, dtype=torch.float32), torch.tensor(labels)
    test = torch.arange(len(x)) % 4 == 0
    return x[~test], y[~test], x[test], y[test]


def network(generator: torch.Generator) -> nn.Sequential:
    """Normal weights of variance 1/n, biases 0."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise(SIZES):
        layer = nn.Linear(inner, outer)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(outer, inner, generator=generator) / math.sqrt(inner))
            layer.bias.zero_()
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def pairs(hybrid: ffebm.HybridModel) -> list[tuple[Tensor, Tensor]]:
    """(W, B)."""
    names = hybrid.feedback_names
    return [(hybrid.get_parameter(name[: -len("_feedback")]), hybrid.get_parameter(name)) for name in names]


def angles(feedback: float, asymmetry: float | str) -> dict[str, Any]:
    """Cosines of the weights' gradients to the exact ones at one asymmetry."""
    generator = torch.Generator().manual_seed(0)
    x, y, _, _ = data()
    x, y = x[:64].double(), y[:64]
    hybrid = ffebm.convert(network(generator).double(), x, feedback=feedback, feedback_weights="free")
    with torch.no_grad():
        for weight, own in pairs(hybrid):
            drawn = torch.randn(weight.shape, generator=generator).double() * weight.norm() / math.sqrt(weight.numel())
            own.copy_(drawn if isinstance(asymmetry, str) else weight + asymmetry * drawn)
    hybrid.recertify()
    report = ffebm.check_gradients(hybrid, x, lambda output: F.cross_entropy(output, y, reduction="sum"))
    return {
        "feedback": feedback,
        "asymmetry": asymmetry,
        "cosines": {name: found["ep"].cosine for name, found in report.agreements.items() if "weight" in name},
        "implicit": report.worst("implicit")[1].relative_error,
    }


def train(mode: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run: test accuracy, cosine of W and B, seconds."""
    generator = torch.Generator().manual_seed(seed)
    x, y, held_x, held_y = data()
    update = mode if mode in ("fixed", "aligned") else "free"
    own: Any = "tied"
    if mode != "tied":
        own = ffebm.FeedbackWeights(update=update, start="random", seed=1 + seed)  # type: ignore[arg-type]
    hybrid = ffebm.convert(network(generator), x[:2], feedback=options.feedback, feedback_weights=own).train()
    decay = options.decay if mode == "aligned" else 0.0
    weights = [p for name, p in hybrid.named_parameters() if p.requires_grad and "weight" in name]
    others = [p for name, p in hybrid.named_parameters() if p.requires_grad and "weight" not in name]
    optimizer = torch.optim.Adam([{"params": weights, "weight_decay": decay}, {"params": others}], options.rate)
    noise = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for _ in range(options.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            loss = F.cross_entropy(hybrid(x[batch]), y[batch])
            if mode == "penalty":
                loss = loss + options.penalty * ffebm.alignment_penalty(hybrid)
            if mode == "homeostasis":
                loss = loss + options.homeostasis * ffebm.jacobian_homeostasis(hybrid, 1, noise)
            loss.backward()
            optimizer.step()
    seconds = time.process_time() - started
    hybrid.eval()
    with torch.no_grad():
        accuracy = float((hybrid(held_x).argmax(1) == held_y).float().mean())
        cosines = [float(F.cosine_similarity(w.flatten(), b.flatten(), dim=0)) for w, b in pairs(hybrid)]
    return {"mode": mode, "seed": seed, "accuracy": 100 * accuracy, "cosines": cosines, "seconds": seconds}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--feedback", type=float, default=0.5, help="loop gain of the training runs")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay of the aligned runs")
    parser.add_argument("--penalty", type=float, default=1e-2, help="λ of the penalty")
    parser.add_argument("--homeostasis", type=float, default=3e-2, help="λ of homeostasis")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'κ':>5} {'‖B−W‖/‖W‖':>10} {'cosines of the layers, the first one first':>45}")
    rows = []
    for feedback in (0.1, 0.5, 0.9):
        for asymmetry in (0.0, 0.1, 0.3, 1.0, UNRELATED):
            row = angles(feedback, asymmetry)
            rows.append(row)
            shown = "  ".join(f"{row['cosines'][name]:7.4f}" for name in ("0.weight", "2.weight", "4.weight"))
            print(f"{feedback:>5} {asymmetry:>10} {shown:>45}", flush=True)
    print(f"\n{'training':>12} {'accuracy %, by seed':>26} {'mean':>6} {'cosine of W and B':>18} {'s':>6}")
    runs = []
    for mode in options.modes:
        found = [train(mode, seed, options) for seed in range(options.seeds)]
        runs += found
        accuracies = [run["accuracy"] for run in found]
        cosines = [cosine for run in found for cosine in run["cosines"]]
        print(
            f"{mode:>12} {'  '.join(f'{a:6.2f}' for a in accuracies):>26} {statistics.mean(accuracies):6.2f} "
            f"{f'{min(cosines):.2f} to {max(cosines):.2f}' if cosines else '':>18} "
            f"{statistics.median(run['seconds'] for run in found):6.1f}",
            flush=True,
        )
    keep({"angles": rows, "training": runs}, options.out)


if __name__ == "__main__":
    sys.exit(main())
