"""The page docs/numbers.md, from what `every_number.py` has measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from number_commands import Command
from number_targets import FAILED, Number

NOT_MEASURED = "not measured"


def verdict(number: Number, value: Any) -> str:
    """met, missed, or nothing where there is no value."""
    if not isinstance(value, int | float):
        return ""
    return "met" if number.target.met(value) else "**missed**"


def measured(number: Number, found: Mapping[str, Any]) -> str:
    """The value as it stands in the table."""
    value = found["values"].get(number.what)
    if value is None:
        return NOT_MEASURED
    if isinstance(value, str):
        return value.replace("|", "\\|")
    state = found["commands"][number.command].get("tests")
    if state is not None and number.target is FAILED:
        skipped = f", {state['skipped']} skipped" if state["skipped"] else ""
        return f"{state['passed']} tests passed, {state['failed']} failed{skipped}"
    return number.target.text(value)


def table(numbers: Sequence[Number], found: Mapping[str, Any]) -> list[str]:
    """The lines of one subject."""
    lines = ["| what | target | measured | | command |", "| --- | --- | --- | --- | --- |"]
    for number in numbers:
        value = found["values"].get(number.what)
        cells = [number.what, str(number.target), measured(number, found), verdict(number, value)]
        lines.append(f"| {' | '.join(cells)} | [{number.command}](#commands) |")
    return lines


def reasons(numbers: Sequence[Number], found: Mapping[str, Any]) -> list[str]:
    """What is missed and why; numbers with one reason share a line."""
    missed: dict[str, list[str]] = {}
    for number in numbers:
        value = found["values"].get(number.what)
        if isinstance(value, int | float) and not number.target.met(value):
            missed.setdefault(number.missed or "Not analysed yet.", []).append(
                f"{number.what} ({measured(number, found)})"
            )
    return [f"- {'; '.join(whats)}. {reason}" for reason, whats in missed.items()] or ["None."]


def described(machine: Mapping[str, str]) -> str:
    """A machine in words."""
    return "{processor}; {system}, Python {python}, torch {torch}".format(**machine)


def commands(known: Mapping[str, Command], found: Mapping[str, Any]) -> list[str]:
    """What ran, how long, when, at which commit, on which machine if there were several, and how busy that was."""
    machines = list(dict.fromkeys(described(state["machine"]) for state in states(known, found)))
    several = len(machines) > 1
    columns = ["name", "command", "minutes", "finished", "commit", *["machine"] * several, "load"]
    right = ("minutes", "machine", "load")
    lines = [
        f"| {' | '.join(columns)} |",
        f"| {' | '.join('---:' if column in right else '---' for column in columns)} |",
    ]
    for name, command in known.items():
        state = found["commands"].get(name, {})
        cells = [state.get("why") or NOT_MEASURED, *[""] * (3 + several)]
        if "date" in state:
            on = [str(1 + machines.index(described(state["machine"])))] * several
            cells = [f"{state['minutes']:.1f}", state["date"], state["commit"], *on, f"{state['load']:.1f}"]
        line = command.line.replace("|", "\\|")
        lines.append(f"| {name} | `{line}` | {' | '.join(cells)} |")
    return lines


def states(known: Mapping[str, Command], found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is known of the commands that were measured."""
    return [found["commands"][name] for name in known if "date" in found["commands"].get(name, {})]


def origin(known: Mapping[str, Command], found: Mapping[str, Any]) -> list[str]:
    """When, at which commits and on which machines the commands were measured."""
    ran = states(known, found)
    if not ran:
        return ["No command was measured."]

    def each(values: Iterable[str]) -> str:
        counted = Counter(values)
        return " and ".join(counted if len(counted) == 1 else (f"{key} ({n} commands)" for key, n in counted.items()))

    calls = len({state["call"] for state in ran})
    commits = Counter(state["commit"] for state in ran)
    machines = Counter(described(state["machine"]) for state in ran)
    on = [f"On {machine}." for machine in machines]
    if len(machines) > 1:
        on = [f"Machine {k} ({n} commands): {machine}." for k, (machine, n) in enumerate(machines.items(), 1)]
    when = f"from {min(state['call'] for state in ran)} to {max(state['date'] for state in ran)}"
    lines = [
        f"{len(ran)} of {len(known)} commands were measured, in {'one call' if calls == 1 else f'{calls} calls'}, "
        f"{when}, at commit {each(commits.elements())}.",
        *on,
    ]
    if len(commits) > 1:
        lines.append("No one commit gave all of these numbers: the table of [commands](#commands) has that of each.")
    if any(name.endswith("-dirty") for name in commits):
        lines.append("`-dirty` marks sources with changes that are not in the commit.")
    return lines


def page(found: Mapping[str, Any], numbers: Sequence[Number], known: Mapping[str, Command]) -> str:
    """The whole page."""
    values = [(number, found["values"].get(number.what)) for number in numbers]
    judged = [number.target.met(value) for number, value in values if isinstance(value, int | float)]
    lines = [
        "# Numbers",
        "",
        "Every number that was set as a target. `make numbers` writes this page and docs/numbers.json, from which it",
        "is made. Nobody edits them. A number whose command has no result is *not measured*: its last figure is on the",
        "page of its subject.",
        "",
        *origin(known, found),
        "",
        "Times are CPU seconds of one thread unless it says otherwise. `load` is the machine's load average when a",
        "command began, in which the command before it still counts: above one, ratios of times can still be compared,",
        "and times cannot.",
        "",
        f"{len(numbers)} numbers: {sum(judged)} met, {len(judged) - sum(judged)} missed, "
        f"{len(numbers) - len(judged)} not measured.",
        "",
    ]
    for subject in dict.fromkeys(number.subject for number in numbers):
        lines += [f"## {subject}", "", *table([n for n in numbers if n.subject == subject], found), ""]
    lines += ["## Missed, and why", "", *reasons(numbers, found), ""]
    return "\n".join([*lines, "## Commands", "", *commands(known, found), ""])
