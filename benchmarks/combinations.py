"""Every feature with every other: all pairs of values, on three small networks, each with a number that is checked.

    make combinations           (python benchmarks/combinations.py --page docs/combinations.md)

A row is one choice for every axis of `combination_axes.py`: the network and its activation, energy, estimator, solver,
feedback, devices, digital parts, wiring, dtype and mode, and what is done with the hybrid (`combination_checks.py`).
covertable makes a covering array of them for each network: every pair of values is in a row, but for those that
`combination_refusals.py` says are refused. Those have a row of their own. Verdicts:

- works: the number of its check is reached, and every option is what the hybrid has.
- refused: it is on the list, by an `FFEBMError` that says what to do instead.
- wrong: a number that is off, an option without effect, a refusal that is not on the list or says no way forward.
- raw: any other exception or warning.

Rows of DistributedDataParallel and FSDP2 run on two processes. Exit status 1 where a row is wrong or raw.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import covertable
import torch
import torch.distributed as dist
from covertable.shortcuts import Constraint

sys.path.insert(0, str(Path(__file__).parent))
from combination_axes import DEFAULTS, Row, axes, made
from combination_checks import ACTIONS, Wrong, check_settings
from combination_refusals import FORWARD, REFUSALS, Refusal, expected

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.files.whole_files import write_whole

__all__ = ["Outcome", "array", "pairs", "refused_rows", "run", "uncovered"]

DISTRIBUTED = ("DDP", "FSDP2")
Pair = tuple[tuple[str, str], tuple[str, str]]
"""((axis, label), (axis, label)), the axes in their order."""


# -- rows ----------------------------------------------------------------------------------------


def array(network: str, refusals: Sequence[Refusal] = REFUSALS) -> list[dict[str, str]]:
    """A covering array of strength 2 for a network, without rows that are refused. The same at every call."""
    builder = Constraint()
    constraints = [
        builder.fn(sorted(refusal.when), lambda row, refusal=refusal: not refusal.holds(row)) for refusal in refusals
    ]
    factors = {**axes(list(ACTIONS)), "network": [network]}
    order = list(factors)
    found = covertable.make(factors, strength=2, salt=network, constraints=constraints)
    return [{axis: row[axis] for axis in order} for row in found]


def refused_rows(network: str, refusals: Sequence[Refusal] = REFUSALS) -> list[dict[str, str]]:
    """A row for every combination of every refusal, with defaults elsewhere."""
    base = {**DEFAULTS, "done": next(iter(ACTIONS))}
    found: dict[str, dict[str, str]] = {}
    for refusal in refusals:
        here = {axis: labels for axis, labels in refusal.when.items() if axis != "network"}
        if network not in refusal.when.get("network", (network,)):
            continue
        for labels in itertools.product(*here.values()):
            fixed = {"network": network, **dict(zip(here, labels, strict=True))}
            row = _of_this_alone({**base, **fixed}, fixed, refusal, refusals)
            found[json.dumps(row)] = row
    return list(found.values())


def _of_this_alone(row: dict[str, str], fixed: Row, refusal: Refusal, refusals: Sequence[Refusal]) -> dict[str, str]:
    """The row with other values where another refusal would speak first, as far as those are free."""
    for other in refusals:
        free = [axis for axis in other.when if axis not in fixed]
        if other is not refusal and other.holds(row) and free:
            labels = axes(list(ACTIONS))[free[0]]
            row = {**row, free[0]: next(label for label in labels if label not in other.when[free[0]])}
    return row


def pairs(rows: Iterable[Row]) -> set[Pair]:
    """The pairs of values in some rows."""
    return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}


def uncovered(rows: Iterable[Row], network: str) -> set[Pair]:
    """The pairs of values of all axes that are in none of the rows."""
    factors = {**axes(list(ACTIONS)), "network": [network]}
    every = {
        ((one, a), (two, b))
        for one, two in itertools.combinations(factors, 2)
        for a in factors[one]
        for b in factors[two]
    }
    return every - pairs(rows)


def possible(fixed: Row, refusals: Sequence[Refusal] = REFUSALS) -> bool:
    """Whether some row with these values is not refused."""
    known = [
        refusal for refusal in refusals if all(fixed.get(a, labels[0]) in labels for a, labels in refusal.when.items())
    ]
    if not known:
        return True
    open_axes = [axis for axis in known[0].when if axis not in fixed]
    if not open_axes:
        return False
    axis, labels = open_axes[0], axes(list(ACTIONS))[open_axes[0]]
    return any(possible({**fixed, axis: label}, known) for label in labels)


# -- running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What came of a row."""

    row: dict[str, str]
    verdict: str
    text: str = ""
    seconds: float = 0.0


