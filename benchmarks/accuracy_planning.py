"""How much can be analog at a drop of 1 %? `plan_for_accuracy` beside the greedy order by multiply-accumulates.

    python benchmarks/accuracy_planning.py [--only NAME ...] [--settings pcm@86400 reram@0 reram@86400] [--jobs 2]

A setting is a preset of devices and their age in seconds. LionHeart (Lammie et al., arXiv 2401.09420) ranks layers by
their multiply-accumulates and makes them analog greedily, the largest first; a layer whose mapping drops by more than
the budget stays digital, and the next is tried. Here both measure mappings in the same way, with the same devices. Both
results are built as plans and confirmed with the same devices that neither search has seen. Where they do not confirm a
mapping, the next of the same search is taken, within a smaller budget. In the end both plans are judged with 20 further
devices, which decide nothing. LionHeart also trains its networks for the hardware, which is left out on both sides.

`--larger 5000` also measures every mapping with more multiply-accumulates than both results, if there are no more than
so many: the first that is within the budget on the same devices, and is confirmed by them, is the best there is.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from accuracy_networks import NETWORKS, MissingPackage
from which_layers import on

import ffebm_compiler as ffebm
from ffebm_compiler.accuracy.evaluation import Measure, Setting
from ffebm_compiler.accuracy.mappings import Mapping, Mappings, search
from ffebm_compiler.accuracy.plan_for_accuracy import best_plan
from ffebm_compiler.accuracy.planner import Planner
from ffebm_compiler.files.whole_files import write_whole

HEAD = (
    "network", "devices", "layers", "all analog drops", "search", "analog MACs", "digital layers", "confirmed drop",
    "judged drop", "mappings", "s",
)  # fmt: skip
_JUDGED = 2_000_003
"""Added to the seeds of the devices that judge both results."""


def greedy_by_macs(mappings: Mappings, most: float, refused: Collection[Mapping]) -> Iterator[Mapping]:
    """The mapping that the greedy order ends with. If it is refused, the greedy order's end without it, and so on."""
    order = sorted(range(len(mappings.parts)), key=lambda index: -mappings.parts[index].macs)
    mappings.drop(frozenset(order))  # for the report
    given = set(refused)
    while True:
        mapping: Mapping = frozenset()
        for index in order:
            if mapping | {index} not in given and mappings.drop(mapping | {index}) <= most:
                mapping |= {index}
        if not mapping:
            return
        yield mapping
        given.add(mapping)


