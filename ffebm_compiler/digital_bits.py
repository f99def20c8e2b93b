"""Compute the digital parts of a hybrid with quantised weights and values, and store and restore their ranges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from ffebm_compiler.errors import InputError
from ffebm_compiler.runtime.feedforward.blocks import FeedforwardBlock
from ffebm_compiler.runtime.feedforward.fetch import Fetch
from ffebm_compiler.runtime.feedforward.quantised_backprop import QuantisedBackprop
from ffebm_compiler.runtime.feedforward.quantiser import Quantiser

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_parts import HybridParts
    from ffebm_compiler.runtime.devices.devices import Devices

__all__ = [
    "calls_of",
    "check_digital_bits",
    "check_quantised",
    "digital_parts",
    "digital_ranges",
    "observed_values",
    "quantised_backprop",
    "quantisers",
    "restore_digital_ranges",
    "set_digital_bits",
    "set_quantised_backprop",
]


def digital_parts(hybrid: HybridParts) -> dict[str, FeedforwardBlock]:
    """The digital parts by name."""
    found = hybrid.feedforward_blocks.items()
    return {name: part for name, part in found if isinstance(part, FeedforwardBlock)}


def quantisers(hybrid: HybridParts) -> dict[str, Quantiser]:
    """The quantised arithmetic of each digital part that has one."""
    found = ((name, part.arithmetic) for name, part in digital_parts(hybrid).items())
    return {name: arithmetic for name, arithmetic in found if isinstance(arithmetic, Quantiser)}


def check_digital_bits(hybrid: HybridParts, devices: Devices | None) -> None:
    """Refuse quantised digital parts where there are none, and exact ones where their gradients are quantised.

    Raises:
        InputError: it is so.
    """
    bits = None if devices is None else devices.digital_bits
    if bits is not None and not digital_parts(hybrid):
        raise InputError(
            f"digital_bits is {bits}, and the plan has no digital part: leave digital_bits out, or keep a layer "
            "digital (force_digital)"
        )
    if bits is None and quantised_backprop(hybrid) is not None:
        raise InputError(
            "these devices have no digital_bits, which the quantised gradients of the digital parts need: call "
            "hybrid.set_gradient(..., feedforward='backprop') first, or give the devices digital_bits=8"
        )


def set_digital_bits(hybrid: HybridParts, bits: int | None) -> None:
    """Compute all digital parts with so many bits, or with the operands' dtype. Ranges that are known stay."""
    operands = _weights_of_parts(hybrid) if bits is not None else {}
    for name, part in digital_parts(hybrid).items():
        if bits is None:
            part.arithmetic = None
        elif isinstance(part.arithmetic, Quantiser):
            part.arithmetic.bits = bits
        else:
            part.arithmetic = Quantiser(name, bits, operands.get(name, frozenset()))


def _weights_of_parts(hybrid: HybridParts) -> dict[str, frozenset[str]]:
    """Part -> names of its operands that depend on no input of the network."""
    run = hybrid.lowered
    moving: set[fx.Node] = set()
    found: dict[str, frozenset[str]] = {}
    for node in run.graph.nodes:
        module = run.get_submodule(str(node.target)) if node.op == "call_module" else None
        computes = module is not None and not isinstance(module, Fetch)
        if node.op == "placeholder" or computes or any(each in moving for each in node.all_input_nodes):
            moving.add(node)
        if isinstance(module, FeedforwardBlock):
            inside = [each for each in module.graph.nodes if each.op == "placeholder"]
            pairs = zip(inside, node.args, strict=True)
            found[str(node.target)] = frozenset(name.name for name, operand in pairs if operand not in moving)
    return found


def calls_of(batches: Iterable[Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of a call for each batch.

    Raises:
        InputError: there is no batch, or one that is not in an iterable.
    """
    if isinstance(batches, Tensor | Mapping):
        raise InputError(
            f"batches is a {type(batches).__name__}; expected an iterable of batches, each a tensor, a tuple of "
            "positional arguments or a dictionary of arguments: put one batch into a list"
        )
    count = 0
    for batch in batches:
        count += 1
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        else:
            yield tuple(batch) if isinstance(batch, tuple | list) else (batch,), {}
    if not count:
        raise InputError("batches holds no batch: pass representative inputs, such as a few batches of a loader")


@contextmanager
def observed_values(hybrid: HybridParts) -> Iterator[None]:
    """While the context is open, values of digital parts set their ranges anew, and are not quantised.

    Nothing else that a forward sets is kept. After an error the ranges are as they were.

    Raises:
        InputError: the digital parts are not quantised.
    """
    found = quantisers(hybrid).values()
    if not found:
        raise InputError(
            "calibrate_digital needs digital parts with bits, and this hybrid's compute in floating point: call "
            "hybrid.set_devices(ffebm.Devices(digital_bits=8)) first"
        )
    before = [each.ranges for each in found]
    arrays = [block.arrays for block in hybrid.energy_blocks.values() if block.arrays is not None]
    converters = [dict(each.converters.ranges) for each in arrays]
    try:
        with ExitStack() as stack:
            for part in digital_parts(hybrid).values():
                stack.enter_context(part.frozen_statistics())
            for each in found:
                each.ranges, each.observing = {}, True
            yield
    except BaseException:
        for each, ranges in zip(found, before, strict=True):
            each.ranges = ranges
        raise
    finally:
        for each in found:
            each.observing = False
        for array, known in zip(arrays, converters, strict=True):
            array.converters.ranges = known


def digital_ranges(hybrid: HybridParts) -> dict[str, dict[str, list[float] | None]]:
    """Part -> value -> its range, as numbers."""
    return {
        name: {value: None if limits is None else list(limits) for value, limits in each.ranges.items()}
        for name, each in quantisers(hybrid).items()
    }


def restore_digital_ranges(hybrid: HybridParts, stored: Mapping[str, Mapping[str, Any]]) -> None:
    """Restore the result of `digital_ranges`."""
    for name, each in quantisers(hybrid).items():
        each.ranges = {
            value: None if limits is None else (float(limits[0]), float(limits[1]))
            for value, limits in stored.get(name, {}).items()
        }


def quantised_backprop(hybrid: HybridParts) -> QuantisedBackprop | None:
    """How the gradients of digital parts are quantised; None if they are not."""
    return next((each.backprop for each in quantisers(hybrid).values()), None)


def check_quantised(hybrid: HybridParts) -> None:
    """Refuse quantised gradients of digital parts that compute in floating point.

    Raises:
        InputError: they do.
    """
    if not quantisers(hybrid):
        raise InputError(
            "quantised gradients are those of quantised digital parts, and this hybrid's compute in floating point: "
            "call hybrid.set_devices(ffebm.Devices(digital_bits=8)) first"
        )


def set_quantised_backprop(hybrid: HybridParts, settings: QuantisedBackprop | None) -> None:
    """Quantise the gradients of digital parts, or leave them as they are."""
    for each in quantisers(hybrid).values():
        each.backprop = settings
