"""`Arrays`: the crossbars of one block. They turn the source's weights into the ones that the block is run with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ffebm_compiler.runtime.devices.array import Array
from ffebm_compiler.runtime.devices.array_converters import ArrayConverters
from ffebm_compiler.runtime.devices.converters import Converters
from ffebm_compiler.runtime.devices.devices import Devices
from ffebm_compiler.runtime.devices.tiling import Tiling
from ffebm_compiler.runtime.program.block_program import BlockProgram, Instruction
from ffebm_compiler.runtime.program.operators import Operator
from ffebm_compiler.runtime.program.reads import Reads
from ffebm_compiler.runtime.weight_stamp import WeightStamp

__all__ = ["Arrays"]


@dataclass(frozen=True)
class _Place:
    """Where an array's weights come from, and where they go."""

    array: Array
    operator: Operator
    weight: int
    """Index of the source's weight."""
    bias: int | None
    """Index of the bias if it lies on the crossbar, as one more row."""
    forward: int
    """Index of the weight that the device's program reads forward."""
    backward: int | None
    """Index of the one that its feedback goes through; None if that is the forward one."""
    offset: int | None
    """Index of the bias in the device's program, if it lies on the crossbar."""


class Arrays:
    """The devices of one block, beside its source's weights, which they never change.

    `program` is the block's program with a weight of its own for every array: a layer that runs twice in a block is on
    tiles of its own each time, and mismatch gives the feedback weights of its own. `held` fills them in. Gradients go
    straight through to the source's weights, as if ∂w̃/∂w were 1.

    Args:
        program: the block's program as it was lowered.
        tilings: name of each weight-stationary operation of the block that is on devices -> how it lies on tiles. The
            others compute exactly.
        bias_rows: names of the operations whose bias is a row of the crossbar.
        devices: the devices.
        age: seconds since they were programmed.
        conductances: indices of the weights that are conductances themselves, and so never negative.
        digital_sums: whether the results of the tiles of one layer are converted one by one.
    """

    noise: torch.Generator | None = None
    """What the noise of reads is drawn from; None for torch's own generator."""

    def __init__(
        self,
        program: BlockProgram,
        tilings: Mapping[str, Tiling],
        bias_rows: frozenset[str],
        devices: Devices,
        age: float = 0.0,
        conductances: Collection[int] = (),
        digital_sums: bool = False,
    ) -> None:
        self.devices, self.age = devices, age
        self.source = program
        self.converters = Converters(devices.dac_bits, devices.adc_bits)
        """At the block's boundary."""
        self._places: list[_Place] = []
        self._kept: dict[int, tuple[WeightStamp, float, list[Tensor | None], list[Tensor | None]]] = {}
        self.program = self._expanded(tilings, bias_rows, frozenset(conductances))
        one_by_one = tilings if digital_sums else {}
        self.between = ArrayConverters(self.program, one_by_one, bias_rows, self.converters)
        """Between the arrays."""

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was computed from weights."""
        return {**self.__dict__, "_kept": {}}

    def _expanded(
        self, tilings: Mapping[str, Tiling], bias_rows: frozenset[str], conductances: frozenset[int]
    ) -> BlockProgram:
        program, mismatch = self.source, bool(self.devices.mismatch)
        count = program.weights
        claimed = {index for item in _exact(program, tilings) for index in item.weights if index is not None}
        own_feedback = dict(program.feedback_weights)
        coupling = set(program.coupling_weights)
        feedback: list[tuple[int, int]] = []
        found: dict[str, tuple[int | None, ...]] = {}

        def fresh(index: int) -> int:
            nonlocal count
            if index not in claimed:
                claimed.add(index)
                return index
            count += 1
            return count - 1

        def turned(item: Instruction) -> Instruction:
            nonlocal count
            weight = item.weights[0] if item.operator.product else None
            if weight is None:
                return item
            if item.operation not in tilings:
                if weight in own_feedback and (weight, own_feedback[weight]) not in feedback:
                    feedback.append((weight, own_feedback[weight]))
                return item
            if item.operation in found:
                return replace(item, weights=found[item.operation])
            tiling = tilings[item.operation]
            bias = item.weights[1] if len(item.weights) > 1 else None
            on_row = bias is not None and item.operation in bias_rows
            forward = fresh(weight)
            offset = fresh(bias) if on_row and bias is not None else bias
            backward = None
            if weight in own_feedback:
                backward = fresh(own_feedback[weight])
                name = f"{program.name}/{item.operation}/feedback"
                array = Array(name, replace(tiling, rows=_without_bias(tiling, on_row)), self.devices)
                self._places.append(_Place(array, item.operator, own_feedback[weight], None, backward, None, None))
            elif mismatch and weight in coupling and self._multiplies_states(item):
                backward, count = count, count + 1
            if backward is not None:
                feedback.append((forward, backward))
            self._places.append(
                _Place(
                    Array(f"{program.name}/{item.operation}", tiling, self.devices, weight in conductances),
                    item.operator,
                    weight,
                    bias if on_row else None,
                    forward,
                    None if weight in own_feedback else backward,
                    offset if on_row else None,
                )
            )
            found[item.operation] = (forward, offset) if len(item.weights) > 1 else (forward,)
            return replace(item, weights=found[item.operation])

        layers = tuple(replace(layer, instructions=tuple(map(turned, layer.instructions))) for layer in program.layers)
        if count == program.weights and layers == program.layers and tuple(feedback) == program.feedback_weights:
            return program
        return replace(program, layers=layers, weights=count, feedback_weights=tuple(feedback))

    def _multiplies_states(self, item: Instruction) -> bool:
        return any(self.source.from_states[register] for register in item.operands)

    @property
    def origins(self) -> dict[int, int]:
        """Weight of the device's program -> the source's weight that it comes from."""
        found = {index: index for index in range(self.source.weights)}
        for place in self._places:
            found[place.forward] = place.weight
            if place.backward is not None:
                found[place.backward] = place.weight
            if place.offset is not None and place.bias is not None:
                found[place.offset] = place.bias
        return found

    def held(self, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The weights of the device's program, for these weights of the source."""
        return self._filled(weights)[0]

    def enter(self, weights: Sequence[Tensor | None]) -> tuple[list[Tensor | None], Reads | None]:
        """The weights of the device's program, and how they are read; None if exactly, without converters."""
        held, variances = self._filled(weights)
        if not self.inexact:
            return held, None
        return held, Reads(variances, self.between if self.converts else None, generator=self.noise)

    @property
    def converts(self) -> bool:
        """Whether there are converters."""
        return self.devices.adc_bits is not None or self.devices.dac_bits is not None

    @property
    def inexact(self) -> bool:
        """Whether a read differs from what the devices hold."""
        return self.devices.noisy or self.converts

    @property
    def reads_states(self) -> bool:
        """Whether states are read with noise or through ADCs, or settle through converters."""
        inside = self.converts and self.between.inside
        return self.devices.noisy or self.devices.adc_bits is not None or inside

    def _filled(self, weights: Sequence[Tensor | None]) -> tuple[list[Tensor | None], dict[int, Tensor]]:
        result: list[Tensor | None] = [*weights, *[None] * (self.program.weights - len(weights))]
        variances: dict[int, Tensor] = {}
        for number, place in enumerate(self._places):
            weight = weights[place.weight]
            bias = None if place.bias is None else weights[place.bias]
            if weight is None:
                continue
            values, noise = self._values(number, place, weight, bias)
            targets = (place.forward, place.backward, place.offset)
            for index, value, variance, source in zip(targets, values, noise, (weight, weight, bias), strict=True):
                if index is None or value is None or source is None:
                    continue
                result[index] = _straight_through(source, value)
                if variance is not None:
                    variances[index] = variance
        return result, variances

    def _values(
        self, number: int, place: _Place, weight: Tensor, bias: Tensor | None
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """(forward, backward, bias) and their variances, computed again only if something has changed."""
        sources = [weight] if bias is None else [weight, bias]
        kept = self._kept.get(number)
        stamp = WeightStamp.of(sources)
        if kept is not None and kept[1] == self.age and kept[0].equals(stamp):
            return kept[2], kept[3]
        with torch.no_grad():
            matrices = place.operator.matrices(weight.detach())
            if bias is not None:
                row = bias.detach().reshape(len(matrices), 1, -1)
                matrices = torch.cat([matrices, row], 1)
            found = place.array.held(matrices, self.age)
            rows = matrices.shape[1] - (bias is not None)

            def of(part: Tensor | None) -> Tensor | None:
                return None if part is None else place.operator.weight_of(part[:, :rows], weight.shape)

            forward = of(found.forward)
            backward = forward if found.backward is found.forward else of(found.backward)
            spread = of(found.variance)
            held: list[Tensor | None] = [forward, backward, None]
            noise: list[Tensor | None] = [spread, spread, None]
            if bias is not None:
                held[2] = found.forward[:, rows].reshape(bias.shape)
                noise[2] = None if found.variance is None else found.variance[:, rows].reshape(bias.shape)
        self._kept[number] = stamp, self.age, held, noise
        return held, noise


def _exact(program: BlockProgram, tilings: Collection[str]) -> Iterator[Instruction]:
    """The products of a program that are not on devices."""
    for layer in program.layers:
        yield from (item for item in layer.instructions if item.operator.product and item.operation not in tilings)


def _without_bias(tiling: Tiling, on_row: bool) -> tuple[int, ...]:
    """The rows of a tiling without the row of a bias."""
    if not on_row:
        return tiling.rows
    *before, last = tiling.rows
    return (*before, last - 1) if last > 1 else tuple(before)


def _straight_through(source: Tensor, value: Tensor) -> Tensor:
    """The value, with a derivative of 1 by the source."""
    if torch.is_grad_enabled() and source.requires_grad:
        return source + (value - source).detach()
    return value
