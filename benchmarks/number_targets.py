"""The numbers that were set before they were measured, by subject, and where each is read."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Read = Callable[[Any], float]


@dataclass(frozen=True)
class Target:
    """What a number must be."""

    sign: str
    """≤ or ≥."""
    limit: float
    form: str = ".4g"
    unit: str = ""

    def met(self, value: float) -> bool:
        """Whether a value is within it. NaN never is; round-off is forgiven."""
        slack = 1e-9 * abs(self.limit)
        return value <= self.limit + slack if self.sign == "≤" else value >= self.limit - slack

    def text(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:{self.form}}{self.unit}"

    def __str__(self) -> str:
        """As it stands in the table."""
        if self.sign == "≤" and not self.limit:
            return f"0{self.unit}"
        return f"{self.sign} {self.limit:g}{self.unit}"


@dataclass(frozen=True)
class Number:
    """One line of the page."""

    subject: str
    what: str
    target: Target
    command: str
    """A name in `number_commands.COMMANDS`."""
    read: Read
    """The value out of the results of the command."""
    missed: str = ""
    """Why it is missed, where it is."""


def most(limit: float, form: str = ".4g", unit: str = "") -> Target:
    """At most."""
    return Target("≤", limit, form, unit)


def least(limit: float, form: str = ".4g", unit: str = "") -> Target:
    """At least."""
    return Target("≥", limit, form, unit)


def numbers(subject: str, command: str, *rows: tuple[Any, ...]) -> list[Number]:
    """Numbers of one subject and one command: (what, target, how it is read), and why it is missed where it is."""
    return [Number(subject, row[0], row[1], command, *row[2:]) for row in rows]


COUNT = most(0, ".0f")
"""Of what must not be."""

FAILED = most(0, ".0f", " failed")
"""For results of tests."""


def tests(found: Any) -> float:
    """How many tests failed; one that ran none has failed."""
    return float(found["failed"] if found["passed"] else max(1, found["failed"]))


# Readers of the tables of `measuring.write`.


def table(title: str, row: str, key: str = "ratio") -> Read:
    """A figure of one row of the table whose title begins so."""

    def read(found: Any) -> float:
        rows = [each for table in found["tables"] if table["title"].startswith(title) for each in table["rows"]]
        return float(chosen(rows, name=row)[0][key])

    return read


# Readers of lists of rows.


def chosen(found: Any, **cells: Any) -> list[dict[str, Any]]:
    """The rows that have these cells."""
    rows = [row for row in found if all(str(row.get(key)) == str(value) for key, value in cells.items())]
    if not rows:
        raise LookupError(f"no row with {cells}")
    return rows


def cell(key: str, **cells: Any) -> Read:
    """A figure of the row with these cells."""
    return lambda found: float(chosen(found, **cells)[0][key])


def mean(key: str, **cells: Any) -> Read:
    """The mean over the rows with these cells."""
    return lambda found: statistics.mean(float(row[key]) for row in chosen(found, **cells))


def below(key: str, over: str, base: str, own: str, **cells: Any) -> Read:
    """How far the mean of the rows with `over` = `own` is below that of those with `over` = `base`."""
    return lambda found: mean(key, **cells, **{over: base})(found) - mean(key, **cells, **{over: own})(found)


def largest(key: str, sign: int = 1) -> Read:
    """The largest figure of all rows that have one; the smallest with sign −1."""
    return lambda found: sign * max(sign * float(row[key]) for row in found if row.get(key) is not None)


def demo(what: str) -> Read:
    """A row of the demo's table."""
    return lambda found: float(next(row["value"] for row in found["rows"] if row["what"].startswith(what)))


def tuned(found: Any) -> float:
    """Points that the demo's networks are below their source after fine-tuning, the worse of the two."""
    source = demo("source accuracy")(found)
    return source - min(demo("fine-tuned by EP, batch norm kept")(found), demo("fine-tuned by EP, batch norm f")(found))


def verdicts(*names: str) -> Read:
    """How many cases of `wild.py` have one of these verdicts."""
    return lambda found: float(sum(row["verdict"] in names for row in found.values()))


def cells_of(title: str, first: Sequence[Any], columns: slice) -> Read:
    """The smallest of some cells of a row of `MarkdownTables`, by its first cells."""

    def read(found: Any) -> float:
        rows = [row for row in found[title] if [str(c) for c in row[: len(first)]] == [str(c) for c in first]]
        if not rows:
            raise LookupError(f"no row of {title} begins with {', '.join(map(str, first))}")
        return min(float(c) for c in rows[0][columns])

    return read


def printed(row: Sequence[str], column: int) -> Callable[[str], float]:
    """A cell of a Markdown table that a script prints, by its row's first cells."""

    def read(found: str) -> float:
        lines = [[c.strip() for c in line.strip().strip("|").split("|")] for line in found.splitlines() if "|" in line]
        return float(next(line for line in lines if line[: len(row)] == list(row))[column])

    return read
