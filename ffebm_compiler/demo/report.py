"""Show the demo's steps on a console, and its results as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ffebm_compiler.demo.settings import DemoSettings
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import parse_json
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.reports.text import table_text

__all__ = ["Row", "Steps", "results_text", "write_results"]

RESULTS = "results.json"
_MADE_BY = "ffebm demo"


@dataclass(frozen=True)
class Row:
    """A measured number and its target."""

    what: str
    value: float
    target: float
    at_least: bool
    unit: str = ""

    @classmethod
    def least(cls, what: str, value: float, target: float, unit: str = "") -> Row:
        """A number that must reach its target."""
        return cls(what, value, target, True, unit)

    @classmethod
    def most(cls, what: str, value: float, target: float, unit: str = "") -> Row:
        """A number that must not exceed its target."""
        return cls(what, value, target, False, unit)

    @property
    def met(self) -> bool:
        """Whether the target is met. NaN never meets one. Accuracies are compared with a slack for rounding."""
        slack = 1e-9 * abs(self.target)
        return self.value >= self.target - slack if self.at_least else self.value <= self.target + slack

    def text(self, number: float) -> str:
        """The number in this row's unit."""
        if self.unit:
            return f"{number:.2f} {self.unit}" if self.unit == "%" else f"{number:.0f} {self.unit}"
        return f"{number:.6f}" if self.at_least else f"{number:.1e}"


def results_text(rows: Sequence[Row]) -> str:
    """The final table."""
    cells = [
        (
            row.what,
            row.text(row.value),
            f"{'≥' if row.at_least else '≤'} {row.text(row.target)}",
            "met" if row.met else "missed",
        )
        for row in rows
    ]
    missed = sum(not row.met for row in rows)
    verdict = "all targets met" if not missed else f"{missed} of {len(rows)} targets missed"
    return f"{table_text('', ('what', 'measured', 'target', ''), cells)}\n{verdict}"


def write_results(
    out: Path, settings: DemoSettings, rows: Sequence[Row], more: Mapping[str, Any], finished: bool
) -> None:
    """Write `results.json`, which also marks the folder as the demo's own.

    Raises:
        InputError: where the folder holds files but no earlier demo, or cannot be written.
    """
    marker = out / RESULTS
    try:
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _is_ours(marker))):
            raise InputError(
                f"{out} holds files that are not of an earlier demo: name a folder that is new or empty with --out"
            )
        out.mkdir(parents=True, exist_ok=True)
        content = {
            "made_by": _MADE_BY,
            "finished": finished,
            "settings": {**asdict(settings), "out": str(settings.out)},
            "rows": [{**asdict(row), "met": row.met} for row in rows],
            **more,
        }
        write_whole(
            marker,
            json.dumps(content, indent=1) + "\n",
            failure="the results cannot be written",
            error=InputError,
        )
    except OSError as error:
        raise InputError(f"the demo cannot write to {out}: {error.strerror or error}") from error


def _is_ours(marker: Path) -> bool:
    try:
        content = parse_json(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("made_by") == _MADE_BY


class Steps:
    """The demo's report on a console. In a quiet run only `always` prints."""

    def __init__(self, console: Console, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet

    def title(self, text: str) -> None:
        """Print the title of a step."""
        if not self._quiet:
            self._console.print(f"\n{text}", style="bold", markup=False, highlight=False)

    def say(self, text: str) -> None:
        """Print a line about the step."""
        if not self._quiet:
            self.always(text)

    def always(self, text: str) -> None:
        """Print a line, in quiet runs too."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """A spinner while the context is open."""
        if self._quiet or not self._console.is_terminal:
            yield
            return
        with self._console.status(what):
            yield

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[str], None]]:
        """Show a progress bar. The yielded function is called once per step, with a remark."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[remark]}"),
        )
        with Progress(*columns, console=self._console, disable=self._quiet) as bar:
            task = bar.add_task(what, total=total, remark="")
            yield lambda remark: bar.update(task, advance=1, remark=remark)
