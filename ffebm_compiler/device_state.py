"""Put the weights of a hybrid's blocks on devices, and store and restore which devices they are.

What the devices hold follows from the source's weights, the settings, the seed and the age. So these are what is
stored, and the same devices come back bit for bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ffebm_compiler.digital_bits import (
    check_digital_bits,
    digital_ranges,
    restore_digital_ranges,
    set_digital_bits,
)
from ffebm_compiler.errors import ExportError, InputError, UnsupportedError
from ffebm_compiler.ir import Role
from ffebm_compiler.plan_data import PlanData
from ffebm_compiler.runtime.devices.arrays import Arrays
from ffebm_compiler.runtime.devices.devices import Devices
from ffebm_compiler.runtime.devices.laws import checked_number
from ffebm_compiler.runtime.devices.tiling import Tiling
from ffebm_compiler.runtime.energies.loads import multiplying_weights

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts
    from ffebm_compiler.runtime.block import EnergyBlock

__all__ = [
    "age_of",
    "aged",
    "check_exportable_devices",
    "count_of_norms",
    "observed_ranges",
    "program_devices",
    "put_on_devices",
    "restore_devices",
    "stored_devices",
]


def put_on_devices(
    hybrid: HybridParts, devices: Devices | None, age: float = 0.0, only: Collection[str] | None = None
) -> None:
    """Program the weights of every block into devices, or take them back into exact arithmetic.

    The feedback is set for the weights that the devices hold. With `only`, names of operations, those alone are on
    devices, and a block with none of them computes exactly. Such a hybrid is for measurements: it is not stored.

    Raises:
        InputError: the plan has no analog block, or no digital part for the devices' `digital_bits`.
        UnsupportedError: a layer lies on tiles of its own for every output position, a weight has an odd number of
            devices, or the energy does not admit the mismatch.
    """
    blocks = hybrid.energy_blocks
    check_digital_bits(hybrid, devices)
    if devices is not None and not blocks and not devices.only_digital:
        raise InputError(
            "the plan has no analog block, so that there is no weight to put on devices: convert with other hardware "
            "or without force_digital, or leave devices out"
        )
    held = {
        each.name: frozenset(each.operations if only is None else {*each.operations} & {*only})
        for each in hybrid.plan.blocks
    }
    made = {
        name: _arrays(hybrid.plan, name, block, devices, age, held[name])
        if devices is not None and not devices.only_digital and held[name]
        else None
        for name, block in blocks.items()
    }
    before = {name: (block.arrays, block.program, block.gain) for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            block.set_arrays(made[name])
    except UnsupportedError:
        for name, block in blocks.items():
            block.arrays, block.program, block.gain = before[name]
        raise
    hybrid.devices = devices
    set_digital_bits(hybrid, None if devices is None else devices.digital_bits)
    changed = [name for name in blocks if only is None or before[name][0] is not None or made[name] is not None]
    for name in changed:
        blocks[name].gain.forget()
    hybrid._recertify(*changed, together=False)


def _arrays(
    plan: PlanData, name: str, block: EnergyBlock, devices: Devices, age: float, held: Collection[str]
) -> Arrays:
    tilings: dict[str, Tiling] = {}
    bias_rows = set()
    for operation in (plan.graph[operation] for operation in plan.block(name).operations):
        if operation.role is not Role.WEIGHT or operation.name not in held:
            continue
        fabric = plan.hardware.for_layer(operation.path)
        if fabric.conv_mapping == "unrolled" and operation.positions > 1 and operation.kind.startswith("conv"):
            raise UnsupportedError(
                f"layer {operation.path!r} of {name} lies on tiles of its own for every output position "
                "(conv_mapping='unrolled'), so that each position would have other errors than the next, which a "
                "convolution does not. Use conv_mapping='im2col', or keep the layer digital (force_digital)"
            )
        # The bias of a transposed convolution belongs to output channels, and its columns to their kernels.
        on_row = operation.bias and fabric.bias_row and operation.kind != "conv_transpose"
        rows = operation.rows + int(on_row)
        tilings[operation.name] = Tiling.of(
            rows,
            operation.cols,
            operation.groups,
            tile_rows=fabric.tile_rows,
            tile_cols=fabric.tile_cols,
            devices=fabric.devices_per_weight,
            groups_per_tile=fabric.groups_per_tile(operation.rows, operation.cols, operation.groups, on_row),
        )
        if on_row:
            bias_rows.add(operation.name)
    program = block.program if block.arrays is None else block.arrays.source
    strict = block.energy_function.nonnegative and program.coupled
    conductances = multiplying_weights(program) if strict else ()
    digital = plan.hardware.row_sums == "digital"
    return Arrays(program, tilings, frozenset(bias_rows), devices, age, conductances, digital)


def check_exportable_devices(hybrid: HybridParts) -> None:
    """Refuse devices that are more than other weights, for an ONNX file.

    Raises:
        ExportError: their reads have noise, or there are converters.
    """
    devices = hybrid.devices
    if devices is None:
        return
    exact: dict[str, object] = {"read_noise": 0.0, "dac_bits": None, "adc_bits": None}
    found = [name for name, value in exact.items() if getattr(devices, name) != value]
    if found:
        without = ", ".join(f"{name}={exact[name]}" for name in found)
        raise ExportError(
            f"the weights of this hybrid are on devices ({devices.name}) with {' and '.join(found)}, which an ONNX "
            "file does not hold, since it has constants for weights and neither noise nor converters. Export the "
            f"static errors alone (hybrid.set_devices(dataclasses.replace(hybrid.devices, {without})), which draws the "
            "same ones; age() sets their age again), or call set_devices(None)"
        )


def present_devices(hybrid: HybridParts, what: str) -> Devices:
    """The hybrid's devices.

    Raises:
        InputError: it has none.
    """
    devices = hybrid.devices
    if devices is None:
        raise InputError(
            f"{what} needs devices, and this hybrid computes exactly: call hybrid.set_devices('pcm') or another preset "
            "first, or convert with devices="
        )
    return devices


def program_devices(hybrid: HybridParts, seed: int | None) -> None:
    """Program the devices again, with new errors and an age of zero. Without a seed it is the next one.

    Raises:
        InputError: there are no devices, or the seed is no integer of at least 0.
    """
    devices = present_devices(hybrid, "program_devices")
    put_on_devices(hybrid, replace(devices, seed=devices.seed + 1 if seed is None else seed))


def aged(hybrid: HybridParts, seconds: float) -> None:
    """Set the time since the devices were programmed. The amplifiers stay as they are.

    Raises:
        InputError: there are no devices, or the time is before they were programmed.
    """
    present_devices(hybrid, "age")
    age = checked_number(
        "seconds", seconds, remedy="the time since the devices were programmed (program_devices starts it again)"
    )
    for block in hybrid.energy_blocks.values():
        if block.arrays is not None:
            block.arrays.age = age
        block.gain.forget()


def age_of(hybrid: HybridParts) -> float:
    """Seconds since the devices were programmed."""
    ages = (block.arrays.age for block in hybrid.energy_blocks.values() if block.arrays is not None)
    return next(ages, 0.0)


@contextmanager
def observed_ranges(hybrid: HybridParts) -> Iterator[None]:
    """While the context is open, converters take their ranges from what comes through, and do not quantise.

    Raises:
        InputError: there are no devices.
    """
    present_devices(hybrid, "calibrate_converters")
    found = [block.arrays.converters for block in hybrid.energy_blocks.values() if block.arrays is not None]
    try:
        for converters in found:
            converters.ranges, converters.observing = {}, True
        yield
    finally:
        for converters in found:
            converters.observing = False


def stored_devices(hybrid: HybridParts) -> dict[str, Any] | None:
    """The devices as numbers and texts, with their age and the ranges of their converters; None without devices."""
    if hybrid.devices is None:
        return None
    arrays = {name: block.arrays for name, block in hybrid.energy_blocks.items() if block.arrays is not None}
    return {
        "settings": hybrid.devices.to_dict(),
        "age": age_of(hybrid),
        "ranges": {
            name: {place: list(limits) for place, limits in each.converters.ranges.items()}
            for name, each in arrays.items()
        },
        "digital": digital_ranges(hybrid),
    }


def count_of_norms(block: EnergyBlock, state: Mapping[str, Any]) -> int:
    """How many norms a block's certificate holds in a stored state: more if its feedback goes through other weights."""
    if block.certificate is None or not block.certificate.norms:  # there is no feedback, or its gain follows from sums
        return 0
    stored = state.get("devices")
    mismatch = isinstance(stored, Mapping) and bool(stored.get("settings", {}).get("mismatch"))
    program = block.program if block.arrays is None else block.arrays.source
    edges = sum(map(len, program.upstream))
    return edges if program.symmetric and not mismatch else 2 * edges


def restore_devices(hybrid: HybridParts, stored: Mapping[str, Any] | None) -> None:
    """Restore the result of `stored_devices`. Devices that are there already stay.

    Raises:
        InputError: a setting is out of range.
    """
    devices = None if stored is None else Devices.from_dict(stored["settings"])
    age = 0.0 if stored is None else float(stored["age"])
    if devices != hybrid.devices or age != age_of(hybrid):
        put_on_devices(hybrid, devices, age)
    for name, ranges in ({} if stored is None else stored["ranges"]).items():
        arrays = hybrid.energy_blocks[name].arrays
        if arrays is not None:
            arrays.converters.ranges = {place: (float(low), float(high)) for place, (low, high) in ranges.items()}
    restore_digital_ranges(hybrid, {} if stored is None else stored.get("digital", {}))
