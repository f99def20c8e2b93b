"""How much can be analog at a drop of 1 %? `plan_for_accuracy` beside the greedy order by multiply-accumulates.

    python benchmarks/accuracy_planning.py [--only NAME ...] [--devices reram] [--max-drop 0.01] [--draws 3] [--quick]

LionHeart (Lammie et al., arXiv 2401.09420) ranks layers by their multiply-accumulates and makes them analog greedily,
the largest first; a layer whose mapping drops by more than the budget stays digital. Here both measure mappings in the
same way, with the same devices. Both results are built as plans and confirmed with the same devices that neither search
has seen. Where they do not confirm a mapping, the next of the same search is taken, within a smaller budget. LionHeart
also trains its networks for the hardware, which is left out on both sides.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from accuracy_networks import NETWORKS, MissingPackage

import ffebm_compiler as ffebm
from ffebm_compiler.accuracy.mappings import Mapping, Mappings, search
from ffebm_compiler.accuracy.plan_for_accuracy import best_plan
from ffebm_compiler.accuracy.planner import Planner
from ffebm_compiler.files.whole_files import write_whole

HEAD = ("network", "search", "layers", "analog MACs", "digital layers", "drop", "error", "all analog", "mappings", "s")


def greedy_by_macs(mappings: Mappings, most: float) -> list[Mapping]:
    """The mappings that the greedy order accepts, the last and largest first."""
    order = sorted(range(len(mappings.parts)), key=lambda index: -mappings.parts[index].macs)
    mappings.drop(frozenset(order))  # for the report
    mapping: Mapping = frozenset()
    accepted = []
    for index in order:
        if mappings.drop(mapping | {index}) <= most:
            mapping |= {index}
            accepted.append(mapping)
    return accepted[::-1]


def compare(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each search."""
    case = NETWORKS[name](options.quick)
    planner = Planner.of(
        case.model,
        case.example,
        case.evaluate,
        devices=options.devices,
        max_drop=options.max_drop,
        settings={},
        draws=options.draws,
        age=options.age,
        file=options.folder / f"{name.replace(' ', '-')}-{options.devices}.json" if options.folder else None,
        options=case.options,
    )
    rows = []
    shared = planner.mappings
    for what, run in (("greedy by MACs", greedy_by_macs), ("plan_for_accuracy", search)):
        # Results are kept in common, so that what both measure is measured once. Each counts its own mappings.
        planner.mappings = replace(shared, seen={})
        started = time.process_time()
        row: dict[str, Any] = {"network": name, "metric": case.metric, "search": what, "layers": len(shared.parts)}
        row |= {"devices": options.devices, "source": shared.source}
        try:
            plan = best_plan(planner, partial(run, planner.mappings))
            report = plan.measurement
            row |= {"share": plan.analog_macs / max(1, planner.measure.hybrid.plan.analog_macs)}
            row |= {"drop": report.drop, "error": report.error, "full": report.full_drop}
            row |= {"digital": len(report.digital), "digital layers": [each.name for each in report.digital]}
        except ffebm.PlanError as error:
            row |= {"share": 0.0, "failed": str(error), "digital": len(shared.parts), "drop": 0.0, "error": None}
            row |= {"full": planner.mappings.seen[frozenset(range(len(shared.parts)))]}
        row |= {"mappings": len(planner.mappings.seen)}
        rows.append(row | {"seconds": time.process_time() - started})
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    error = "" if row["error"] is None else f"{row['error']:.4f}"
    cells = (
        row["network"], row["search"], row["layers"], f"{100 * row['share']:.1f} %", row["digital"],
        f"{row['drop']:.4f}", error, f"{row['full']:.4f}", row["mappings"], f"{row['seconds']:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="networks that match a glob pattern")
    parser.add_argument("--devices", choices=sorted(set(ffebm.device_presets()) - {"ideal"}), default="reram")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--age", type=float, default=0.0, help="seconds since the devices were programmed")
    parser.add_argument("--quick", action="store_true", help="small networks and little data")
    parser.add_argument("--folder", type=Path, help="keeps what was measured, to go on from")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(HEAD) + " |\n" + "| --- " * len(HEAD) + "|")
    rows = []
    for name in (name for name in NETWORKS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)):
        try:
            rows += compare(name, options)
        except MissingPackage as error:
            print(f"{name}: {error}")
    if options.out:
        write_whole(options.out, json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
