"""Data checks: an `assert` or an `if ...: raise` on values of the data is left out of the graph, with a note.

`assert (ids >= 0).all()` asks for a value that does not exist while the forward is traced. The trace goes on with
the answer with which nothing is raised. The source's own code shows which answer that is.

Promise: an answer is given only to a test whose other answer leads to `raise`. Every such place is noted.
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
    """An expression of the model's code whose truth value the forward asks for."""

    place: tuple[int | None, ...]
    """First line, last line, first column, last column."""
    calls: bool
    """Whether a called function (`bool`, `all`) asks for it; otherwise a branch does."""


class DataChecks:
    """Answers the tests that only decide whether a traced forward raises."""

    def __init__(self) -> None:
        self._trees: dict[str, ast.Module] = {}
        self._left_out: dict[str, None] = {}

    def call(self, func: Any) -> bool | None:
        """The answer to a call that asks whether a tensor is true; None if that does not decide about a `raise`."""
        if func not in (Tensor.__bool__, torch.is_nonzero):
            return None
        frame = _frame_that_asks()
        if frame is None:
            return None
        asked = _expression_asked_for(frame.f_code, frame.f_lasti)
        answer = next(self._possible_answers(frame.f_code.co_filename, asked), None)
        if answer is not None:
            self._left_out[f"{frame.f_code.co_filename}, line {asked.place[0]}"] = None
        return answer

    def notes(self) -> Iterator[str]:
        """Notes for the plan: one sentence for each check that is left out."""
        for place in self._left_out:
            yield f"the forward raises an error for some values of its data ({place}): the hybrid does not check them"

    def _possible_answers(self, file: str, asked: Asked) -> Iterator[bool]:
        for statement in ast.walk(self._tree(file)):
            if isinstance(statement, ast.Assert):
                wanted = True
            elif isinstance(statement, ast.If) and _ends_in_raise(statement.body):
                wanted = False
            elif isinstance(statement, ast.If) and _ends_in_raise(statement.orelse):
                wanted = True
            else:
                continue
            answer = _answer_for(statement.test, asked, wanted)
            if answer is not None:
                yield answer

    def _tree(self, file: str) -> ast.Module:
        if file not in self._trees:
            try:
                self._trees[file] = ast.parse("".join(linecache.getlines(file)))
            except SyntaxError:
                self._trees[file] = ast.Module([], [])
        return self._trees[file]


def _frame_that_asks() -> FrameType | None:
    """The frame of the model's code that asks for the value itself; None if another function asks in between."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame if frame is not None and is_users(frame.f_globals.get("__name__")) else None


def _expression_asked_for(code: CodeType, offset: int) -> Asked:
    """The expression whose value an instruction asks for: its own call, or for a branch the instruction before."""
    before = None
    for instruction in dis.get_instructions(code):
        if instruction.offset == offset:
            jumps = instruction.opname.startswith(("POP_JUMP", "JUMP_IF", "TO_BOOL"))
            compares = instruction.argrepr.startswith("bool(")  # since Python 3.13, for the branch behind it
            found = before if jumps else instruction
            return Asked(tuple(found.positions or ()) if found is not None else (), calls=not (jumps or compares))
        if instruction.opname != "EXTENDED_ARG":
            before = instruction
    return Asked((), calls=True)


def _ends_in_raise(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Raise)


def _answer_for(test: ast.expr, asked: Asked, wanted: bool) -> bool | None:
    """The answer to the asked part of a test with which the whole test can be `wanted`; None if it has no such part."""
    if isinstance(test, ast.BoolOp):
        return next((found for value in test.values if (found := _answer_for(value, asked, wanted)) is not None), None)
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answer_for(test.operand, asked, not wanted)
    if (test.lineno, test.end_lineno, test.col_offset, test.end_col_offset) != asked.place:
        return None
    plain = isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in ("bool", "all", "any")
    return wanted if plain or not asked.calls else None
