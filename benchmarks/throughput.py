"""Images a second in training: the papers' network of 15 layers at full width, its source by backprop beside it.

    python benchmarks/throughput.py --device cuda [--network L15 L6] [--batch 128] [--out results.json]
    python benchmarks/throughput.py --width 8 --batch 8 --steps 3        # a CPU, one thread

The network is `fifteen_layers` (ImageNet of 32×32 pixels, 1000 classes) or `six_layers` (CIFAR-10) of
`examples/papers_networks.py`, with the papers' blocks: each begins with a state that is driven by a digital value. The
data are random and of the right size, and Adam changes the weights in every step, so that the loop gain is measured
and held in every step. Rows take turns in one process; a figure is the median over the steps.

Rows "graphed" replay a CUDA graph: of the source by `torch.cuda.make_graphed_callables`, of a hybrid by
`ffebm.GraphedStep`. Precisions: "float32" with TF32 off, "tf32", and "bf16" (autocast). `host waits` is how often a
step makes the host wait for the GPU, `kernels` how many it launches, and `busy` the share of the step in which a kernel
runs.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from measuring import add_options, prepare, print_table, seconds, wanted, write
from papers_networks import fifteen_layers, papers_plan, six_layers

import ffebm_compiler as ffebm

NETWORKS: dict[str, tuple[Callable[..., nn.Module], int, int]] = {
    # build, its width in the paper, number of classes
    "L15": (partial(fifteen_layers, classes=1000), 64, 1000),
    "L6": (six_layers, 128, 10),
}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "source, backprop": None,
    "ep, κ 0.1": {"feedback": 0.1},
    "ep, κ 0.5": {"feedback": 0.5},
    "implicit, κ 0.1": {"feedback": 0.1, "gradient": "implicit"},
}
GRAPHED = ", graphed"
"""Ending of the rows in which the step is a CUDA graph: `torch.cuda.make_graphed_callables`, or `GraphedStep`."""
PRECISIONS = ("float32", "tf32", "bf16")


@dataclass
class Trainer:
    """A network, its optimizer, and one batch of random data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    precision: str
    graph: ffebm.GraphedStep | None = None
    cached: bool = True
    """Whether autocast keeps casts of the weights. Not where torch replays the graph of a module."""

    def rounding(self) -> contextlib.AbstractContextManager[Any]:
        """Autocast, or nothing."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.images.device.type, torch.bfloat16, cache_enabled=self.cached)

    def step(self) -> None:
        """Forward, backward and an update of the weights."""
        if self.graph is not None:
            with self.rounding():
                self.graph(self.images, self.labels)
            self.optimizer.step()
            return
        self.optimizer.zero_grad(set_to_none=True)
        with self.rounding():
            loss = F.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimizer.step()

    @property
    def sweeps(self) -> float | None:
        """The median number of free sweeps of the blocks that settled in the last step."""
        blocks = self.model.blocks if isinstance(self.model, ffebm.HybridModel) else ()
        taken = [b.module.last.sweeps for b in blocks if b.module.last and b.module.program.coupled]
        return statistics.median(taken) if taken else None


def trainer(network: str, variant: str, precision: str, options: argparse.Namespace, device: torch.device) -> Trainer:
    """The source or a hybrid of it, in train mode."""
    torch.manual_seed(0)
    build, width, classes = NETWORKS[network]
    source = build(width=options.width or width)
    x = torch.randn(options.batch, 3, 32, 32, device=device)
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        source = source.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    graphed = variant.endswith(GRAPHED)
    model, settings = source.to(device), VARIANTS[variant.removesuffix(GRAPHED)]
    if settings is not None:
        model = ffebm.convert(model, x[:2], plan=papers_plan(source, x[:2]), **settings)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    labels = torch.randint(0, classes, (options.batch,), device=device)
    made = Trainer(model.train(), optimizer, x, labels, precision)
    if graphed and isinstance(model, ffebm.HybridModel):
        made.graph = ffebm.GraphedStep(model, F.cross_entropy)
    elif graphed:
        made.cached = False
        with made.rounding():
            made.model = torch.cuda.make_graphed_callables(model, (x,))
    return made


@contextlib.contextmanager
def precision_of(name: str) -> Iterator[None]:
    """TF32 on or off."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = name != "float32"
    yield
    for backend, allowed in zip(backends, before, strict=True):
        backend.allow_tf32 = allowed


def waits_of(step: Callable[[], None]) -> int:
    """How often the host waits for the GPU in a step."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def kernels_of(step: Callable[[], None]) -> tuple[int, float]:
    """(number of kernels of a step, milliseconds in which one runs)."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len(kernels), sum(event.device_time for event in kernels) / 1e3


def measured(network: str, precision: str, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """A row for each variant."""
    every = [name + ending for name in VARIANTS for ending in ("", GRAPHED) if not ending or device.type == "cuda"]
    names = [name for name in every if name == every[0] or wanted(name, options.only)]
    with precision_of(precision):
        trainers = {name: trainer(network, name, precision, options, device) for name in names}
        for one in trainers.values():
            for _ in range(5):
                one.step()
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(options.steps):
            for name, one in trainers.items():
                times[name].append(seconds(one.step, device))
        rows = []
        for name, one in trainers.items():
            took = statistics.median(times[name])
            row = {"name": name, "ms": 1e3 * took, "images_per_second": options.batch / took, "sweeps": one.sweeps}
            if device.type == "cuda":
                row["host_waits"] = waits_of(one.step)
                row["kernels"], busy = kernels_of(one.step)
                row["busy"] = min(1.0, busy / row["ms"])
            rows.append(row)
    for row in rows:
        row["ratio"] = row["ms"] / rows[0]["ms"]
    return rows


COLUMNS = (
    ("ms", "ms", "9.2f"),
    ("ratio", "ratio", "7.2f"),
    ("images/s", "images_per_second", "10.0f"),
    ("sweeps", "sweeps", "7g"),
    ("host waits", "host_waits", "11g"),
    ("kernels", "kernels", "8g"),
    ("busy", "busy", "6.2f"),
)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=15)
    parser.add_argument("--network", nargs="+", choices=tuple(NETWORKS), default=["L15"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: all on a GPU, float32 on a CPU")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, help="channels of the first layer; default: the paper's")
    parser.add_argument("--channels-last", action="store_true")
    options = parser.parse_args()
    device = prepare(options, parser)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    tables = []
    for network in options.network:
        for precision in options.precision or (PRECISIONS if device.type == "cuda" else PRECISIONS[:1]):
            title = f"{network}, {precision}, batch {options.batch}" + (
                ", channels last" if options.channels_last else ""
            )
            if not wanted(title, options.table):
                continue
            rows = measured(network, precision, options, device)
            print_table(title, rows, COLUMNS)
            tables.append({"title": title, "rows": rows})
    write(tables, options)


if __name__ == "__main__":
    main()
