"""Measure every number that was set as a target, and write docs/numbers.md.

    make numbers                                   # all of them: hours
    python benchmarks/every_number.py --jobs 2          # two commands at a time, where none measures time or memory
    python benchmarks/every_number.py --quick           # the commands that take at most two minutes
    python benchmarks/every_number.py --only step 'experiment-*' Training
    python benchmarks/every_number.py --list              # the commands, their minutes, what is measured already

What was measured is in `build/numbers`, and a second call goes on where the first was stopped, the experiments in the
middle. A result counts as long as the package's files, the files of its command, the command itself, torch and the
processor are those that it was measured with; otherwise it is measured again. By the same rule the figures in
docs/numbers.json count, so that a run goes on in another checkout. `--keep` counts results of older sources and of
other processors too. The page says of each command when, at which commit and on which machine it was measured, and in
how many calls all of them were. A number without a result is "not measured". `--again` measures anew whatever counts.

Commands run with one thread, the shortest first. With `--jobs` so many run at a time; those that measure times or
memory, or keep two cores busy themselves, come after them, one by one. Times are worth something on a quiet machine
only: the page has the load average at the beginning of each command. The page is made from docs/numbers.json, which is
written beside it. However a call ends, no command goes on without it.
Exit status 1 where a command gave no result. A target that is missed is no failure.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import keep
from number_children import Children
from number_commands import COMMANDS, ROOT, Command
from number_hardware import NUMBERS as HARDWARE
from number_models import NUMBERS as MODELS
from number_page import page
from number_speed import NUMBERS as SPEED

from ffebm_compiler.files.whole_files import write_whole

NUMBERS = [*MODELS, *SPEED, *HARDWARE]
FOLDER = ROOT / "build" / "numbers"
PAGE = ROOT / "docs" / "numbers.md"
PACKAGE = ("ffebm_compiler", "passes", "runtime")
IMPORTS = re.compile(r"^\s*(?:from|import) ([a-z_0-9]+)", re.MULTILINE)
MOMENT = "%Y-%m-%d %H:%M UTC"
TOLD = ("minutes", "load", "commit", "date", "call", "machine", "fingerprint")
"""What docs/numbers.json tells of a run."""
QUICK = 2.0
"""Minutes of the commands that `--quick` runs."""


@functools.cache
def machine() -> dict[str, Any]:
    """What the figures depend on beside the sources."""
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        model = found[1] if found else model
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit that is checked out, and whether files other than the page differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    others = [f":!{path.relative_to(ROOT)}" for path in (PAGE, PAGE.with_suffix(".json"))]
    dirty = git("status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return f"{git('describe', '--always') or 'unknown'}{'-dirty' if dirty else ''}"


def package() -> str:
    """A digest of the package's files."""
    files = sorted(
        path for folder in PACKAGE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".js", ".css")
    )
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def closure(files: Sequence[Path]) -> list[Path]:
    """The files and what they import of benchmarks, examples and tests."""
    found, waiting = set(), list(files)
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        names = IMPORTS.findall(path.read_text(encoding="utf-8"))
        waiting += [ROOT / folder / f"{name}.py" for name in names for folder in ("benchmarks", "examples", "tests")]
    return sorted(found)


def fingerprint(command: Command) -> str:
    """What a result was measured with."""
    own = hashlib.sha256(b"".join(path.read_bytes() for path in closure(command.files()))).hexdigest()
    here = machine()
    return hashlib.sha256(repr((package(), own, command.line, here["processor"], here["torch"])).encode()).hexdigest()


def results(command: Command, folder: Path) -> Any:
    """What a command has measured: JSON, rows of a table as dictionaries, counts of tests, or what it printed."""
    path = command.result(folder)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".xml":
        suites = list(ElementTree.fromstring(text).iter("testsuite"))
        counts = {
            key: sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
        }
        failed = counts["failures"] + counts["errors"]
        seconds = sum(float(suite.get("time", 0)) for suite in suites)
        passed = counts["tests"] - failed - counts["skipped"]
        return {"failed": failed, "skipped": counts["skipped"], "passed": passed, "seconds": seconds}
    return text


