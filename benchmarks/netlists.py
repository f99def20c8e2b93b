"""Netlists of resistive blocks against ngspice: how far node voltages are from our states, by emission coefficient.

    python benchmarks/netlists.py [--emissions 1 0.1 0.01 0.001] [--samples 3]

Networks with random weights at γ = 0.1, in float64. An error is the largest deviation of a voltage of a kind (nodes,
outputs of amplifiers) in the largest voltage of that kind, the worst of the samples. `simulate` is the median wall time
of ngspice for one operating point, reading the file included. ngspice is a Debian package.
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks and a few inputs."""
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    for sizes in ((32, 24, 10), (128, 64, 10), (64, 128, 96, 10)):
        layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]
        found["-".join(map(str, sizes))] = (nn.Sequential(*layers), torch.randn(32, sizes[0]))
    images = [nn.Conv2d(1, 4, 3), nn.LeakyReLU(0.1), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 3)]
    found["convolutions, 8×8"] = (nn.Sequential(*images), torch.randn(32, 1, 8, 8))
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
    sizes = {kind: max(abs(v) for key, v in expected.items() if key[0] == kind) for kind in "vs"}
    return max(abs(found[key] - value) / sizes[key[0]] for key, value in expected.items()), seconds


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emissions", type=float, nargs="+", default=[1, 0.1, 0.01, 0.001])
    parser.add_argument("--samples", type=int, default=3)
    options = parser.parse_args()
    if shutil.which("ngspice") is None:
        sys.exit("ngspice is not installed (a Debian package)")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'network':>18} {'resistors':>9} {'simulate':>9}   error at n = {options.emissions}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "block.cir"
        for name, (model, x) in networks().items():
            model, x = model.double(), x.double()
            hybrid = ffebm.convert(model, x[:2], energy="resistive", feedback=0.1)
            errors, seconds = [], []
            for emission in options.emissions:
                runs = []
                for sample in range(options.samples):
                    hybrid.export_spice(path, block="block_1", inputs=x[sample : sample + 1], emission=emission)
                    runs.append(error(path))
                errors.append(max(run[0] for run in runs))
                seconds += [run[1] for run in runs]
            resistors = len(re.findall(r"^R", path.read_text(), re.MULTILINE))
            shown = " ".join(f"{value:.1e}" for value in errors)
            print(f"{name:>18} {resistors:9} {statistics.median(seconds):8.2f}s   {shown}")


if __name__ == "__main__":
    main()
