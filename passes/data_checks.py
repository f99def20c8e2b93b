"""Data checks: an `assert` or an `if ...: raise` on values of the data is left out of the graph, and told.

`assert (ids >= 0).all()` asks for a value that a traced forward has not. A forward that goes on answers it in one way:
so that nothing is raised. The source's own code says which way that is.

Promise: an answer is given only to a test that leads to `raise` otherwise; every such place is noted.
"""

from __future__ import annotations

import ast
import dis
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.passes.process import is_users

__all__ = ["DataChecks"]


@dataclass(frozen=True)
class Asked:
    """An expression of the model's code whose value is asked for."""

    place: tuple[int | None, ...]
    """First line, last line, first column, last column."""
    calls: bool
    """By a function that is called (`bool`, `all`), not by a branch."""


class DataChecks:
    """Answers the tests of a traced forward that only raise."""

    def __init__(self) -> None:
        self._trees: dict[str, ast.Module] = {}
        self._left_out: dict[str, None] = {}

    def call(self, func: Any) -> bool | None:
        """The answer to a call that asks whether a tensor is true; None where it is no such check."""
        if func not in (Tensor.__bool__, torch.is_nonzero):
            return None
        frame = _asking()
        if frame is None:
            return None
        asked = _asked(frame.f_code, frame.f_lasti)
        answer = next(self._answers(frame.f_code.co_filename, asked), None)
        if answer is not None:
            self._left_out[f"{frame.f_code.co_filename}, line {asked.place[0]}"] = None
        return answer

    def notes(self) -> Iterator[str]:
        """What the person should know: one sentence for each check that is left out."""
        for place in self._left_out:
            yield f"the forward raises an error for some values of its data ({place}): the hybrid does not check them"

    def _answers(self, file: str, asked: Asked) -> Iterator[bool]:
        for statement in ast.walk(self._tree(file)):
            if isinstance(statement, ast.Assert):
                wanted = True
            elif isinstance(statement, ast.If) and _raises(statement.body):
                wanted = False
            elif isinstance(statement, ast.If) and _raises(statement.orelse):
                wanted = True
            else:
                continue
            answer = _answer(statement.test, asked, wanted)
            if answer is not None:
                yield answer

    def _tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            try:
                self._trees[file] = ast.parse("".join(linecache.getlines(file)))
            except SyntaxError:
                self._trees[file] = ast.Module([], [])
        return self._trees[file]


def _asking() -> FrameType | None:
    """The frame of the model's code whose own instruction asks for the value, through torch's handlers alone."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame if frame is not None and is_users(frame.f_globals.get("__name__")) else None


def _asked(code: CodeType, offset: int) -> Asked:
    """What an instruction asks the value of: what the one before it computed, or what it calls itself."""
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.offset == offset:
            jumps = instruction.opname.startswith(("POP_JUMP", "JUMP_IF", "TO_BOOL"))
            found = before if jumps else instruction
            return Asked(tuple(found.positions or ()) if found is not None else (), calls=not jumps)
        if instruction.opname != "EXTENDED_ARG":
            before = instruction
    return Asked((), calls=True)


def _raises(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Raise)


def _answer(test: ast.expr, asked: Asked, wanted: bool) -> bool | None:
    """The answer to a part of a test for which the test, as far as it depends on it, is as wanted."""
    if isinstance(test, ast.BoolOp):
        return next((found for value in test.values if (found := _answer(value, asked, wanted)) is not None), None)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answer(test.operand, asked, not wanted)
    if (test.lineno, test.end_lineno, test.col_offset, test.end_col_offset) != asked.place:
        return None
    plain = isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in ("bool", "all", "any")
    return wanted if plain or not asked.calls else None