def done(name: str) -> dict[str, Any]:
    """What is known of a command's last run in this checkout; nothing if there was none."""
    path = FOLDER / name / "done.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def told(name: str) -> dict[str, Any]:
    """What docs/numbers.json tells of a command's run; nothing if that lacks one of its numbers."""
    path = PAGE.with_suffix(".json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"commands": {}, "values": {}}
    state = dict(found["commands"].get(name, {}))
    values = {number.what: found["values"].get(number.what) for number in NUMBERS if number.command == name}
    return {} if "fingerprint" not in state or None in values.values() else {"state": state, "values": values}


def current(name: str, known: dict[str, Any], keep_older: bool) -> bool:
    """Whether what is known of a run counts in this one."""
    return bool(known) and (keep_older or known["fingerprint"] == fingerprint(COMMANDS[name]))


def counts(name: str, keep_older: bool) -> bool:
    """Whether a command has a result that counts in this run, of this checkout or from docs/numbers.json."""
    return current(name, done(name), keep_older) or current(name, told(name).get("state", {}), keep_older)


def crashed(code: int, log: str) -> str:
    """Why a command gave no result; "" if it did. Exit status 1 is also that of a missed target or a failed test."""
    last = next((line for line in reversed(log.splitlines()) if line.strip()), "")
    if code not in (0, 1):
        return f"exit status {code}: {last[:200]}"
    return last[:200] if code == 1 and re.match(r"[\w.]*(Error|Exception|Exit|Interrupt)\b", last) else ""


@dataclass
class Running:
    """A command that runs."""

    name: str
    process: subprocess.Popen[bytes]
    fingerprint: str
    state: dict[str, Any]
    """What is known of it at its beginning."""
    earlier: float
    """Minutes that it ran before it was stopped."""
    started: float = field(default_factory=time.monotonic)

    def minutes(self) -> float:
        """How long it has run, in all calls."""
        return self.earlier + (time.monotonic() - self.started) / 60

    def mark(self) -> None:
        """Write down what the next call needs to go on from here."""
        keep({"fingerprint": self.fingerprint, "minutes": self.minutes()}, FOLDER / self.name / "begun.json")


def start(name: str, children: Children, call: dict[str, Any]) -> Running:
    """Start a command, or go on with one that was stopped."""
    command, folder = COMMANDS[name], FOLDER / name
    mark, own = folder / "begun.json", fingerprint(command)
    begun = json.loads(mark.read_text(encoding="utf-8")) if mark.exists() else {}
    if begun.get("fingerprint") != own or done(name):
        shutil.rmtree(folder, ignore_errors=True)  # what is left there is of other sources, or whole already
        begun = {}
    folder.mkdir(parents=True, exist_ok=True)
    arguments, variables = command.arguments(folder)
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    state = {**call, "commit": commit(), "load": round(load, 1)}
    with (folder / "log.txt").open("w", encoding="utf-8") as output:
        process = children.start(
            arguments, cwd=ROOT, env={**os.environ, **one_thread, **variables}, stdout=output, stderr=subprocess.STDOUT
        )
    running = Running(name, process, own, state, begun.get("minutes", 0.0))
    running.mark()
    return running


def finish(running: Running, code: int) -> str:
    """Keep what a command has measured. Returns why it gave no result, or ""."""
    command, folder = COMMANDS[running.name], FOLDER / running.name
    why = crashed(code, (folder / "log.txt").read_text(encoding="utf-8", errors="replace"))
    if not why and not command.result(folder).exists():
        why = "it wrote no results"
    if not why and fingerprint(command) != running.fingerprint:
        why = "the sources changed while it ran"
    if not why:
        known = {**running.state, "fingerprint": running.fingerprint, "minutes": running.minutes()}
        keep({**known, "date": datetime.now(UTC).strftime(MOMENT)}, folder / "done.json")
    return why


def gather(keep_older: bool, failed: dict[str, str]) -> dict[str, Any]:
    """The contents of docs/numbers.json: the values that count, and what each command was."""
    commands, values = {}, {}
    for name, command in COMMANDS.items():
        missing = command.missing()
        state: dict[str, Any] = {"why": failed.get(name) or (f"needs {', '.join(missing)}" if missing else "")}
        found, known, earlier = None, done(name), told(name)
        if current(name, known, keep_older):
            found = results(command, FOLDER / name)
            state = {key: known[key] for key in TOLD}
        elif earlier and current(name, earlier["state"], keep_older):
            state = earlier["state"]
            values.update(earlier["values"])
        commands[name] = state
        for number in (number for number in NUMBERS if number.command == name):
            if found is not None:
                try:
                    values[number.what] = number.read(found)
                except Exception as error:  # one number that cannot be read does not take the others with it
                    values[number.what] = f"not in the results: {type(error).__name__}: {error}"
            if isinstance(found, dict) and {"failed", "skipped", "passed"} <= set(found):
                state["tests"] = found
    return {"commands": commands, "values": values}


def duration(minutes: float) -> str:
    """In hours and minutes."""
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes // 60:.0f} h {minutes % 60:.0f} min"


def selected(options: argparse.Namespace) -> list[str]:
    """The names of the commands that are asked for: by their own names, or by the subjects of their numbers."""
    subjects: dict[str, set[str]] = {name: {name} for name in COMMANDS}
    for number in NUMBERS:
        subjects[number.command].add(number.subject)
    return [
        name
        for name, command in COMMANDS.items()
        if any(fnmatch.fnmatch(word, pattern) for word in subjects[name] for pattern in options.only)
        and (not options.quick or command.minutes <= QUICK)
    ]


def run(names: Sequence[str], options: argparse.Namespace, failed: dict[str, str]) -> None:
    """Run what has no result yet, and write into `failed` each command that gave none, and why."""
    waiting = [n for n in names if not COMMANDS[n].missing() and (options.again or not counts(n, options.keep))]
    # The shortest first: a run that is stopped has as many numbers as it could.
    waiting.sort(key=lambda name: (options.jobs > 1 and COMMANDS[name].alone, COMMANDS[name].minutes))
    of, left = len(waiting), sum(COMMANDS[name].minutes for name in waiting)
    call = {"call": datetime.now(UTC).strftime(MOMENT), "machine": machine()}
    running: list[Running] = []
    with Children() as children:
        try:
            while waiting or running:
                while waiting and room(waiting[0], running, options.jobs):
                    name = waiting.pop(0)
                    print(f"[{of - len(waiting)}/{of}] {name}: {COMMANDS[name].line}", flush=True)
                    left -= COMMANDS[name].minutes
                    about = f"about {duration(COMMANDS[name].minutes)}, and {duration(left)} of commands after it"
                    print(f"    {about}; {FOLDER / name}/log.txt", flush=True)
                    running.append(start(name, children, call))
                time.sleep(0.1)
                for each in list(running):
                    code = children.ended(each.process)
                    if code is not None:
                        running.remove(each)
                        why = finish(each, code)
                        end = f"no result: {why}" if why else duration(done(each.name)["minutes"])
                        print(f"    {each.name}: {end}", flush=True)
                        if why:
                            failed[each.name] = why
        finally:
            for each in running:
                each.mark()


def room(name: str, running: Sequence[Running], jobs: int) -> bool:
    """Whether a command can start beside those that run."""
    alone = COMMANDS[name].alone or any(COMMANDS[each.name].alone for each in running)
    return not running or (len(running) < jobs and not alone)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="glob patterns of commands or subjects")
    parser.add_argument("--quick", action="store_true", help=f"only commands that take at most {QUICK:g} minutes")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--keep", action="store_true", help="count results of older sources and other processors too")
    parser.add_argument("--jobs", type=int, default=1, help="commands that run at a time where none measures time")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page of what is measured")
    options = parser.parse_args(arguments)
    names = selected(options)
    if not names:
        parser.error(f"no command or subject matches {' '.join(options.only)}; --list prints them")
    if options.jobs < 1:
        parser.error("--jobs is the number of commands that run at a time: 1 or more")
    if options.list:
        for name in names:
            state = "measured" if counts(name, options.keep) else ", ".join(COMMANDS[name].missing()) or "-"
            alone = "alone" if COMMANDS[name].alone else ""
            print(f"{name:20} {COMMANDS[name].minutes:4g} min  {alone:5}  {state:10}  {COMMANDS[name].line}")
        print(f"{duration(sum(COMMANDS[name].minutes for name in names))} in all")
        return 0
    failed: dict[str, str] = {}
    try:
        if not options.page:
            run(names, options, failed)
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        found = gather(options.keep, failed)
        keep(found, PAGE.with_suffix(".json"))
        write_whole(PAGE, page(found, NUMBERS, COMMANDS))
        print(f"{PAGE.relative_to(ROOT)}: {len(found['values'])} of {len(NUMBERS)} numbers are measured")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
