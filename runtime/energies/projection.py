"""A projection of the weights that keeps a block inside its certificate.

The loop gain κ = ρ(A)² of a block grows with each of its edge norms ‖J_{ml}‖. They are all capped at one
value τ, so that smaller ones stay as they are. Bisection finds the τ for which κ is the given limit.
This is the spectral-norm clipping of Yoshida & Miyato (2017, arXiv 1705.10941) with the bound that the block needs.
"""

from __future__ import annotations

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.certificate import Certificate
from ffebm_compiler.runtime.energies.loop_gain import radius
from ffebm_compiler.runtime.program.block_program import BlockProgram

__all__ = ["projection"]


def projection(program: BlockProgram, certificate: Certificate, limit: float) -> dict[int, float]:
    """Weight index -> factor in (0, 1) after which the loop gain of a block is at most `limit`.

    A weight on several edges (a tied one) gets the smallest of their factors.

    Raises:
        InputError: the edges without a weight, such as a residual add, exceed the limit by themselves.
    """
    behind = {
        (k, m): _weights_between(program if k < m else program.back, min(k, m), max(k, m))
        for k, m, _ in certificate.norms
    }

    def gain(cap: float) -> float:
        norms = [(k, m, min(norm, cap) if behind[k, m] else norm) for k, m, norm in certificate.norms]
        return radius(program, norms, certificate.scales) ** 2

    low, high = 0.0, max(norm for _, _, norm in certificate.norms)
    if gain(low) > limit:
        k, m, norm = max((edge for edge in certificate.norms if not behind[edge[:2]]), key=lambda edge: edge[2])
        raise InputError(
            f"{program.name}: {program.layers[k].name} feeds {program.layers[m].name} with norm {norm:.3g} and without "
            f"a weight that could be scaled, so that its loop gain cannot be brought to {limit:g}. Give `feedback` as "
            "a number, or keep the two in different blocks with plan.move()"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if gain(middle) > limit else (middle, high)
    factors: dict[int, float] = {}
    for k, m, norm in certificate.norms:
        for index in behind[k, m] if norm > low else ():
            factors[index] = min(factors.get(index, 1.0), low / norm)
    return factors


def _weights_between(program: BlockProgram, earlier: int, later: int) -> set[int]:
    """The multiplying weights on the paths from one state to the drive of another."""
    layer = program.layers[later]
    reached = {program.layers[earlier].state}
    found: set[int] = set()
    unweighted = layer.drive in reached
    plain = set(reached)
    for instruction in layer.instructions:
        if not reached.intersection(instruction.operands):
            continue
        reached.add(instruction.output)
        if instruction.operator.product and instruction.weights[0] is not None:
            found.add(instruction.weights[0])
        elif plain.intersection(instruction.operands):
            plain.add(instruction.output)
    unweighted = unweighted or layer.drive in plain
    return set() if unweighted else found
