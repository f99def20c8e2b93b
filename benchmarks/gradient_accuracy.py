"""How exact the gradients are: a 15-layer, 6-block heterogeneous CNN against float64 unrolled autograd.

    python benchmarks/gradient_accuracy.py [--out benchmarks/results/gradient_accuracy.json]

Static gradient analysis: one batch, no training. For each loop gain and estimator the table has the
smallest cosine and the largest relative error over all parameters, in float32 with default settings,
and for equilibrium propagation also at hardware-sized β. Weights are random, or those of a network
trained on scikit-learn's digits with `--trained`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm
from ffebm_compiler.reports.checks import ESTIMATORS


class Heterogeneous(nn.Module):
    """15 layers in 6 blocks between digital batch norms: residual, strided, grouped, several activations."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        w = width
        self.a1, self.a2, self.a3 = (nn.Conv2d(i, w, 3, padding=1) for i in (1, w, w))
        self.b1, self.b2, self.b3 = nn.Conv2d(w, w, 3, padding=1), nn.Conv2d(w, w, 1), nn.Conv2d(w, w, 3, padding=1)
        self.c1, self.c2 = nn.Conv2d(w, 2 * w, 3, stride=2, padding=1), nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.d1 = nn.Conv2d(2 * w, 2 * w, 3, padding=1, groups=2 * w)
        self.d2, self.d3 = nn.Conv2d(2 * w, 4 * w, 1), nn.Conv2d(4 * w, 2 * w, 1)
        self.e1, self.e2 = nn.Conv2d(2 * w, 2 * w, 3, stride=2, padding=1), nn.Conv2d(2 * w, 2 * w, 3, padding=1)
        self.f1, self.f2 = nn.Linear(8 * w, 4 * w), nn.Linear(4 * w, 10)
        self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in (w, w, 2 * w, 2 * w, 2 * w))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images of 8 by 8."""
        h = self.norms[0](F.relu(self.a3(F.relu(self.a2(F.relu(self.a1(x)))))))
        h = self.norms[1](F.gelu(h + self.b3(F.gelu(self.b2(torch.tanh(self.b1(h)))))))
        h = self.norms[2](F.leaky_relu(self.c2(F.hardtanh(self.c1(h), 0, 2)), 0.1))
        h = self.norms[3](h + self.d3(F.silu(self.d2(F.relu6(self.d1(h))))))
        h = self.norms[4](F.elu(self.e2(F.relu(self.e1(h)))))
        return self.f2(F.softplus(self.f1(h.flatten(1))))


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's digits: images (1797, 1, 8, 8) and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    return images, torch.tensor(data.target)


def network(trained: bool) -> nn.Module:
    """The CNN, with random weights or trained by backprop for a few epochs."""
    torch.manual_seed(0)
    model = Heterogeneous()
    if trained:
        images, labels = digits()
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        for _ in range(8):
            for batch in torch.randperm(1500).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model


def measure(model: nn.Module, feedback: float, estimator: Any = "ep", batch: int = 16) -> dict[str, Any]:
    """Worst cosine and error of each estimator at a loop gain."""
    images, labels = digits()
    x, y = images[:batch], labels[:batch]
    hybrid = ffebm.convert(model, x, feedback=feedback, gradient=estimator).train()
    report = ffebm.check_gradients(hybrid, x, lambda output: F.cross_entropy(output, y))
    return {
        "layers": sum(len(block.layers) for block in hybrid.plan.blocks),
        "blocks": len(hybrid.plan.blocks),
        "feedback": feedback,
        **{
            name: {
                "cosine": min(row[name].cosine for row in report.agreements.values()),
                "relative_error": max(row[name].relative_error for row in report.agreements.values()),
            }
            for name in ESTIMATORS
        },
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", action="store_true")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = network(options.trained)
    rows = []
    print(
        f"{'loop gain':>9} {'nudge':>16}  " + "  ".join(f"{name + ' cosine':>15} {'error':>8}" for name in ESTIMATORS)
    )
    cases: list[tuple[float, Any, str]] = [(k, "ep", "default") for k in (0.01, 0.03, 0.1, 0.3, 0.5)]
    for beta in (1e-3, 1e-2, 1e-1):
        for variant in ("positive", "centered"):
            cases.append((0.1, ffebm.EquilibriumPropagation(beta=beta, variant=variant), f"{variant} {beta:g}"))
    for feedback, estimator, label in cases:
        row = {"nudge": label, **measure(model, feedback, estimator)}
        rows.append(row)
        figures = "  ".join(f"{row[n]['cosine']:15.6f} {row[n]['relative_error']:8.1e}" for n in ESTIMATORS)
        print(f"{feedback:9g} {label:>16}  {figures}", flush=True)
    print(f"{rows[0]['layers']} layers in {rows[0]['blocks']} blocks, float32, against float64 unrolled")
    keep(rows, options.out)


if __name__ == "__main__":
    main()
