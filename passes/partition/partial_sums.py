"""Partial sums: what digital row sums convert, with `Hardware(row_sums="digital")`.

A layer whose rows lie on K > 1 tiles has K partial sums for each value of its product, and each is converted: the sum
is a digital number. A digital value needs no ADC where it leaves its block, and a DAC where an array or an analog sum
of the block reads it. In a block of several layers this happens in every sweep:

    forward    K ADCs for each value of a product with K > 1, 1 DAC for each digital value that is read in the block
    feedback   1 DAC for each digital state that drives a layer backward, the one above if it is also read;
               with K' column tiles of the layer that is read backward: K' ADCs for each value of the state that it
               goes back to if K' > 1, and 1 DAC if that state is not digital; 1 ADC if K' = 1 and it is digital
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Operation, OperationGraph, Role

__all__ = ["PartialSums", "partial_sums"]


@dataclass(frozen=True)
class PartialSums:
    """Conversions per sample beside those at the boundary of one block. All are 0 with analog row sums."""

    once: int = 0
    """ADCs of the products that only the block's inputs drive, once in a phase."""
    forward_adc: int = 0
    """ADCs of the other products, in every sweep."""
    forward_dac: int = 0
    """DACs of digital values that the block reads again, in every sweep."""
    feedback_adc: int = 0
    feedback_dac: int = 0
    spared_adc: int = 0
    """Outputs that are digital already, and so need no ADC at the boundary."""
    spared_dac: int = 0
    """Inputs that are only added to digital values, and so need no DAC."""
    inputs: int = 0
    """ADCs that the errors at the inputs take beside one each, where columns lie on several tiles."""

    @property
    def one_pass(self) -> int:
        """Conversions that one forward pass has beside the plan's DACs and ADCs; negative if outputs save more."""
        return self.once + self.forward_adc + self.forward_dac - self.spared_adc - self.spared_dac


def partial_sums(
    graph: OperationGraph, hardware: Hardware, users: Mapping[str, Sequence[str]], members: Sequence[str]
) -> PartialSums:
    """The conversions that digital row sums add to a block.

    Args:
        graph: the operations.
        hardware: the fabric.
        users: the readers of each operation.
        members: operations of the block, in topological order.
    """
    if hardware.row_sums != "digital":
        return PartialSums()
    inside = set(members)
    layers = [graph[name] for name in members if graph[name].role is Role.WEIGHT]
    rows = {op.name: _row_tiles(op, hardware) for op in layers}
    cols = {op.name: hardware.for_layer(op.path).col_tiles(op.cols) for op in layers}
    digital: set[str] = set()
    for name in members:
        sources = [source for source in graph[name].inputs if source in inside]
        # What has no operand in the block is driven through DACs.
        if rows[name] > 1 if name in rows else sources and all(source in digital for source in sources):
            digital.add(name)
    inner = [op for op in layers if any(source in inside for source in op.inputs)]
    converted = {op.name: rows[op.name] * op.cols * op.groups * op.positions for op in layers if rows[op.name] > 1}
    driving = {_state_of(op.name, inside, rows, users) for op in inner}
    again = [
        graph[name]
        for name in members
        if name in digital
        and (name in driving or any(user in inside and (user in rows or user not in digital) for user in users[name]))
    ]
    outputs = set(graph.outputs)
    leaving = [
        name for name in members if name in digital and (name in outputs or any(u not in inside for u in users[name]))
    ]
    entering = {source for name in members for source in graph[name].inputs if source not in inside}
    spared = [
        source
        for source in entering
        if all(user in digital and user not in rows for user in users[source] if user in inside)
    ]
    back_adc = back_dac = 0
    for op in inner:
        for source in op.inputs:
            if source not in inside:
                continue
            if cols[op.name] > 1:
                back_adc += cols[op.name] * graph.values(source)
                back_dac += 0 if source in digital else graph.values(source)
            elif source in digital:
                back_adc += graph.values(source)
    outer = [op for op in layers if op not in inner]
    return PartialSums(
        once=sum(converted.get(op.name, 0) for op in outer),
        forward_adc=sum(converted.get(op.name, 0) for op in inner),
        forward_dac=sum(op.values for op in again),
        feedback_adc=back_adc,
        feedback_dac=back_dac,
        spared_adc=sum(graph.values(name) for name in leaving),
        spared_dac=sum(graph.values(source) for source in spared),
        inputs=sum((cols[op.name] - 1) * graph.values(source) for op in outer for source in op.inputs),
    )


def _state_of(name: str, inside: Collection[str], layers: Collection[str], users: Mapping[str, Sequence[str]]) -> str:
    """The operation whose value drives a layer backward: the last one before other layers read it."""
    while readers := [user for user in users[name] if user in inside and user not in layers]:
        name = readers[0]
    return name


def _row_tiles(operation: Operation, hardware: Hardware) -> int:
    fabric = hardware.for_layer(operation.path)
    return fabric.row_tiles(operation.rows, operation.bias and fabric.bias_row)
