"""Activations under a load as ONNX nodes: the exact solve of `runtime.energies.loaded.Loaded`."""

from __future__ import annotations

from itertools import pairwise

from ffebm_compiler.errors import ExportError
from ffebm_compiler.onnx.activation_nodes import activation_nodes
from ffebm_compiler.onnx.emit import Writer
from ffebm_compiler.runtime.activations.table import Activation

__all__ = ["LoadedActivation"]


class LoadedActivation:
    """The s that solves ∂G(s) + (D − 1) s ∋ h. Nodes that depend only on D are written once, outside of loops.

    Args:
        outside: the writer outside of loops.
        activation: σ, made of straight lines or a projection to a cone.
        diagonal: name of D.

    Raises:
        ExportError: the activation is not made of straight lines.
    """

    def __init__(self, outside: Writer, activation: Activation, diagonal: str) -> None:
        self.activation = activation
        if activation.cone:
            self.whole = outside.op("Reciprocal", diagonal)
            return
        lines = activation.lines
        if lines is None:
            raise ExportError(
                f"activation {activation!r} under a load has no ONNX form: convert again with its layer in "
                "force_digital"
            )
        self.lines = lines
        values = [lines.start]
        for slope, (before, after) in zip(lines.slopes[1:-1], pairwise(lines.knots), strict=True):
            values.append(values[-1] + slope * (after - before))
        self.values = values if lines.knots else []
        self.knots = [
            _added(outside, outside.scaled(diagonal, value), knot - value) if value else outside.number(knot)
            for knot, value in zip(lines.knots, self.values, strict=True)
        ]
        self.slopes = [
            outside.op("Div", outside.number(slope), _added(outside, outside.scaled(diagonal, slope), 1 - slope))
            if slope
            else ""
            for slope in lines.slopes
        ]

    def value(self, writer: Writer, h: str) -> str:
        """Write s and return its name."""
        if self.activation.cone:
            return writer.op("Mul", activation_nodes(writer, self.activation, h), self.whole)
        steep = [index for index, slope in enumerate(self.lines.slopes) if slope]
        return self._clamped(writer, h, steep[0]) if len(steep) == 1 else self._summed(writer, h, steep)

    def _clamped(self, writer: Writer, h: str, index: int) -> str:
        """s if one line is not flat: it is clamped to the values at the line's ends, which makes those exact."""
        anchor = self.lines.knots[max(index - 1, 0)] if self.knots else 0.0
        offset = self.lines.start / self.lines.slopes[index] - anchor
        line = writer.op("Mul", writer.op("Add", h, writer.number(offset)) if offset else h, self.slopes[index])
        low = writer.number(self.values[index - 1]) if index else ""
        high = [writer.number(self.values[index])] if index < len(self.values) else []
        return writer.op("Clip", line, low, *high) if low or high else line

    def _summed(self, writer: Writer, h: str, steep: list[int]) -> str:
        """s if several lines are not flat: the first value, plus the rise along each of these lines."""
        terms = [writer.number(self.lines.start)] if self.lines.start else []
        for index in steep:
            reached = writer.op("Max", h, self.knots[index - 1]) if index else h
            if index < len(self.knots):
                reached = writer.op("Min", reached, self.knots[index])
            way = writer.op("Sub", reached, self.knots[max(index - 1, 0)])
            terms.append(writer.op("Mul", way, self.slopes[index]))
        return writer.added(terms)


def _added(writer: Writer, value: str, number: float) -> str:
    return writer.op("Add", value, writer.number(number)) if number else value