def compare(name: str, setting: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each search."""
    torch.set_num_threads(1)
    case = NETWORKS[name](options.quick)
    if options.device != "cpu":
        case = on(case, options.device)
    devices, _, age = setting.partition("@")
    file = f"{name.replace(' ', '-').replace(',', '')}-{setting}.json"
    planner = Planner.of(
        case.model,
        case.example,
        case.evaluate,
        devices=devices,
        max_drop=options.max_drop,
        settings={},
        draws=options.draws,
        age=float(age or 0),
        file=options.folder / file if options.folder else None,
        options=case.options,
    )
    rows = []
    shared = planner.mappings
    for what, run in (("greedy by MACs", greedy_by_macs), ("plan_for_accuracy", search)):
        # Results are kept in common, so that what both measure is measured once. Each counts its own mappings.
        planner.mappings = replace(shared, seen={}, deviations={})
        started = time.process_time()
        row: dict[str, Any] = {"network": name, "metric": case.metric, "search": what, "layers": len(shared.parts)}
        row |= {"devices": setting, "draws": options.draws, "source": shared.source}
        try:
            plan = best_plan(planner, partial(run, planner.mappings))
            report = plan.measurement
            row |= {"share": plan.analog_macs / max(1, planner.measure.hybrid.plan.analog_macs)}
            row |= {"drop": report.drop, "error": report.error, "full": report.full_drop}
            row |= {"digital": len(report.digital), "digital layers": [each.name for each in report.digital]}
        except ffebm.PlanError as error:
            plan = None
            row |= {"share": 0.0, "failed": str(error), "digital": len(shared.parts), "drop": 0.0, "error": None}
            row |= {"full": planner.mappings.seen[frozenset(range(len(shared.parts)))]}
        row |= {"mappings": len(planner.mappings.seen), "seconds": time.process_time() - started}
        row |= {"judged": None if plan is None else judged(planner, plan, options.judges)}
        rows.append(row)
    if options.larger:
        rows.append(best_of_all(planner, rows, options))
    return rows


def larger(macs: Sequence[int], least: int, most: int) -> list[Mapping] | None:
    """All mappings with more multiply-accumulates than `least`, the largest first. None: there are more than `most`."""
    order = sorted(range(len(macs)), key=lambda index: macs[index])
    spare = sum(macs) - least
    found: list[tuple[int, Mapping]] = [(0, frozenset())]
    for index in order:  # sets of digital layers
        found += [(sum_ + macs[index], some | {index}) for sum_, some in found if sum_ + macs[index] < spare]
        if len(found) > most:
            return None
    everything = frozenset(order)
    return [everything - some for sum_, some in sorted(found, key=lambda each: each[0]) if sum_ < spare]


def within(mappings: Mappings, mapping: Mapping, most: float) -> bool:
    """Whether the mean drop is at most so much. Stops when even no error on all further devices could not save it."""
    for draws in range(1, mappings.draws + 1):
        drop = replace(mappings, draws=draws, seen={}, deviations={}).drop(mapping)
        hoped = (mappings.draws - draws) * (mappings.source - 1)  # an accuracy is at most 1
        if draws * drop + hoped > mappings.draws * most:
            return False
    return True


def best_of_all(planner: Planner, rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The row of the largest mapping of all that passes what the result of a search has to pass."""
    mappings, started = planner.mappings, time.process_time()
    best = max(rows, key=lambda row: row["share"])
    macs = [part.macs for part in mappings.parts]
    candidates = larger(macs, round(best["share"] * planner.measure.hybrid.plan.analog_macs), options.larger)
    measured = f"more than {options.larger}" if candidates is None else len(candidates)
    row = {**best, "search": "all larger mappings", "mappings": measured}
    for mapping in candidates or ():
        if not within(mappings, mapping, options.max_drop) or mappings.drop_again(mapping) > options.max_drop:
            continue
        plan = planner.plan_of(mapping)
        drops = planner.confirmed(plan)
        if statistics.fmean(drops) <= options.max_drop:
            digital = [mappings.parts[index].name for index in range(len(macs)) if index not in mapping]
            row |= {"share": plan.analog_macs / planner.measure.hybrid.plan.analog_macs, "digital layers": digital}
            row |= {"digital": len(digital), "drop": statistics.fmean(drops)}
            row |= {"judged": judged(planner, plan, options.judges)}
            break
    return row | {"seconds": time.process_time() - started}


def judged(planner: Planner, plan: ffebm.Plan, draws: int) -> tuple[float, float]:
    """The mean drop of the plan's own hybrid over devices that decided nothing, and its standard error."""
    hybrid = ffebm.convert(planner.model, planner.example_inputs, plan=plan)
    seen = planner.measure
    measure = Measure(hybrid, seen.evaluate, seen.devices, seen.age, _JUDGED)
    held = tuple(name for block in plan.blocks for name in block.operations)
    values = [measure.measured(Setting("", "the plan", held, None, draw))[0] for draw in range(draws)]
    drops = [planner.mappings.source - value for value in values]
    return statistics.fmean(drops), statistics.stdev(drops) / draws**0.5


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    judged = "" if row["judged"] is None else f"{row['judged'][0]:.4f} ± {row['judged'][1]:.4f}"
    cells = (
        row["network"], row["devices"], row["layers"], f"{row['full']:.4f}", row["search"],
        f"{100 * row['share']:.1f} %", row["digital"], f"{row['drop']:.4f}", judged, row["mappings"],
        f"{row['seconds']:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def compared(options: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of each network and setting, as they are done."""
    names = [name for name in NETWORKS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        futures = {
            pool.submit(compare, name, setting, options): f"{name}, {setting}"
            for name in names
            for setting in options.settings
        }
        for future in as_completed(futures):
            try:
                yield future.result()
            except MissingPackage as error:
                print(f"{futures[future]}: {error}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="networks that match a glob pattern")
    parser.add_argument("--settings", nargs="+", default=["pcm@86400", "reram@0", "reram@86400"])
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--judges", type=int, default=20, help="devices that judge the results")
    parser.add_argument("--larger", type=int, default=0, help="larger mappings that are measured at most")
    parser.add_argument("--jobs", type=int, default=1, help="networks and settings that are done at once")
    parser.add_argument("--device", default="cpu", help="where networks and data lie")
    parser.add_argument("--quick", action="store_true", help="small networks and little data")
    parser.add_argument("--folder", type=Path, help="keeps what was measured, to go on from")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    print("| " + " | ".join(HEAD) + " |\n" + "| --- " * len(HEAD) + "|", flush=True)
    rows = []
    for found in compared(options):
        rows += found
        print("\n".join(map(line, found)), flush=True)
        if options.out:
            write_whole(options.out, json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