def _only_ours() -> None:
    """Every warning is an error, but for two of torch that say nothing of the hybrid."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)


def run(row: Row) -> Outcome:
    """Convert as the row says, do with the hybrid what it says, and judge."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    refusals = expected(row)
    with warnings.catch_warnings():
        _only_ours()
        try:
            case = made(row)
            check_settings(case)
            ACTIONS[row["done"]](case)
            verdict, text = (
                ("wrong", f"not refused, though {refusals[0].says!r} is expected") if refusals else ("works", "")
            )
        except FFEBMError as error:
            verdict, text = _judged(str(error), refusals)
        except Wrong as error:
            verdict, text = "wrong", str(error)
        except Exception as error:
            places = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-5:]]
            verdict, text = "raw", f"{type(error).__name__}: {error} ({', '.join(places)})"
    return Outcome(dict(row), verdict, text, round(time.perf_counter() - started, 2))


def _judged(text: str, refusals: Sequence[Refusal]) -> tuple[str, str]:
    if not FORWARD.search(text):
        return "wrong", f"refused without a way forward: {text}"
    if not any(refusal.matches(text) for refusal in refusals):
        return "wrong", f"a refusal that is not expected: {text}"
    return "refused", text


def run_all(rows: Sequence[Row], workers: int) -> Iterable[Outcome]:
    """The outcomes, in the order of the rows but for those that need two processes, which come last."""
    here = [row for row in rows if row["done"] not in DISTRIBUTED]
    there = [row for row in rows if row["done"] in DISTRIBUTED]
    for start in range(0, len(here), 50 * workers):  # new workers now and then: compiled graphs stay in torch's caches
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(run, here[start : start + 50 * workers])
    for start in range(0, len(there), 40):
        yield from _on_two_processes(there[start : start + 40])


