"""What the benchmarks of a training step measure with: time, memory, arithmetic, and the floor under the time.

- Time: CPU seconds of one thread, or between two CUDA events; contestants take turns after a warm-up, medians.
- Memory: what one step adds at its peak, to the resident size of a process of its own (Linux), or to what the CUDA
  allocator has handed out.
- Arithmetic: floating-point operations of convolutions and matrix products, forward and backward, as torch's
  `FlopCounterMode` sees them. It does not see elementwise work (activations, additions, pooling, normalisation) nor
  the traffic to memory, and it counts a convolution as a direct one.
- Floor: that arithmetic at the rate of the best of several large float32 matrix products, by either library that
  settling blocks multiply with, measured at every turn of the same run. Nothing that does this arithmetic in products
  takes less; a convolution by a shorter algorithm (Winograd, FFT) could.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ffebm_compiler.files.whole_files import write_whole

NOT_COUNTED = "Counted are convolutions and matrix products, not elementwise work nor the traffic to memory."


@dataclass(frozen=True)
class Contestant:
    """Something that takes a training step."""

    run: Callable[[], object]
    module: nn.Module
    """Holds the parameters; their gradients are dropped before memory is measured."""
    sweeps: Callable[[], float | None] = lambda: None
    """Free-phase sweeps of the last step."""
    cosine: Callable[[], float | None] = lambda: None
    """Smallest cosine of a parameter's gradient with the exact one."""
    before: Callable[[], object] = lambda: None
    """Runs before each measured step, and is not measured."""


def add_options(parser: argparse.ArgumentParser, steps: int) -> None:
    """Options that the benchmarks share."""
    parser.add_argument("--steps", type=int, default=steps, help="measured steps of each contestant")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tf32", action="store_true", help="let CUDA round the factors of float32 products to 10 bits")
    parser.add_argument("--table", nargs="+", default=["*"], help="only the tables that match a glob pattern")
    parser.add_argument("--only", nargs="+", default=["*"], help="only the rows that match, and the row of the ratios")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    add_out(parser)
    parser.add_argument("--memory-of", nargs=2, metavar=("TABLE", "ROW"), help=argparse.SUPPRESS)


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option that every benchmark has, for `keep`."""
    parser.add_argument("--out", type=Path, help="also write the results as JSON")


def keep(found: object, out: Path | None) -> None:
    """Write results as JSON where `--out` names a file, whole or not at all."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, json.dumps(found, indent=1) + "\n")


class MarkdownTables:
    """Prints rows as Markdown and keeps them for `keep`: `tables` has the cells of every row, the headings' first."""

    def __init__(self, form: str) -> None:
        self.form = form
        self.tables: dict[str, list[list[Any]]] = {}

    def begin(self, title: str) -> None:
        """The rows from now on are those of this table."""
        self.tables[title] = []

    def row(self, *cells: Any) -> None:
        """Print a row, fractions in the form given."""
        next(reversed(self.tables.values())).append(list(cells))
        shown = (f"{cell:{self.form}}" if isinstance(cell, float) else str(cell) for cell in cells)
        print(f"| {' | '.join(shown)} |", flush=True)


def prepare(options: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The device, set up; exit status 2 where there is none."""
    if options.steps < 1:
        parser.exit(2, f"{parser.prog}: --steps {options.steps}: expected at least 1\n")
    torch.set_num_threads(1)
    if options.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda: torch {torch.__version__} finds no CUDA device\n")
    # By these two names: where convolutions alone are set by the newer ones, torch.export fails (torch 2.13).
    torch.backends.cuda.matmul.allow_tf32 = options.tf32
    torch.backends.cudnn.allow_tf32 = options.tf32
    return torch.device("cuda", torch.cuda.current_device())


def wanted(name: str, patterns: list[str]) -> bool:
    """Whether a name matches one of the glob patterns."""
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """CPU seconds of a call, or seconds between two CUDA events around it."""
    if device.type == "cpu":
        started = time.process_time()
        run()
        return time.process_time() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end)) / 1e3


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
"""A matrix product that settling blocks multiply with on some processors (`runtime/program/matrix_products.py`)."""


def flops(run: Callable[[], object]) -> int:
    """Floating-point operations of a call, two for each multiplication and its addition; see the module's docstring."""
    with FlopCounterMode(display=False, custom_mapping=_COUNTED) as counter:
        run()
    return int(counter.get_total_flops())


def _linear_flops(value: Sequence[int], weight: Sequence[int], *args: object, out_shape: object, **kw: object) -> int:
    """Those of one product by oneDNN, from the shapes of its operands."""
    return 2 * math.prod(value) * weight[0]


_COUNTED = {} if _ONEDNN is None else {_ONEDNN: _linear_flops}


def peak_rate(device: torch.device) -> float:
    """FLOP/s of the fastest of several large float32 matrix products."""
    sizes = (256, 512, 1024) if device.type == "cpu" else (4096, 8192)
    best = 0.0
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device)
        out = a @ b
        products = [partial(torch.mm, a, b, out=out)]
        if device.type == "cpu" and _ONEDNN is not None:
            products.append(partial(_ONEDNN, a, b, None, "none", [], ""))
        for product in products * 4:
            best = max(best, 2 * size**3 / seconds(product, device))
    return best


