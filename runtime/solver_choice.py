"""Which solver a block gets where none is given, and why."""

from __future__ import annotations

from dataclasses import dataclass

from ffebm_compiler.runtime.program import BlockProgram
from ffebm_compiler.runtime.solvers import GaussSeidel, Solver

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """A solver and the reason for it."""

    solver: Solver
    reason: str


def choose(program: BlockProgram, contraction: float | None, given: Solver | None) -> Choice:
    """The solver of a block: the one given, or the one that is fastest for its loop gain.

    Args:
        program: the block.
        contraction: κ where it is certified below one.
        given: what the user asked for.
    """
    if given is not None:
        return Choice(given, "as given")
    return Choice(GaussSeidel(), "default")
