"""`torch.compile` of a hybrid and of its source: a training step compiled over the same step eager.

    python benchmarks/compiled.py [--steps 15] [--backend inductor]

One thread, train mode, default settings with blocks of two layers. Source and hybrid, eager and compiled, take
turns in one process; each figure is the median of the CPU time of forward and backward. Compiling counts the
compiler's processes too, from an empty cache, and the first step. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep
from training_step import MLPStack, ResidualCNN, step

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware


class NormalisedCNN(nn.Module):
    """Convolutions with batch norm and SiLU: each convolution is a block of its own, the rest is digital."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__()
        sizes = [3, *[width] * depth]
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.SiLU())
                for a, b in pairwise(sizes)
            )
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.stages(x).mean((2, 3)))


class Encoder(nn.Module):
    """A transformer encoder: attention and layer norm are digital, each MLP is a block of two layers."""

    def __init__(self, width: int = 128, depth: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean token."""
        return self.head(self.encoder(x).mean(1))


class RMSNorm(nn.Module):
    """g x / √(mean x² + ε), written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


class GatedLayer(nn.Module):
    """Attention with rotary positions, and a gated MLP: much elementwise work, every projection a block of its own."""

    def __init__(self, width: int, length: int, head: int = 32) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.gate = (nn.Linear(width, 3 * width, bias=False) for _ in range(2))
        self.down = nn.Linear(3 * width, width, bias=False)
        angle = torch.arange(length)[:, None] / 1e4 ** (torch.arange(head // 2) / (head // 2))
        self.register_buffer("cos", angle.cos().repeat(1, 2))
        self.register_buffer("sin", angle.sin().repeat(1, 2))

    def heads(self, x: Tensor, rotate: bool) -> Tensor:
        """(batch, heads, length, head), turned by the position."""
        x = x.view(x.shape[0], x.shape[1], -1, self.head).transpose(1, 2)
        a, b = x.chunk(2, -1)
        return x * self.cos + torch.cat([-b, a], -1) * self.sin if rotate else x

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        y = self.norm1(x)
        q, k, v = self.heads(self.q(y), True), self.heads(self.k(y), True), self.heads(self.v(y), False)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class GatedTransformer(nn.Module):
    """Layers as in Llama."""

    def __init__(self, width: int = 128, length: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(GatedLayer(width, length) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the mean token."""
        return self.head(self.layers(x).mean(1))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "gated transformer": lambda: (GatedTransformer(), torch.randn(16, 64, 128)),
    "residual CNN": lambda: (ResidualCNN(), torch.randn(32, 3, 16, 16)),
    "transformer MLP stack": lambda: (MLPStack(), torch.randn(16, 64, 128)),
    "transformer encoder": lambda: (Encoder(), torch.randn(16, 64, 128)),
    "the same, dropout 0.1": lambda: (Encoder(dropout=0.1), torch.randn(16, 64, 128)),
    "CNN with batch norm": lambda: (NormalisedCNN(), torch.randn(32, 3, 16, 16)),
    "small MLP stack": lambda: (MLPStack(16, 4), torch.randn(4, 4, 16)),
}


def seconds_of_all() -> float:
    """CPU seconds of this process and of the processes that it waited for."""
    return sum(os.times()[:4])


def measure(name: str, steps: int, backend: str) -> list[tuple[str, float, float, float]]:
    """(what, eager CPU ms, compiled CPU ms, CPU s to compile) of source and hybrid."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    labels = torch.randint(0, 10, (x.shape[0],))
    hybrid = ffebm.convert(model, x, hardware=Hardware(layers_per_block=2))
    models: dict[tuple[str, bool], nn.Module] = {}
    compiling: dict[str, float] = {}
    for what, module in (("source", model), ("hybrid", hybrid)):
        models[what, False] = module.train()
        models[what, True] = copy.deepcopy(module)
        models[what, True].compile(backend=backend)
        started = seconds_of_all()
        step(models[what, True], x, labels)
        compiling[what] = seconds_of_all() - started
    times: dict[tuple[str, bool], list[float]] = {case: [] for case in models}
    for turn in range(steps + 2):
        for case, candidate in models.items():
            started = time.process_time()
            step(candidate, x, labels)
            if turn > 1:  # the first turns warm up
                times[case].append(time.process_time() - started)
    medians = {case: 1e3 * statistics.median(taken) for case, taken in times.items()}
    return [(what, medians[what, False], medians[what, True], compiling[what]) for what in compiling]


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NETWORK")
    add_out(parser)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # in this process, whose CPU time is counted
    print(f"{'network':24} {'what':8} {'eager ms':>9} {'compiled':>9} {'ratio':>6} {'to compile':>11}")
    for name in options.networks:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            for what, eager, compiled, seconds in measure(name, options.steps, options.backend):
                row = f"{name:24} {what:8} {eager:9.1f} {compiled:9.1f} {compiled / eager:6.2f} {seconds:9.1f} s"
                print(row, flush=True)
                figures = {"eager_ms": eager, "compiled_ms": compiled, "first_s": seconds}
                rows.append({"network": name, "what": what, **figures})
                keep(rows, options.out)


if __name__ == "__main__":
    main()