def _resident(key: str) -> float:
    """VmRSS or VmHWM of this process, in MB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1e3


def step_memory(contestant: Contestant, device: torch.device) -> float:
    """MB that one step adds at its peak: on a CPU to this process, which should have run nothing else."""
    contestant.run()
    contestant.module.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        contestant.run()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - allocated) / 1e6
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    contestant.run()
    return _resident("VmHWM") - before


def _memory_elsewhere(table: str, row: str) -> float:
    """`step_memory` of a contestant in a fresh process of the same script with the same options."""
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), *sys.argv, "--memory-of", table, row]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the memory of {row!r} ({table}) could not be measured:\n{done.stderr}")
    return float(done.stdout)


def measure(
    table: str, contestants: Mapping[str, Contestant], options: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """A row for each contestant, which take turns; the first turn warms up and counts the arithmetic."""
    counts = {name: flops(contestant.run) for name, contestant in contestants.items()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    rate = 0.0
    for _ in range(options.steps):
        rate = max(rate, peak_rate(device))
        for name, contestant in contestants.items():
            contestant.before()
            times[name].append(seconds(contestant.run, device))
    rows = []
    for name, contestant in contestants.items():
        milliseconds, floor = 1e3 * statistics.median(times[name]), 1e3 * counts[name] / rate
        memory = None
        if not options.no_memory and device.type == "cuda":
            memory = step_memory(contestant, device)
        elif not options.no_memory and sys.platform == "linux":
            memory = _memory_elsewhere(table, name)
        rows.append(
            {
                "name": name,
                "ms": milliseconds,
                "gflop": counts[name] / 1e9,
                "floor_ms": floor,
                "times_floor": milliseconds / floor,
                "peak_gflops": rate / 1e9,
                "memory_mb": memory,
                "free_sweeps": contestant.sweeps(),
                "worst_cosine": contestant.cosine(),
            }
        )
    return rows


def relate(rows: list[dict[str, Any]], base: str, inverse: bool = False) -> None:
    """Add the ratio of each time and memory to those of `base`; inverse: of `base` to each."""
    first = next(row for row in rows if row["name"] == base)
    for row in rows:
        for key, ratio in (("ms", "ratio"), ("memory_mb", "memory_ratio")):
            pair = (first[key], row[key]) if inverse else (row[key], first[key])
            row[ratio] = pair[0] / pair[1] if all(pair) else None


COLUMNS = (
    # heading ({} is the unit of the times, or what the ratios are), key, format
    ("{unit} ms", "ms", "10.1f"),
    ("{ratio}", "ratio", "10.3f"),
    ("GFLOP", "gflop", "10.4g"),
    ("floor ms", "floor_ms", "10.1f"),
    ("x floor", "times_floor", "8.2f"),
    ("MB", "memory_mb", "8.1f"),
    ("{ratio}", "memory_ratio", "10.3f"),
    ("sweeps", "free_sweeps", "7g"),
    ("worst cosine", "worst_cosine", "13.6f"),
)


def show(title: str, rows: list[dict[str, Any]], options: argparse.Namespace, ratio: str = "ratio") -> None:
    """Print a table of what `measure` found, and on what."""
    unit = "CPU" if options.device == "cpu" else "GPU"
    print_table(title, rows, [(heading.format(unit=unit, ratio=ratio), key, form) for heading, key, form in COLUMNS])
    print(f"measured peak: {rows[0]['peak_gflops']:.1f} GFLOP/s, {conditions(options)}", flush=True)


def print_table(title: str, rows: list[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> None:
    """Print rows by their name. A column is (heading, key, format); one without any figure is left out."""
    lines = [[f"{'':25}"], *([f"{row['name']:25}"] for row in rows)]
    for heading, key, form in columns:
        if all(row.get(key) is None for row in rows):
            continue
        width = int(re.match(r"\d+", form)[0])  # type: ignore[index]
        lines[0].append(f"{heading:>{width}}")
        for line, row in zip(lines[1:], rows, strict=True):
            line.append(f"{'' if row.get(key) is None else f'{row[key]:{form}}':>{width}}")
    print(f"\n{title}")
    print("\n".join(" ".join(line).rstrip() for line in lines), flush=True)


def conditions(options: argparse.Namespace) -> str:
    """On what the peak and the times were measured."""
    if options.device == "cpu":
        return "float32 matrix products, one thread"
    return f"float32 matrix products, {torch.cuda.get_device_name()}, TF32 {'on' if options.tf32 else 'off'}"


def write(tables: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Say what the floor is where there is one, and write the tables as JSON where the options ask for it."""
    if any("floor_ms" in row for table in tables for row in table["rows"]):
        print(f"\nfloor: FLOPs over the measured peak. {NOT_COUNTED}")
    settings = {key: value for key, value in vars(options).items() if isinstance(value, int | float | str)}
    found = {"conditions": conditions(options), "torch": torch.__version__, "options": settings, "tables": tables}
    keep(found, options.out)
