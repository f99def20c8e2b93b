"""The public interface as text: every public name with its signature, the command line with its options.

    python tests/public_api.py        # writes tests/public_api.txt again, after a change that is meant

`tests/test_public_api.py` compares. A line that goes or changes is a change for users: docs/stability.md says what it
asks for. A line that is added wants an entry in docs/reference and in CHANGELOG.md.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer.main

import ffebm_compiler
import ffebm_compiler.init
import ffebm_compiler.onnx
from ffebm_compiler.cli.main import main

FILE = Path(__file__).with_suffix(".txt")
MODULES: tuple[ModuleType, ...] = (ffebm_compiler, ffebm_compiler.init, ffebm_compiler.onnx)
PUBLIC = {vars(module)[name] for module in MODULES for name in module.__all__ if inspect.isclass(vars(module)[name])}
OWN = ("ffebm_compiler", "passes", "runtime")


class Words:
    """Shown as these words."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __repr__(self) -> str:
        return self.words


def signature(thing: Any) -> str:
    """As one writes it. A default without a text of its own stands as three dots."""
    found = inspect.signature(thing)

    def plain(annotation: Any) -> Any:
        return Words(annotation) if isinstance(annotation, str) else annotation

    parameters = [
        each.replace(
            annotation=plain(each.annotation),
            default=Words("...") if re.search(r" at 0x|^<", repr(each.default)) and each.default is not each.empty
            else each.default,
        )
        for each in found.parameters.values()
    ]  # fmt: skip
    return str(found.replace(parameters=parameters, return_annotation=plain(found.return_annotation)))


def members(thing: type) -> Iterator[str]:
    """The public methods and properties that this project defines."""
    for name in sorted(dir(thing)):
        if name.startswith("_"):
            continue
        owner = next((base for base in thing.__mro__ if name in vars(base)), None)
        if owner is None or not owner.__module__.startswith(OWN) or (owner is not thing and owner in PUBLIC):
            continue  # torch's, or in the list of another class
        member = vars(owner)[name]
        if isinstance(member, property):
            yield f".{name}"
        elif isinstance(member, staticmethod | classmethod):
            yield f".{name}{signature(getattr(thing, name))}"
        elif inspect.isfunction(member):
            yield f".{name}{signature(member)}"


def lines_of(prefix: str, name: str, thing: Any) -> Iterator[str]:
    """A name and what it has."""
    if inspect.ismodule(thing):
        return
    if inspect.isclass(thing):
        bases = ", ".join(base.__name__ for base in thing.__bases__ if base is not object)
        head = f"class {prefix}.{name}({bases})" if bases else f"class {prefix}.{name}"
        yield head
        if not issubclass(thing, BaseException):
            yield f"{prefix}.{name}{signature(thing)}"
            yield from (f"{prefix}.{name}{member}" for member in members(thing))
        return
    yield f"{prefix}.{name}{signature(thing)}" if callable(thing) else f"{prefix}.{name}: {type(thing).__name__}"


def commands(command: Any, name: str) -> Iterator[str]:
    """A command, its arguments and options, and its subcommands."""
    arguments, options = [], []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            arguments.append(parameter.name.upper())
            continue
        names = "/".join((*parameter.opts, *parameter.secondary_opts))
        options.append(f"[{names}]" if parameter.is_flag else f"[{names} ...]")
    yield " ".join([name, *arguments, *sorted(options)])
    for inner, each in sorted(getattr(command, "commands", {}).items()):
        yield from commands(each, f"{name} {inner}")


def text() -> str:
    """The whole file."""
    found = [
        line
        for module in MODULES
        for name in sorted(module.__all__)
        for line in lines_of(module.__name__, name, getattr(module, name))
    ]
    return "\n".join([*found, *commands(typer.main.get_command(main), "ffebm"), ""])


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
