"""One training step of a hybrid against one backprop step of its source.

    python benchmarks/training_step.py [--steps 7] [--out benchmarks/results/training_step.json]

One thread. The variants of a network take turns in one process; each figure is the median over
the steps of the CPU time of forward and backward, divided by the source's median of the same run.
Memory (on Linux) is what one step adds to the resident size at its peak, in a process of its own for
each variant, after a warm-up and with the heap trimmed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware import Hardware


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


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "residual CNN": lambda: (ResidualCNN(), torch.randn(32, 3, 16, 16)),
    "transformer MLP stack": lambda: (MLPStack(), torch.randn(16, 64, 128)),
}


CENTERED = ffebm.EquilibriumPropagation(beta=1e-3, variant="centered")
VARIANTS: dict[str, dict[str, Any] | None] = {
    "source, backprop": None,
    "single-layer blocks, ep": {"hardware": Hardware(layers_per_block=1)},
    "ep, default": {},
    "implicit, default": {"gradient": "implicit"},
    "unrolled, default": {"gradient": "unrolled"},
    "ep, feedback 0.3": {"feedback": 0.3},
    "implicit, feedback 0.3": {"feedback": 0.3, "gradient": "implicit"},
    "ep, feedback 0.7": {"feedback": 0.7},
    "ep centered, default": {"gradient": CENTERED},
}


def variant(name: str, model: nn.Module, x: Tensor) -> nn.Module:
    """The source, or a hybrid of it with blocks of two layers."""
    settings = VARIANTS[name]
    return (
        model if settings is None else ffebm.convert(model, x, **{"hardware": Hardware(layers_per_block=2), **settings})
    )


def _resident(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def own_memory(network: str, name: str) -> float:
    """MB that one step of a variant adds to this process at its peak."""
    torch.manual_seed(0)
    model, x = NETWORKS[network]()
    labels = torch.randint(0, 10, (x.shape[0],))
    candidate = variant(name, model, x)
    step(candidate, x, labels)
    candidate.zero_grad(set_to_none=True)
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    step(candidate, x, labels)
    return _resident("VmHWM") - before


def memory(network: str, name: str) -> float:
    """`own_memory` in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--memory-of", network, name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def step(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), labels).backward()


def measure(name: str, steps: int) -> dict[str, Any]:
    """CPU times of a network's variants, in turn."""
    torch.manual_seed(0)
    model, x = NETWORKS[name]()
    labels = torch.randint(0, 10, (x.shape[0],))
    models = {case: variant(case, model, x) for case in VARIANTS}
    times: dict[str, list[float]] = {case: [] for case in models}
    for turn in range(steps + 1):
        for case, candidate in models.items():
            started = time.process_time()
            step(candidate, x, labels)
            if turn:  # the first turn warms up
                times[case].append(time.process_time() - started)
    base = statistics.median(times["source, backprop"])
    linux = sys.platform == "linux"
    rows = []
    for case, candidate in models.items():
        seconds = statistics.median(times[case])
        blocks = getattr(candidate, "blocks", ()) if isinstance(candidate, ffebm.HybridModel) else ()
        sweeps = [b.module.last.sweeps for b in blocks if b.module.last and b.module.program.coupled]
        rows.append(
            {
                "variant": case,
                "cpu_ms": 1e3 * seconds,
                "ratio": seconds / base,
                "free_sweeps": statistics.median(sweeps) if sweeps else 0,
                "memory_mb": memory(name, case) if linux else None,
            }
        )
    return {"network": name, "rows": rows}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--memory-of", nargs=2, metavar=("NETWORK", "VARIANT"), help="one figure, as the script itself asks"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory_of:
        print(own_memory(*options.memory_of))
        return
    results = [measure(name, options.steps) for name in NETWORKS]
    for result in results:
        print(
            f"\n{result['network']}\n{'variant':28} {'CPU ms':>9} {'ratio':>7} {'sweeps':>7} {'memory':>9} {'ratio':>7}"
        )
        source = result["rows"][0]["memory_mb"]
        for row in result["rows"]:
            size = f"{row['memory_mb']:6.1f} MB {row['memory_mb'] / source:7.2f}" if source else ""
            print(f"{row['variant']:28} {row['cpu_ms']:9.1f} {row['ratio']:7.2f} {row['free_sweeps']:7g} {size}")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
