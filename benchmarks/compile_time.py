"""Compile time: the whole of `ffebm.convert` beside `torch.export` alone, with a free batch.

    python benchmarks/compile_time.py [--layers 300 3000] [--steps 5]

Networks are stacks of linear layers of width 32 with ReLU, so that many blocks of several layers have their norms
measured. Both take turns in one process after a small network. Times are CPU seconds of one thread, and the ratio is
the median over pairs. The last column is the partition alone, without the capture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.presets import resolve_hardware
from ffebm_compiler.passes.planning import make_plan
from ffebm_compiler.pipeline import annotated_program
from ffebm_compiler.plan_data import PlanOptions

sys.path.insert(0, str(Path(__file__).parent))
from measuring import print_table, seconds, write


def stack(layers: int, width: int = 32) -> nn.Module:
    """Linear layers with ReLU."""
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU()))).eval()


def measure(layers: int, steps: int) -> dict[str, object]:
    """CPU seconds of the export, of `convert` and of the partition."""
    device, model, x = torch.device("cpu"), stack(layers), torch.randn(4, 32)

    def export() -> None:
        torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},), strict=False)

    export_s, convert_s = [], []
    for _ in range(steps):
        export_s.append(seconds(export, device))
        convert_s.append(seconds(lambda: ffebm.convert(model, x), device))
    hardware, options = resolve_hardware("crossbar-256"), PlanOptions()
    program, graph = annotated_program(model, (x,), {}, options, "batch", hardware)
    plan_s = [seconds(lambda: make_plan(program, graph, hardware, options, "digital"), device) for _ in range(steps)]
    return {
        "name": f"{layers} layers",
        "export_s": statistics.median(export_s),
        "convert_s": statistics.median(convert_s),
        "ratio": statistics.median(c / e for c, e in zip(convert_s, export_s, strict=True)),
        "plan_s": statistics.median(plan_s),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[300, 3000])
    parser.add_argument("--steps", type=int, default=5, help="measured conversions of each network")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="compiling runs on the host alone")
    parser.add_argument("--out", type=Path, help="also write the results as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(3, 1)
    rows = [measure(layers, options.steps) for layers in options.layers]
    columns = [
        ("export s", "export_s", "10.2f"),
        ("convert s", "convert_s", "10.2f"),
        ("ratio", "ratio", "10.3f"),
        ("partition s", "plan_s", "12.3f"),
    ]
    print_table("compile time", rows, columns)
    write([{"title": "compile time", "rows": rows}], options)


if __name__ == "__main__":
    main()
