"""Driven states of a partition: let activations of digital values open a block if that costs no conversion.

The value that drives such a state needs the DACs that the state itself would need if it were digital. So most often
it costs nothing. It costs ADCs if an operation outside of the block reads the state too. The rule is in `rules`.
"""

from __future__ import annotations

from ffebm_compiler.passes.partition.state import DIGITAL, State

__all__ = ["driven_with", "make_driven", "make_driven_before"]

_FAN = 12
"""The largest number of readers of one value that are tried."""


def make_driven(state: State, v: int) -> None:
    """Make a digital activation a driven state of a block whose layers read it, if that costs no conversion."""
    if not state.digital_drive or state.home[v] != DIGITAL:
        return
    group = [v]
    for u in group:  # with the wiring between it and the layers
        group += [w for w in state.readers[u][:_FAN] if state.home[w] == DIGITAL and state.joins[w] and w not in group]
    for block in dict.fromkeys(state.home[w] for u in group for w in state.readers[u][:_FAN]):
        for chosen in ([v], group):
            if block == DIGITAL or state.home[v] != DIGITAL:
                break
            state.attempt([(w, block) for w in chosen], slack=0)


def make_driven_before(state: State, v: int) -> None:
    """Make the digital activations that a layer of a block reads driven states, if that costs no conversion."""
    stack = [v] if state.digital_drive and state.home[v] != DIGITAL else []
    for u in stack:
        for w in state.operands[u]:
            if state.home[w] == DIGITAL and state.joins[w] and w not in stack:
                if state.activation[w]:
                    make_driven(state, w)
                else:
                    stack.append(w)


def driven_with(state: State, v: int) -> list[int]:
    """The driven states that only this layer of their block reads, with the wiring between. They move with it."""
    home, found = state.home[v], {v: None}
    for u in state.operands[v] if state.digital_drive and home != DIGITAL else ():
        chain = [u]
        while not state.activation[u] and not state.layer[u] and len(state.operands[u]) == 1:
            u = state.operands[u][0]
            chain.append(u)
        here = all(state.home[w] == home for w in chain) and state.activation[u] and state.driven(u)
        if here and not any(state.home[w] == home and w not in (v, *chain) for x in chain for w in state.readers[x]):
            found.update(dict.fromkeys(chain))
    return list(found)[1:]
