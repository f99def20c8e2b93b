"""Call the user's `evaluate`, and put a part of a hybrid's layers on devices while it is called."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.accuracy.journal import LARGEST, digest_of, is_moderate
from ffebm_compiler.accuracy.outputs import deviation, recorded
from ffebm_compiler.device_state import observed_ranges, put_on_devices
from ffebm_compiler.errors import FFEBMError, InputError
from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.passes.unchanged import generators_unchanged
from ffebm_compiler.plain_numbers import plain
from ffebm_compiler.reports.numbers import number_of
from ffebm_compiler.runtime.devices.devices import Devices

__all__ = [
    "ONE_AT_A_TIME",
    "Evaluate",
    "Measure",
    "Setting",
    "check_repeats",
    "value_of",
    "whole_number",
]

Evaluate = Callable[[Any], Any]
"""A network in evaluation mode -> a number, such as its accuracy."""

ONE_AT_A_TIME = threading.RLock()
"""Workers that are threads share one hybrid and torch's one generator, so that they take turns."""


@dataclass(frozen=True)
class Setting:
    """What is not ideal in one measurement."""

    key: str
    """Names the measurement in a file."""
    told: str
    """How an error names it, such as "layer 'conv1' on devices"."""
    operations: tuple[str, ...] = ()
    """The plan's operations that are on devices."""
    settling: tuple[str, ...] | None = None
    """Names of the blocks that settle. The others compute what the source computes. None is all."""
    draw: int = 0
    """Which devices: it is added to their seed, and to the seed of torch's generator."""


def value_of(evaluate: Evaluate, model: nn.Module, told: str) -> float:
    """The number that `evaluate` returns.

    Raises:
        InputError: it raises an error, or returns no finite number. Names what was measured.
    """
    try:
        with torch.no_grad():
            found = evaluate(model)
    except FFEBMError as error:
        raise type(error)(f"{told}: {error}") from error
    except Exception as error:  # it runs the user's code
        said = (str(error).strip() or "without a message").splitlines()[0]
        raise InputError(
            f"evaluate raised an error with {told}: {type(error).__name__}: {said}. "
            "It is called with a network in evaluation mode and returns a number"
        ) from error
    number = number_of(found, f"with {told}")
    if not is_moderate(number):
        raise InputError(
            f"evaluate returned {number} with {told}; expected a finite number such as an accuracy, of at most "
            f"{LARGEST:g} in size"
        )
    return number


class Measure:
    """`evaluate` of a hybrid with a part of it on devices. It can be sent to another process.

    Args:
        hybrid: the hybrid, which is copied.
        evaluate: the metric.
        devices: of the layers that a setting names.
        age: seconds since the devices were programmed.
        seed: is added to every draw.
    """

    def __init__(
        self, hybrid: HybridModel, evaluate: Evaluate, devices: Devices, age: float = 0.0, seed: int = 0
    ) -> None:
        self.hybrid = copy.deepcopy(hybrid)
        put_on_devices(self.hybrid, None)
        self.hybrid.eval()
        self.evaluate, self.devices, self.age, self.seed = evaluate, devices, age, seed
        self.source_outputs: list[Tensor] = []
        """What the source returned; `check_repeats` keeps it."""

    def __call__(self, setting: Setting) -> dict[str, float | None]:
        """{"value": what `evaluate` returns, "deviation": of the outputs from the source's}.

        Raises:
            InputError: `evaluate` raises an error, or returns no finite number. Names the setting.
        """
        value, outputs = self.measured(setting)
        return {"value": value, "deviation": deviation(outputs, self.source_outputs)}

    def measured(self, setting: Setting) -> tuple[float, list[Tensor]]:
        """What `evaluate` returns, and what the network returned to it."""
        with ONE_AT_A_TIME, generators_unchanged():
            devices = replace(self.devices, seed=self.devices.seed + self.seed + setting.draw)
            put_on_devices(self.hybrid, devices, self.age, setting.operations)
            blocks = self.hybrid.energy_blocks
            for name, block in blocks.items():
                block.enabled = setting.settling is None or name in setting.settling
            self.hybrid.eval()
            if devices.dac_bits is not None or devices.adc_bits is not None:
                self._set_ranges(setting)
            torch.manual_seed(self.seed + setting.draw)
            with recorded(self.hybrid) as outputs:
                value = value_of(self.evaluate, self.hybrid, setting.told)
            return value, outputs

    def _set_ranges(self, setting: Setting) -> None:
        """Let converters see all data first, as `calibrate_converters` does."""
        with observed_ranges(self.hybrid):
            torch.manual_seed(self.seed + setting.draw)
            value_of(self.evaluate, self.hybrid, setting.told)


def check_repeats(measure: Measure, setting: Setting) -> float:
    """The value of a setting without devices, which is measured twice. Its outputs are kept to compare with.

    Raises:
        InputError: the two differ, so that no difference between settings means anything.
    """
    first, measure.source_outputs = measure.measured(setting)
    second, _ = measure.measured(replace(setting, draw=1))
    if first != second:
        raise InputError(
            f"evaluate is not deterministic: called twice with {setting.told}, it returned {first!r} and {second!r}. "
            "Use the same data every time, without random augmentation or shuffling, and seed what draws"
        )
    return first


def whole_number(name: str, value: object, least: int) -> int:
    """A whole number of at least so much.

    Raises:
        InputError: it is something else.
    """
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise InputError(f"{name} is {value!r}; expected a whole number of at least {least}")
    return found


def identity_of(hybrid: HybridModel, measure: Measure, source: float) -> dict[str, str]:
    """What measurements of a hybrid depend on, as texts that a file of them is recognised by.

    Args:
        hybrid: what is measured, with no device.
        measure: has the devices and their age.
        source: the value of the source network.
    """
    return {
        "plan": hybrid.plan.fingerprint,
        "blocks": str([block.operations for block in hybrid.plan.blocks]),
        "weights": digest_of(hybrid),
        "devices": json.dumps(measure.devices.to_dict(), sort_keys=True),
        "age": repr(measure.age),
        "feedback": str([block.module.feedback for block in hybrid.blocks]),
        "value of the source": repr(source),
    }
