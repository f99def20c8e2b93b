"""Resistive blocks against ngspice: how far node voltages are from our states, and how long both take to settle.

    python benchmarks/netlists.py [--emissions 1 0.1 0.01 0.001] [--samples 3]
    python benchmarks/netlists.py --settle [--longest 60]

Networks with random weights in float64: with amplifiers at γ = 0.1, and deep resistive networks (drn), free and with
outputs nudged by currents of a third of their range. An error is the largest deviation of a voltage of a kind (nodes,
outputs of amplifiers) in the largest voltage of that kind, the worst of the samples. `simulate` is the median wall time
of ngspice for one operating point, reading the file included. ngspice is a Debian package.

`--settle` settles a batch of 32 in float64: by our solver to a relative error of 1e-7, and in ngspice as the training
loop does (`ffebm.Ngspice`: one circuit, sources altered sample by sample), with diodes of n = 0.01. ngspice has a
relative tolerance of 1e-9; with 1e-7 it takes as long. Strict networks have conductances from 0 to 1/n. Networks with
amplifiers have γ = 1. Both have as many sources as the first number says. Times are CPU times of one thread, for ours
the median of 100, for ngspice those of one run. Networks grow until ngspice takes longer than `--longest` seconds.
"""

from __future__ import annotations

import argparse
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep

import ffebm_compiler as ffebm


