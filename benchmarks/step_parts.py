"""Where the time of a training step goes: products, passes over memory, and the rest.

    python benchmarks/step_parts.py [--steps 21] [--table 'residual CNN'] [--only 'ep, default']

The networks and variants of `training_step.py`, on a CPU, one thread. Each figure is the least of the steps, since
other work on a machine only adds to a time. `CPU ms` is without a profiler; the parts are what torch's profiler says of
each operation's own time, in as many steps more:

- products: convolutions and matrix products, forward and backward;
- passes: all other operations that compute (activations, additions, norms, copies, casts);
- rest: what `CPU ms` has beyond these two: Python, autograd and the launching of operations.

`operations` is how many of the two kinds a step calls, one that calls others counted once. In training a hybrid
measures its loop gain in every step besides, which `loop_gain.py` times.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_options, prepare, print_table, seconds, wanted, write
from training_step import NETWORKS, SIZES, SOURCE, VARIANTS, contestant

PRODUCT = re.compile(r"mm$|conv|linear_pointwise|addmv|^aten::(mv|dot)$")
VIEWS = re.compile(
    r"^aten::(_?unsafe_view|_?reshape\w*|alias|as_strided_?|chunk|contiguous|detach_?|empty\w*|expand\w*|flatten|is_\w+|"
    r"item|_local_scalar_dense|new_\w+|narrow|permute|resize_|result_type|select|slice|split\w*|squeeze\w*|t|to|"
    r"_to_copy|transpose|unflatten|unsqueeze|view\w*|zeros?|zeros_like)$"
)
"""Operations that read no values: their time is that of launching."""
COLUMNS = (
    ("CPU ms", "ms", "9.1f"),
    ("products", "products_ms", "9.1f"),
    ("passes", "passes_ms", "8.1f"),
    ("rest", "rest_ms", "7.1f"),
    ("ratio", "ratio", "7.2f"),
    ("of products", "products_ratio", "11.2f"),
    ("operations", "operations", "11.0f"),
)


def parts(run: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds of the products and of the passes of one call, and how many of both it launched."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    products, passes, operations = 0.0, 0.0, 0
    for event in profiler.events():
        if not computes(event):
            continue
        operations += not any(computes(above) for above in ancestors(event))
        if PRODUCT.search(event.name):
            products += event.self_cpu_time_total / 1e6
        else:
            passes += event.self_cpu_time_total / 1e6
    return products, passes, operations


def computes(event: Any) -> bool:
    """Whether an event of the profiler is an operation of torch that reads values."""
    return event.name.startswith(("aten::", "mkldnn::")) and not VIEWS.search(event.name)


def ancestors(event: Any) -> Iterator[Any]:
    """The events that an event is part of, as a convolution by oneDNN is of `aten::conv2d`."""
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=21)
    for key in SIZES["cpu"]:
        parser.add_argument(f"--{key}", type=int, help="as in training_step.py")
    options = parser.parse_args()
    if options.device != "cpu":
        parser.exit(2, f"{parser.prog}: --device {options.device}: only a CPU's steps are taken apart\n")
    for key, value in SIZES["cpu"].items():
        setattr(options, key, getattr(options, key) or value)
    options.held = False
    device = prepare(options, parser)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler says otherwise that it starts and stops
    tables = []
    for network in NETWORKS:
        if not wanted(network, options.table):
            continue
        names = [name for name in VARIANTS if name == SOURCE or wanted(name, options.only)]
        entrants = {name: contestant(network, name, options, device) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in names}
        for entrant in entrants.values():
            entrant.run()  # the first step lowers blocks and measures gains
            parts(entrant.run)  # and the first profile starts the profiler
        for _ in range(options.steps):
            for name, entrant in entrants.items():
                times[name].append(seconds(entrant.run, device))
                found[name].append(parts(entrant.run))
        rows: list[dict[str, Any]] = []
        for name in names:
            products, passes, operations = (min(column) for column in zip(*found[name], strict=True))
            total = min(times[name])
            rows.append(
                {
                    "name": name,
                    "ms": 1e3 * total,
                    "products_ms": 1e3 * products,
                    "passes_ms": 1e3 * passes,
                    "rest_ms": 1e3 * (total - products - passes),
                    "operations": operations,
                }
            )
        for row in rows:  # the source's is the first
            row["ratio"] = row["ms"] / rows[0]["ms"]
            row["products_ratio"] = row["products_ms"] / rows[0]["products_ms"]
        print_table(network, rows, COLUMNS)
        tables.append({"title": network, "rows": rows})
    write(tables, options)


if __name__ == "__main__":
    main()
