"""One training step of a hybrid against one backprop step of its source.

    python benchmarks/training_step.py [--steps 7] [--out benchmarks/results/training_step.json]
    python benchmarks/training_step.py --held                       # the loop gain is measured in every step
    python benchmarks/training_step.py --device cuda [--tf32]

After the training steps come forwards in eval mode. One thread, or one GPU. The variants of a network take turns in
one process; each figure is the median over the steps of the time of forward and backward, beside the source's median
of the same run and beside the floor under it: `measuring.py` says how each is measured. `--batch`, `--width`,
`--depth` and `--side` change the networks. Weights do not change between the steps, so that the loop gain is measured
once. `--held` marks them as changed before every step, and each step measures it, as in training.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import Contestant, add_options, measure, prepare, relate, show, step_memory, wanted, write

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware

SIZES = {
    # Kernels that keep a core, or a GPU, busy, in steps of less than a second.
    "cpu": {"batch": 32, "width": 32, "depth": 6, "side": 16},
    "cuda": {"batch": 128, "width": 128, "depth": 6, "side": 32},
}
SOURCE = "source, backprop"


class Residual(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """One residual block."""
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class ResidualCNN(nn.Module):
    """Stem, residual blocks, linear head: each residual block is one energy block of two layers."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.blocks(self.norm(self.stem(x))).mean((2, 3)))


class FeedForward(nn.Module):
    """x + W₂ gelu(W₁ norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """One transformer MLP."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class MLPStack(nn.Module):
    """The MLPs of a transformer, one energy block of two layers each."""

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(FeedForward(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean token."""
        return self.head(self.layers(x).mean(1))


class Attention(nn.Module):
    """x + W_o attention(norm(x)), with 4 heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inwards, self.outwards = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Self-attention."""
        batch, tokens, width = x.shape
        parts = self.inwards(self.norm(x)).view(batch, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return x + self.outwards(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Transformer(nn.Module):
    """A transformer whose MLPs are energy blocks of two layers. Attention is digital, its projections single layers."""

    def __init__(self, width: int = 128, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(part(width) for _ in range(depth) for part in (Attention, FeedForward)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean token."""
        return self.head(self.layers(x).mean(1))


Build = Callable[[argparse.Namespace], tuple[nn.Module, Tensor]]
NETWORKS: dict[str, Build] = {
    "residual CNN": lambda o: (ResidualCNN(o.width, o.depth), torch.randn(o.batch, 3, o.side, o.side)),
    "transformer MLP stack": lambda o: (MLPStack(4 * o.width, o.depth), _tokens(o)),
    "transformer": lambda o: (Transformer(4 * o.width, o.depth), _tokens(o)),
}


def _tokens(options: argparse.Namespace) -> Tensor:
    """As many features as the images have, of half as many samples: (side/2)² tokens, and 4 times the width."""
    return torch.randn(max(1, options.batch // 2), max(1, options.side // 2) ** 2, 4 * options.width)


CENTERED = ffebm.EquilibriumPropagation(beta=1e-3, variant="centered")
VARIANTS: dict[str, dict[str, Any] | None] = {
    SOURCE: None,
    "single-layer blocks, ep": {"hardware": Hardware(layers_per_block=1)},
    "ep, default": {},
    "implicit, default": {"gradient": "implicit"},
    "unrolled, default": {"gradient": "unrolled"},
    "ep, feedback 0.3": {"feedback": 0.3},
    "implicit, feedback 0.3": {"feedback": 0.3, "gradient": "implicit"},
    "ep, feedback 0.5": {"feedback": 0.5},
    "ep, feedback 0.7": {"feedback": 0.7},
    "ep, feedback 0.9": {"feedback": 0.9},
    "ep centered, default": {"gradient": CENTERED},
    "ep, full precision": {"solver": ffebm.GaussSeidel(precision="full")},
}
FORWARD = "source, forward"
EVALUATION = ", evaluation"
"""What the title of a network's second table ends with."""
FORWARDS: dict[str, dict[str, Any] | None] = {
    FORWARD: None,
    "single-layer blocks, forward": {"hardware": Hardware(layers_per_block=1)},
    "forward, default": {},
    "forward, feedback 0.5": {"feedback": 0.5},
    "forward, feedback 0.9": {"feedback": 0.9},
}


def evaluate(model: nn.Module, x: Tensor) -> None:
    """Forward in eval mode."""
    with torch.no_grad():
        model(x)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), labels).backward()


def touch(model: nn.Module) -> None:
    """Mark every weight as changed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.0)


def contestant(network: str, name: str, options: argparse.Namespace, device: torch.device) -> Contestant:
    """The source, or a hybrid of it with blocks of two layers, and its training step or forward on one batch."""
    torch.manual_seed(0)
    evaluated = network.endswith(EVALUATION)
    source, x = NETWORKS[network.removesuffix(EVALUATION)](options)
    source.train(not evaluated)
    source, x, labels = source.to(device), x.to(device), torch.randint(0, 10, (len(x),)).to(device)
    settings = FORWARDS[name] if evaluated else VARIANTS[name]
    model = source
    if settings is not None:
        model = ffebm.convert(source, x, **{"hardware": Hardware(layers_per_block=2), **settings})

    def sweeps() -> float | None:
        blocks = model.blocks if isinstance(model, ffebm.HybridModel) else ()
        taken = [b.module.last.sweeps for b in blocks if b.module.last and b.module.program.coupled]
        return statistics.median(taken) if taken else None

    if evaluated:
        return Contestant(partial(evaluate, model, x), model, sweeps)
    run = partial(step, model, x, labels)
    return (
        Contestant(run, model, sweeps, before=partial(touch, model)) if options.held else Contestant(run, model, sweeps)
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=7)
    parser.add_argument("--held", action="store_true", help="measure the loop gain in every step, as in training")
    parser.add_argument("--batch", type=int, help="images, and twice the sequences of tokens")
    parser.add_argument("--width", type=int, help="channels, and a quarter of the features of a token")
    parser.add_argument("--depth", type=int, help="blocks")
    parser.add_argument("--side", type=int, help="of the images; sequences have (side/2)² tokens")
    options = parser.parse_args()
    for key, value in SIZES[options.device].items():
        setattr(options, key, getattr(options, key) or value)
    device = prepare(options, parser)
    if options.memory_of:
        network, name = options.memory_of
        print(step_memory(contestant(network, name, options, device), device))
        return
    tables = []
    for network in [network + end for end in ("", EVALUATION) for network in NETWORKS]:
        if not wanted(network, options.table):
            continue
        base, variants = (FORWARD, FORWARDS) if network.endswith(EVALUATION) else (SOURCE, VARIANTS)
        names = [name for name in variants if name == base or wanted(name, options.only)]
        rows = measure(network, {name: contestant(network, name, options, device) for name in names}, options, device)
        relate(rows, base)
        show(network, rows, options)
        tables.append({"title": network, "rows": rows})
    write(tables, options)


if __name__ == "__main__":
    main()
