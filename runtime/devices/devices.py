"""`Devices`: what the devices of a crossbar do to the weights and values of a block. It is a value without state.

A weight w is the difference of two conductances, g⁺ = max(w, 0)/w_max and g⁻ = max(−w, 0)/w_max relative to g_max, with
w_max the largest |w| of its tile. In this order,

    g      target, rounded to a level, in [g_min, 1]              (`weight_bits`, `on_off`)
    g     ← max(0, g + σ_p(g) ξ)                                   (`programming`)
    g(t)   the drift law at the devices' age                      (`drift`)
    g     ← g_min or 1 for devices that are stuck                  (`stuck_off`, `stuck_on`)
    g     ← what the tile's wires leave of it                      (`wire_resistance`)
    w̃      = w_max (g⁺ − g⁻)/(1 − g_min)
    F, B   = w̃ + σ_m w_max ξ', forward and feedback each with a ξ' of its own   (`mismatch`)

and at every read of an array, in either direction, W x → W x + √(V x²) ξ'' with V the variance of a weight by the read
noise of its devices (`read_noise`). ξ and ξ' are drawn once per programming from the seed, ξ'' at every read. The
products of independent devices' noise with their inputs are exactly that sum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain_fields
from ffebm_compiler.runtime.devices.laws import (
    Drift,
    FlickerNoise,
    LogLaw,
    Relaxation,
    checked_number,
    checked_polynomial,
)
from ffebm_compiler.runtime.devices.pulses import PulseResponse

__all__ = ["Devices", "device_presets", "devices_of"]

_BITS = {"weight_bits": (2, 24), "dac_bits": (2, 24), "adc_bits": (2, 24), "digital_bits": (2, 16)}
"""Fewest and most bits of a setting: a float32 has 24, and integer arithmetic has no more than 16."""
_LAWS: dict[str, type] = {kind.__name__: kind for kind in (Drift, Relaxation, FlickerNoise, LogLaw, PulseResponse)}


@dataclass(frozen=True)
class Devices:
    """The devices and converters of every crossbar of a hybrid.

    Args:
        weight_bits: bits of a weight with its sign: 2^(bits−1) − 1 levels above zero. None: not quantised.
        programming: standard deviation σ_p of a programmed conductance relative to g_max: a number, or the coefficients
            of a polynomial of g/g_max, lowest order first.
        mismatch: standard deviation of a weight, relative to the tile's largest, by which reading forward and reading
            backward each differ from what the devices hold. 0 where the same devices are read both ways.
        read_noise: standard deviation of a device's conductance at every read, relative to g_max: a number, or
            `FlickerNoise`.
        drift: what age does: None, a `Drift`, a `Relaxation`, or the exponent ν of a `Drift`.
        dac_bits: bits of the values that enter a block. None: not quantised.
        adc_bits: bits of the values that leave a block, and of the states that a gradient is made of. None: not
            quantised.
        update: how a device answers pulses, a `PulseResponse` for `PulsedUpdate`. None: none is known.
        seed: seed of the static errors.
        stuck_off: share of the devices that are stuck at their smallest conductance.
        stuck_on: share of the devices that are stuck at g_max.
        on_off: g_max/g_min. None: the smallest conductance is 0.
        wire_resistance: r g_max, resistance of a wire between neighbouring cells of a tile times the largest
            conductance of a device (1 Ω and 25 µS: 2.5e-5).
        digital_bits: bits of weights and values in the digital parts between the blocks. None: not quantised. See
            `HybridModel.calibrate_digital`.
        wires: `"fast"` computes the tiles' wires with each line as a ladder of its own, `"exact"` solves all nodes
            (`docs/analog.md` has the error and the time of both).
        name: what reports call these devices.
        source: where the numbers come from.

    Raises:
        InputError: a setting is out of range.
    """

    weight_bits: int | None = None
    programming: float | tuple[float, ...] = 0.0
    mismatch: float = 0.0
    read_noise: float | FlickerNoise = 0.0
    drift: Drift | Relaxation | None = None
    dac_bits: int | None = None
    adc_bits: int | None = None
    update: PulseResponse | None = None
    seed: int = 0
    stuck_off: float = 0.0
    stuck_on: float = 0.0
    on_off: float | None = None
    wire_resistance: float = 0.0
    wires: Literal["fast", "exact"] = "fast"
    digital_bits: int | None = None
    name: str = "custom"
    source: str = ""

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        for field, (least, most) in _BITS.items():
            bits = getattr(self, field)
            whole = isinstance(bits, int) and not isinstance(bits, bool)
            if bits is not None and (not whole or not least <= bits <= most):
                raise InputError(
                    f"{field} is {bits!r}; expected a whole number from {least} (a sign and one step) to {most}, "
                    "or None for no quantisation"
                )
        self._set("programming", checked_polynomial("programming", self.programming))
        self._set("mismatch", checked_number("mismatch", self.mismatch))
        if not isinstance(self.read_noise, FlickerNoise):
            self._set("read_noise", checked_number("read_noise", self.read_noise, remedy="or a FlickerNoise"))
        if isinstance(self.drift, int | float) and not isinstance(self.drift, bool):
            self._set("drift", Drift(float(self.drift)))
        if self.drift is not None and not isinstance(self.drift, Drift | Relaxation):
            raise InputError(f"drift is {self.drift!r}; expected an exponent, a Drift, a Relaxation, or None")
        if self.update is not None and not isinstance(self.update, PulseResponse):
            raise InputError(f"update is {self.update!r}; expected a PulseResponse or None")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise InputError(f"seed is {self.seed!r}; expected an integer of at least 0 and below 2**63")
        for field in ("stuck_off", "stuck_on"):
            self._set(field, checked_number(field, getattr(self, field), most=1, remedy="the share of the devices"))
        if self.stuck_off + self.stuck_on > 1:
            raise InputError(
                f"stuck_off and stuck_on are {self.stuck_off:g} and {self.stuck_on:g}; expected shares of the devices "
                "that sum to at most 1"
            )
        if self.on_off is not None:
            self._set("on_off", checked_number("on_off", self.on_off, least=1, above=True, remedy="g_max/g_min"))
        wanted = "r g_max, such as 1 Ω times 25e-6 S"
        self._set("wire_resistance", checked_number("wire_resistance", self.wire_resistance, most=1, remedy=wanted))
        if self.wires not in ("fast", "exact"):
            raise InputError(f"wires is {self.wires!r}; expected 'fast' or 'exact'")
        for field in ("name", "source"):
            if not isinstance(getattr(self, field), str):
                raise InputError(f"{field} is {getattr(self, field)!r}; expected a text")

    @property
    def smallest(self) -> float:
        """g_min relative to g_max."""
        return 0.0 if self.on_off is None else 1 / self.on_off

    @property
    def noisy(self) -> bool:
        """Whether a read differs from the read before it."""
        return self.read_noise != 0

    @property
    def only_digital(self) -> bool:
        """Whether they have digital parts of fewer bits, and exact crossbars and converters."""
        same = {"digital_bits": self.digital_bits, "seed": self.seed, "name": self.name, "source": self.source}
        return self.digital_bits is not None and self == Devices(**same)  # type: ignore[arg-type]

    @property
    def exact(self) -> bool:
        """Whether devices hold the weights as they are, until they age. Mismatch and noise come with a read."""
        return not (
            self.weight_bits is not None
            or self.programming != 0
            or self.stuck_off
            or self.stuck_on
            or self.on_off is not None
            or self.wire_resistance
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` makes an equal object of them."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Devices:
        """The devices with these fields.

        Raises:
            InputError: an unknown field, or a value that its field refuses.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"devices are described by a {type(values).__name__}; expected a mapping of their fields")
        try:
            return cls(**{name: _made(value) for name, value in values.items()})
        except TypeError as error:
            raise InputError(f"devices cannot be made of {sorted(values)} ({error})") from error

    def _set(self, field: str, value: object) -> None:
        object.__setattr__(self, field, value)  # the class is frozen


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def _made(value: object) -> Any:
    if isinstance(value, Mapping):
        fields = {str(name): _made(each) for name, each in value.items()}
        kind = fields.pop("kind", None)
        if kind not in _LAWS:
            raise InputError(f"a law of devices is of kind {kind!r}; expected {', '.join(_LAWS)}")
        return _LAWS[kind](**fields)
    return tuple(_made(each) for each in value) if isinstance(value, list) else value


