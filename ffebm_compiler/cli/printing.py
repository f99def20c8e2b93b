"""What a command prints: text that fits the terminal, or JSON.

Colours and wrapped lines are for terminals alone. In a file or a pipe, and with NO_COLOR, the text is plain.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ffebm_compiler.reports.text import terminal_width

__all__ = ["Json", "say", "say_json"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

_COLUMNS = re.compile(r"\S {2,}\S|^ *─")
"""A line of a table."""
_STYLES = {"note": "yellow", "stayed digital": "yellow", "warning": "yellow", "missing": "yellow", "broken": "red"}
_LABEL = re.compile(r"^\s*([\w.]+(?: digital)?):(?= |$)")


def say(text: str) -> None:
    """Print text. On a terminal its labels have colours, and lines that are too long are wrapped at words."""
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        typer.echo(text)
        return
    for line in text.splitlines():
        for part in _wrapped(line, terminal_width()):
            console.print(Text(part) if console.no_color else _styled(part))


def say_json(value: Mapping[str, Any] | list[Any]) -> None:
    """Print JSON values, for scripts."""
    typer.echo(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """The value with null in the place of numbers that JSON does not have: infinite ones and NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width or _COLUMNS.search(line):
        return [line]
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _styled(line: str) -> Text:
    text = Text(line)
    found = _LABEL.match(line)
    if set(line) <= {" ", "─"}:
        text.stylize("dim")
    elif found:
        text.stylize(_STYLES.get(found[1], "bold"), found.start(1), found.end(1))
    return text