class Strict(nn.Module):
    """A deep resistive network."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((2 * sizes[0], *sizes[1:])))
        for layer in self.layers:
            ffebm.init.conductances_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The currents that meet at the nodes."""
        s = 4 * torch.cat((x, -x), -1)
        for layer in self.layers[:-1]:
            above, below = layer(s).chunk(2, -1)
            s = torch.cat((above.relu(), below.clamp(max=0)), -1)
        return self.layers[-1](s)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks and a few inputs."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for sizes in ((32, 24, 10), (128, 64, 10), (64, 128, 96, 10)):
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
        found["-".join(map(str, sizes))] = (nn.Sequential(*layers), torch.randn(32, sizes[0]))
    images = [nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    found["convolutions, 8×8"] = (nn.Sequential(*images), torch.randn(32, 1, 8, 8))
    for sizes in ((16, 24, 10), (64, 64, 32, 10)):
        found[f"drn {'-'.join(map(str, sizes))}"] = (Strict(sizes), torch.randn(32, sizes[0]))
    return found


def voltages(text: str, pattern: str) -> dict[str, float]:
    """Node -> voltage."""
    return {m[1]: float(m[2]) for m in re.finditer(pattern + r"v\((\w+)\) = ([-+\d.e]+)", text)}


def error(path: Path) -> tuple[float, float]:
    """The largest relative deviation of ngspice from the voltages that a netlist expects, and the seconds it took."""
    started = time.perf_counter()
    done = subprocess.run(["ngspice", "-b", str(path)], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    found, expected = voltages(done.stdout, ""), voltages(path.read_text(), "expected ")
    if found.keys() != expected.keys():
        raise RuntimeError(f"ngspice has found no operating point: {done.stderr[-300:]}")
    kinds = {key[0] for key in expected}
    sizes = {kind: max(abs(v) for key, v in expected.items() if key[0] == kind) for kind in kinds}
    return max(abs(found[key] - value) / sizes[key[0]] for key, value in expected.items()), seconds


SETTLED = ((32, 24, 10), (64, 32, 10), (128, 64, 10), (100, 128, 10), (200, 256, 10), (256, 384, 10), (400, 512, 10))
"""Layers of the networks that are settled: sources, nodes with diodes, outputs."""


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def settled_network(sizes: tuple[int, ...], strict: bool) -> tuple[ffebm.HybridModel, Tensor]:
    """A network of these layers in one block, and 32 inputs."""
    solver = ffebm.GaussSeidel(rtol=1e-7)
    if not strict:
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
        model, x = nn.Sequential(*layers).double(), torch.randn(32, sizes[0]).double()
        options = {"energy": "resistive", "feedback": 1.0, "hardware": "ideal"}
        return ffebm.convert(model, x[:2], solver=solver, **options).eval(), x
    circuit = Strict((sizes[0] // 2, *sizes[1:])).double()
    with torch.no_grad():
        for layer in circuit.layers:
            layer.weight.copy_(torch.rand(layer.weight.shape) / layer.in_features)
            layer.bias.zero_()
    x = torch.randn(32, sizes[0] // 2).double()
    return ffebm.convert(circuit, x[:2], energy="drn", hardware="ideal", solver=solver).eval(), x


def settle(longest: float, out: Path | None) -> None:
    """Print how long our solver and ngspice take for the same batch."""
    print(f"{'network':>24} {'resistors':>9} {'ours':>9} {'sweeps':>6} {'ngspice':>9} {'ratio':>7} {'deviation':>9}")
    rows: list[dict[str, Any]] = []
    for strict in (True, False):
        for sizes in SETTLED:
            rows.append(settle_one(sizes, strict))
            keep(rows, out)
            if rows[-1]["ngspice_s"] > longest:
                break


def settle_one(sizes: tuple[int, ...], strict: bool) -> dict[str, Any]:
    """Print the line of one network."""
    hybrid, x = settled_network(sizes, strict)
    block = hybrid.blocks[0].module
    with torch.no_grad(), hybrid.recording() as record:
        hybrid(x)
    operands = record["block_1"][0]
    inputs, weights = operands[: block.program.inputs], operands[block.program.inputs :]
    times = []
    for _ in range(100):
        started = time.process_time()
        states = block.settle(inputs, weights).states
        times.append(time.process_time() - started)
    sweeps = block.last.sweeps
    fabric = ffebm.Ngspice(emission=0.01, volts=1.0 if strict else 20.0, timeout=3600)
    hybrid.set_solver(ffebm.Measured(fabric))
    block.settle([value[:1] for value in inputs], weights)  # which writes the netlist
    started = children()
    found = block.settle(inputs, weights).states
    theirs, ours = children() - started, statistics.median(times)
    deviation = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, states, strict=True))
    name = f"{'drn ' * strict}{'-'.join(map(str, sizes))}"
    print(
        f"{name:>24} {sum(a * b for a, b in pairwise(sizes)):9} {1e3 * ours:6.2f} ms {sweeps:6} {theirs:7.2f} s "
        f"{theirs / ours:7.0f} {deviation:9.1e}",
        flush=True,
    )
    figures = {"ours_s": ours, "ngspice_s": theirs, "ratio": theirs / ours, "deviation": deviation, "sweeps": sweeps}
    return {"network": name, **figures}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emissions", type=float, nargs="+", default=[1, 0.1, 0.01, 0.001])
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--settle", action="store_true", help="compare times to settle")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of ngspice at which --settle ends")
    add_out(parser)
    options = parser.parse_args()
    if shutil.which("ngspice") is None:
        sys.exit("ngspice is not installed: apt-get install ngspice (Debian, Ubuntu), brew install ngspice (macOS)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.settle:
        settle(options.longest, options.out)
        return
    print(f"{'network':>24} {'resistors':>9} {'simulate':>9}   error at n = {options.emissions}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.cir"
        for name, (model, x), nudged in ((n, m, k) for n, m in networks().items() for k in (False, True)):
            if nudged and not isinstance(model, Strict):
                continue
            model, x = model.double(), x.double()
            settings = {"energy": "drn"} if isinstance(model, Strict) else {"energy": "resistive", "feedback": 0.1}
            hybrid = ffebm.convert(model, x[:2], **settings)
            (block,) = hybrid.blocks
            output = hybrid(x[:1]).detach()
            nudge = output.abs().max() / 3 * torch.randn(output.shape[1:]).sign()
            currents = {block.state_names[-1]: nudge} if nudged else None
            errors, seconds = [], []
            for emission in options.emissions:
                runs = []
                for sample in range(options.samples):
                    given = x[sample : sample + 1]
                    hybrid.export_spice(path, block="block_1", inputs=given, emission=emission, currents=currents)
                    runs.append(error(path))
                errors.append(max(run[0] for run in runs))
                seconds += [run[1] for run in runs]
            resistors = len(re.findall(r"^R", path.read_text(), re.MULTILINE))
            shown = " ".join(f"{value:.1e}" for value in errors)
            named = dict(zip(map(str, options.emissions), errors, strict=True))
            rows.append({"network": name + ", nudged" * nudged, "errors": named})
            keep(rows, options.out)
            print(f"{name + ', nudged' * nudged:>24} {resistors:9} {statistics.median(seconds):8.2f}s   {shown}")


if __name__ == "__main__":
    main()
