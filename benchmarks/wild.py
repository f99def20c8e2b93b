"""Is a hybrid its source? Over public architectures, in eval and in train mode.

    python benchmarks/wild.py [--only PATTERN ...] [--again VERDICT ...] [--out FILE] [--table FILE]

Each case is converted with one layer a block, where a hybrid computes what its source computes, and both run in eval,
train, train and eval mode: the same inputs, the same seed before each forward, each with a backward. Verdicts:

- right: values within 1e-4, gradients within 5e-3 (parameters and inputs), the same random draws, the same state dict
  afterwards, and the user's own model as it was before.
- refused: an `FFEBMError`, with its text.
- raw: any other exception, a crash or a time limit. A defect.
- wrong: something deviates and nothing was said. A defect.
- unusable: the source itself fails or is not a function of its inputs and the seed. Says nothing about the compiler.

Every case runs in a process of its own with a time limit, `--workers` of them at a time. The results are written after
each case, and a second call goes on where the first stopped. Exit status 1 where a case is raw or wrong.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import wild_models
from wild_compare import compare

from ffebm_compiler.files.whole_files import write_whole

VERDICTS = ("right", "refused", "raw", "wrong", "unusable")


def _work(name: str, pipe: Connection) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party model code
        pipe.send(compare(wild_models.CASES[name]))


class Running:
    """A case in a process of its own, forked so that the imports are paid for once."""

    def __init__(self, name: str, limit: float) -> None:
        context = multiprocessing.get_context("fork")
        self.name, self.limit = name, limit
        self.pipe, sender = context.Pipe(duplex=False)
        self._worker = context.Process(target=_work, args=(name, sender), daemon=True)
        self._started = time.perf_counter()
        self._worker.start()
        sender.close()

    def left(self) -> float:
        """Seconds until its time limit."""
        return max(0.0, self._started + self.limit - time.perf_counter())

    def row(self) -> dict[str, Any]:
        """What came of it: its process has sent something, has ended, or ends here."""
        row = {"verdict": "raw", "stage": "time limit", "text": f"no result after {self.limit:.0f} s"}
        try:
            if self.pipe.poll():
                row = self.pipe.recv()
        except EOFError:
            self._worker.join()
            status = self._worker.exitcode
            row = {"verdict": "raw", "stage": "crash", "text": f"the process ended with exit status {status}"}
        self._worker.kill()
        self._worker.join()
        self.pipe.close()
        return {**row, "seconds": round(time.perf_counter() - self._started, 1)}


def measured(names: Sequence[str], limit: float, workers: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each case and what came of it, so many at a time, as they end."""
    waiting, running = list(names), list[Running]()
    while waiting or running:
        while waiting and len(running) < workers:
            wild_models.load(waiting[0])
            running.append(Running(waiting.pop(0), limit))
        ready = wait([case.pipe for case in running], min(case.left() for case in running))
        for case in list(running):
            if case.pipe in ready or not case.left():
                running.remove(case)
                yield case.name, case.row()


def _short(text: str) -> str:
    """The beginning of a text, without the folder of the packages."""
    return re.sub(r"/[^ ()']*/site-packages/", "", text.splitlines()[0])[:300]


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """How many cases of each family had which verdict, and every case that is not right."""
    counts: dict[str, collections.Counter[str]] = {}
    for name, row in rows.items():
        counts.setdefault(name.split(":")[0], collections.Counter())[row["verdict"]] += 1
    lines = [f"| family | cases | {' | '.join(VERDICTS)} |", f"| --- |{' ---: |' * (1 + len(VERDICTS))}"]
    total: collections.Counter[str] = collections.Counter()
    for family, found in counts.items():
        total += found
        lines.append(f"| {family} | {found.total()} | {' | '.join(str(found[v]) for v in VERDICTS)} |")
    lines.append(f"| all | {total.total()} | {' | '.join(str(total[v]) for v in VERDICTS)} |")
    for verdict in VERDICTS[1:]:
        told = [f"- {name}: {_short(row['text'])}" for name, row in rows.items() if row["verdict"] == verdict]
        lines += ["", f"{verdict.capitalize()}:", "", *told] if told else []
    return "\n".join(lines) + "\n"


def markdown(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The page docs/wild.md."""
    lines = [
        "# Hybrids of public architectures: are they their sources?",
        "",
        "Written by `python benchmarks/wild.py --table docs/wild.md`, whose packages `make families` and `make wild`",
        f"install ({len(rows)} of {len(wild_models.CASES)} cases run, torch {torch.__version__.split('+')[0]}).",
        "Every case is converted with one layer a block; it is *right* where values are within 1e-4, gradients within",
        "5e-3, random draws and written state are the source's, in eval and in train mode, and the user's model is as",
        "it was. The other verdicts are",
        "explained in `benchmarks/wild.py`.",
        "",
        table(rows),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["*"], help="glob patterns of case names, such as 'timm:*'")
    parser.add_argument("--again", nargs="*", default=[], choices=VERDICTS, help="also rerun cases of these verdicts")
    parser.add_argument("--limit", type=float, default=300, help="seconds that a case may take")
    parser.add_argument("--workers", type=int, default=1, help="cases that run at a time")
    parser.add_argument("--out", type=Path, default=Path("build/wild.json"))
    parser.add_argument("--table", type=Path, help="also write the table as Markdown")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args(arguments)
    names = [n for n in wild_models.CASES if any(fnmatch.fnmatch(n, pattern) for pattern in options.only)]
    if options.list:
        print("\n".join(names))
        return 0
    if not names:
        parser.error(f"no case matches {options.only}; --list prints the names")
    torch.set_num_threads(1)
    rows = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    asked = [name for name in names if name not in rows or rows[name]["verdict"] in options.again]
    for name, row in measured(asked, options.limit, options.workers):
        rows[name] = row
        print(f"{row['seconds']:6.1f} s  {row['verdict']:8}  {name}  {row['text'][:200]}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.out, json.dumps(rows, indent=1) + "\n")
    found = {name: rows[name] for name in names}
    print(table(found))
    if options.table:
        write_whole(options.table, markdown({name: rows[name] for name in wild_models.CASES if name in rows}))
    return int(any(row["verdict"] in ("raw", "wrong") for row in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())
