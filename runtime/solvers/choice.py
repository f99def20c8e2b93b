"""Choose the solver of a block if none is given, and say why."""

from __future__ import annotations

from dataclasses import dataclass

from ffebm_compiler.runtime.program.block_program import BlockProgram
from ffebm_compiler.runtime.solvers.anderson import Anderson
from ffebm_compiler.runtime.solvers.base import GaussSeidel, Solver
from ffebm_compiler.runtime.solvers.measured import Measured
from ffebm_compiler.runtime.solvers.newton import NewtonCG

__all__ = ["Choice", "choose"]


@dataclass(frozen=True)
class Choice:
    """A solver, and the reason for it."""

    solver: Solver
    reason: str
    """A phrase for the summary."""

    def __str__(self) -> str:
        """Name and reason."""
        return f"{type(self.solver).__name__}: {self.reason}"


_SLOW = 0.98
"""From this contraction on acceleration is faster than the sweeps it saves (`benchmarks/solvers.py`)."""


def choose(program: BlockProgram, contraction: float | None, given: Solver | None, coherent: bool = False) -> Choice:
    """The solver of a block: the one given, or the one that is fastest at its loop gain.

    This follows the measurements of `benchmarks/solvers.py`. Blocks that are certified to contract get plain sweeps,
    which contract far better than certified. Anderson acceleration is for blocks without a certificate
    (`feedback="symmetric"`), and for slow ones whose errors have one sign, which contract no better than certified.

    Args:
        program: the block.
        contraction: κ if it is certified below one, else None.
        given: the solver that the user asked for.
        coherent: whether the errors of all units may have one sign, as where all weights are conductances.
    """
    if given is not None:
        if isinstance(given, Measured):
            return Choice(given, f"by {given.fabric_name}, outside")
        curved = [layer.activation.name for layer in program.layers if not layer.activation.monotone]
        if isinstance(given, NewtonCG) and not program.symmetric:
            return Choice(given, "as given; sweeps only, the feedback has weights of its own")
        if isinstance(given, NewtonCG) and curved:
            return Choice(given, f"as given; sweeps only, {curved[0]} is not monotone")
        return Choice(given, "as given")
    if not program.coupled:
        return Choice(GaussSeidel(), "no feedback: computed at once")
    if program.selects:
        return Choice(
            GaussSeidel(), "max pooling has several equilibria, and sweeps reach the one nearest to the start"
        )
    if contraction is None:
        return Choice(Anderson(), "how fast sweeps contract is not certified")
    if coherent and contraction > _SLOW:
        return Choice(Anderson(), f"a sweep leaves up to {contraction:.4g} of an error")
    return Choice(GaussSeidel(), f"a sweep is certified to leave {contraction:.2g} of the error")