def _relative(g_max: float, *coefficients: float) -> tuple[float, ...]:
    """Coefficients in µS, relative to g_max."""
    return tuple(each / g_max for each in coefficients)


def device_presets() -> dict[str, Devices]:
    """The devices that can be named, each with the source of its numbers. They have no converters."""
    presets = (
        Devices(name="ideal", source="no device: exact arithmetic"),
        Devices(
            programming=_relative(25.0, 0.26348, 1.9650, -1.1731),
            read_noise=FlickerNoise(),
            drift=Drift(LogLaw(-0.0155, 0.0244, 0.049, 0.1), LogLaw(-0.0125, -0.0059, 0.008, 0.045), compensated=True),
            name="pcm",
            source=(
                "phase-change memory of IBM, 90 nm, g_max = 25 µS: Nandakumar et al. 2019 and Joshi et al. 2020 "
                "(Nature Communications 11, 2473), with the coefficients of aihwkit's PCM-like noise model; drift is "
                "compensated for each tile"
            ),
        ),
        Devices(
            programming=_relative(40.0, 0.348, 16.030, -43.853, 45.393, -16.815),
            read_noise=0.01,
            drift=Relaxation(
                times=(86400.0, 172800.0),
                sigmas=(
                    _relative(40.0, 0.701, 22.086, -50.773, 47.095, -16.458),
                    _relative(40.0, 0.782, 20.274, -43.507, 37.062, -11.934),
                ),
            ),
            update=PulseResponse(
                step=0.00135,
                asymmetry=0.259,
                cycle=5.0,
                step_spread=0.2,
                asymmetry_spread=0.05,
                bound_spread=0.3,
            ),
            name="reram",
            source=(
                "HfO2 ReRAM of Wan et al., Nature 608, 504 (2022), g_max = 40 µS: the polynomials at 1 s, 1 day and "
                "2 days that aihwkit fits to the published figures; read noise of 1 % as aihwkit's documentation gives "
                "it for this device; pulses of Gong et al., Nature Communications 9, 2102 (2018) as in aihwkit's "
                "ReRamES preset, with soft bounds in the place of its exponential step"
            ),
        ),
    )
    return {preset.name: preset for preset in presets}


def devices_of(value: object) -> Devices | None:
    """The preset of that name, the `Devices` themselves, or None for exact arithmetic.

    Raises:
        InputError: an unknown name, or neither a name nor a `Devices`.
    """
    if value is None or isinstance(value, Devices):
        return value
    presets = device_presets()
    if not isinstance(value, str) or value not in presets:
        choices = ", ".join(map(repr, presets))
        raise InputError(f"devices is {value!r}; expected {choices}, a Devices(...), or None for exact arithmetic")
    return presets[value]