def _on_two_processes(rows: Sequence[Row]) -> list[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        given, answered = Path(folder) / "rows.json", Path(folder) / "outcomes.json"
        write_whole(given, json.dumps(rows))
        command = [
            sys.executable,
            "-P",
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
        ]
        done = subprocess.run(
            [*command, "--rank-of", str(given), "--out", str(answered)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        found = json.loads(answered.read_text()) if answered.exists() else []
        lost = [asdict(Outcome(dict(row), "raw", f"no answer: {done.stderr[-1500:]}")) for row in rows[len(found) :]]
        return [Outcome(**outcome) for outcome in [*found, *lost]]


def _rank(given: Path, answered: Path) -> None:
    """One of the two processes: all rows, and the worse outcome of both."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    order = ("works", "refused", "wrong", "raw")
    found: list[dict[str, Any]] = []
    for row in json.loads(given.read_text()):
        mine = asdict(run(row))
        both: list[Any] = [None, None]
        dist.all_gather_object(both, mine)
        found.append(max(both, key=lambda outcome: order.index(outcome["verdict"])))
        if dist.get_rank() == 0:
            write_whole(answered, json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # torch 2.13 with gloo aborts at the interpreter's exit in one run of five


# -- the page ------------------------------------------------------------------------------------


def page(outcomes: Sequence[Outcome]) -> str:
    """docs/combinations.md."""
    factors = axes(list(ACTIONS))
    networks = list(dict.fromkeys(outcome.row["network"] for outcome in outcomes))
    sentences = {refusal: _sentence(refusal, outcomes) for refusal in REFUSALS}
    lines = [
        "# What combines with what",
        "",
        "Every pair of the values below is in a row of a covering array, one array for each of three small networks:",
        "an MLP with layer norm, a CNN with batch norm, average and maximum pooling, and a transformer layer. A row",
        "converts, does one thing with the hybrid, and checks its number: gradients against unrolled ones in float64,",
        "files bit for bit, onnxruntime, ngspice, two processes against one (`benchmarks/combination_checks.py`).",
        "Written by",
        f"`make combinations`, torch {torch.__version__.split('+')[0]}:",
        "",
        "| network | rows of the array | run | work | refused, as listed | fail | pairs of values that work |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_counts(network, outcomes) for network in networks),
        "",
        "All values combine with all others, except where this table says that they are refused:",
        "",
        "| axis | values that combine with everything | values that do not, and with what |",
        "| --- | --- | --- |",
    ]
    for axis, labels in factors.items():
        exceptions = {label: _partners(axis, label) for label in labels}
        free = [label for label in labels if not exceptions[label]]
        bound = [f"**{label}**: {'; '.join(found)}" for label, found in exceptions.items() if found]
        lines.append(f"| {axis} | {', '.join(free)} | {'<br>'.join(bound)} |")
    lines += [
        "",
        "## The refusals",
        "",
        "What each says, from one of its rows:",
        "",
        "| together | the sentence |",
        "| --- | --- |",
    ]
    for refusal, sentence in sentences.items():
        together = " + ".join(f"{axis}: {', '.join(labels)}" for axis, labels in refusal.when.items())
        lines.append(f"| {together} | {sentence} |")
    bad = [outcome for outcome in outcomes if outcome.verdict in ("wrong", "raw")]
    if bad:
        lines += ["", "## Failures", ""]
        lines += [f"- {_differing(o.row)}: {o.verdict}, {o.text.splitlines()[0][:300]}" for o in bad]
    return "\n".join(lines) + "\n"


def _counts(network: str, outcomes: Sequence[Outcome]) -> str:
    """The row of a network."""
    mine = [outcome for outcome in outcomes if outcome.row["network"] == network]
    verdicts = Counter(outcome.verdict for outcome in mine)
    working = pairs(outcome.row for outcome in mine if outcome.verdict == "works")
    possible_rows = len(array(network)) + len(refused_rows(network))
    failing = verdicts["wrong"] + verdicts["raw"]
    shown = (possible_rows, len(mine), verdicts["works"], verdicts["refused"], failing, len(working))
    return f"| {network} | {' | '.join(map(str, shown))} |"


def _partners(axis: str, label: str) -> list[str]:
    """With what a value is refused, from the list."""
    found = []
    for refusal in REFUSALS:
        if label in refusal.when.get(axis, ()):
            others = [f"{other} {' or '.join(labels)}" for other, labels in refusal.when.items() if other != axis]
            found.append(" and ".join(others))
    return found


def _sentence(refusal: Refusal, outcomes: Sequence[Outcome]) -> str:
    told = (o.text for o in outcomes if o.verdict == "refused" and refusal.holds(o.row) and refusal.matches(o.text))
    return next(told, "not run").replace("|", "\\|").replace("\n", " ")


def _differing(row: Row) -> str:
    """The values of a row that are not the defaults."""
    shown = [f"{axis}={label}" for axis, label in row.items() if label != DEFAULTS.get(axis)]
    return ", ".join([row["network"], *(each for each in shown if not each.startswith("network="))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=axes([])["network"])
    parser.add_argument("--every", type=int, default=1, help="run one row of so many")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--again", nargs="*", default=[], help="run rows of these verdicts in --out again, and no others"
    )
    parser.add_argument("--out", type=Path, default=Path("build/combinations.json"))
    parser.add_argument("--page", type=Path, help="also write the page")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank_of:
        _rank(options.rank_of, options.out)
    rows: list[Row] = []
    for network in options.networks:
        made_rows, refused = array(network), refused_rows(network)
        left = [pair for pair in uncovered(made_rows, network) if possible({"network": network, **dict(pair)})]
        if left:
            parser.error(f"{len(left)} pairs are in no row, such as {left[0]}")
        rows += [*made_rows, *refused][:: options.every]
    known: dict[str, Outcome] = {}
    if options.again:
        stored = [Outcome(**each) for each in json.loads(options.out.read_text(encoding="utf-8"))]
        known = {json.dumps(each.row): each for each in stored if each.verdict not in options.again}
    asked = [row for row in rows if json.dumps(row) not in known]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for number, outcome in enumerate(run_all(asked, options.workers), 1):
        known[json.dumps(outcome.row)] = outcome
        if outcome.verdict in ("wrong", "raw"):
            print(f"{outcome.verdict}: {_differing(outcome.row)}\n    {outcome.text[:600]}", flush=True)
        if number % 20 == 0 or number == len(asked):
            write_whole(options.out, json.dumps([asdict(each) for each in known.values()], indent=1))
            print(f"{number} of {len(asked)} rows", flush=True)
    outcomes = [known[json.dumps(row)] for row in rows]
    counts = Counter(outcome.verdict for outcome in outcomes)
    print(f"{len(outcomes)} rows, {len(pairs(rows))} pairs of values: {dict(counts)}")
    if options.page:
        write_whole(options.page, page(outcomes))
    return int(any(outcome.verdict in ("wrong", "raw") for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
