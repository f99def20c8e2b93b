"""Laws of single devices: drift, relaxation, read noise and the response to pulses.

A conductance g is relative to the largest one of its tile's devices, g_max, so that g is from 0 to 1. Every law is a
value that is checked when it is made, and evaluates on tensors.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ffebm_compiler.errors import InputError
from ffebm_compiler.plain_numbers import plain, plain_fields

__all__ = ["Drift", "FlickerNoise", "LogLaw", "Relaxation", "checked_number", "checked_polynomial", "polynomial"]

_LARGEST = sys.float_info.max
_SMALLEST = 1e-6
"""The smallest relative conductance whose logarithm a law reads."""


def checked_number(
    what: str, value: object, least: float = 0.0, most: float = math.inf, *, above: bool = False, remedy: str = ""
) -> float:
    """The value as a float, from `least` (or above it) to `most`.

    Raises:
        InputError: it is no finite number in this range.
    """
    value = plain(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not number
        or not -_LARGEST <= value <= _LARGEST  # type: ignore[operator]
        or not (value > least if above else value >= least)  # type: ignore[operator]
        or value > most  # type: ignore[operator]
    ):
        bound = "" if least == -math.inf else f" above {least:g}" if above else f" of at least {least:g}"
        limit = "" if most == math.inf else f" and at most {most:g}"
        raise InputError(f"{what} is {value!r}; expected a finite number{bound}{limit}{remedy and ', ' + remedy}")
    return float(value)  # type: ignore[arg-type]


def checked_polynomial(what: str, value: object) -> float | tuple[float, ...]:
    """A standard deviation: a number of at least 0, or the coefficients of a polynomial of g.

    Raises:
        InputError: it is neither, or the polynomial is negative for a g from 0 to 1.
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        return checked_number(what, value, remedy="or the coefficients of a polynomial of g/g_max, lowest order first")
    if not value:
        raise InputError(f"{what} is empty; expected the coefficients of a polynomial of g/g_max, lowest order first")
    found = tuple(checked_number(f"{what}[{order}]", each, least=-math.inf) for order, each in enumerate(value))
    lowest = float(polynomial(found, torch.linspace(0, 1, 257, dtype=torch.float64, device="cpu")).min())
    if lowest < 0:
        raise InputError(
            f"{what} is {value!r}, a polynomial that falls to {lowest:.3g} for a g/g_max from 0 to 1; expected a "
            "standard deviation, which is never negative"
        )
    return found


def polynomial(coefficients: float | tuple[float, ...], g: Tensor) -> Tensor:
    """Σ_i c_i gⁱ."""
    if isinstance(coefficients, float):
        return torch.full_like(g, coefficients)
    total = torch.full_like(g, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total = total * g + coefficient
    return total


@dataclass(frozen=True)
class LogLaw:
    """slope · ln g + offset, clamped to [low, high].

    Raises:
        InputError: a number is not finite, or low is above high.
    """

    slope: float
    offset: float
    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        plain_fields(self)
        for name in ("slope", "offset"):
            checked_number(name, getattr(self, name), least=-math.inf)
        checked_number("low", self.low)
        checked_number("high", self.high, least=float(self.low))

    def __call__(self, g: Tensor) -> Tensor:
        """The law at these conductances."""
        return (self.slope * g.clamp_min(_SMALLEST).log() + self.offset).clamp(self.low, self.high)


@dataclass(frozen=True)
class Drift:
    """Conductances that fall by a power of time: g(t) = g(t₀) (t/t₀)^(−ν).

    The exponent of each device is drawn once per programming, ν ~ max(0, N(nu(g), spread(g))). Before t₀ nothing
    drifts.

    Args:
        nu: mean exponent, a number of at least 0 or a `LogLaw` of the conductance.
        spread: standard deviation of the exponent over the devices, a number or a `LogLaw`.
        start: t₀, in seconds after programming.
        compensated: whether the results of each tile are multiplied by Σ g(t₀)/Σ g(t) over its devices, as one read
            with equal inputs measures it (global drift compensation, Joshi et al. 2020).

    Raises:
        InputError: a number is out of range.
    """

    nu: float | LogLaw = 0.05
    spread: float | LogLaw = 0.0
    start: float = 20.0
    compensated: bool = False

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        for name in ("nu", "spread"):
            if not isinstance(getattr(self, name), LogLaw):
                checked_number(name, getattr(self, name), most=10, remedy="or a LogLaw")
        checked_number("start", self.start, above=True)
        if not isinstance(self.compensated, bool):
            raise InputError(f"compensated is {self.compensated!r}; expected True or False")

    def exponents(self, g: Tensor, drawn: Tensor) -> Tensor:
        """ν of devices programmed to g, from standard normal numbers."""
        mean, spread = (law(g) if isinstance(law, LogLaw) else float(law) for law in (self.nu, self.spread))
        return (mean + spread * drawn).clamp_min(0)

    def factor(self, g: Tensor, drawn: Tensor, age: float) -> Tensor:
        """(t/t₀)^(−ν) at an age in seconds."""
        return torch.exp(-self.exponents(g, drawn) * math.log(max(age, self.start) / self.start))


@dataclass(frozen=True)
class Relaxation:
    """Conductances that leave their target at random: g(t) = g + σ(g, t) ξ, with the ξ of the programming error.

    σ(g, t) is the programming error at `start`, and `sigmas[i]` at `times[i]`. Between them it is interpolated in ln t,
    and after the last time it stays. That a device keeps its ξ is a choice of this project.

    Args:
        times: seconds after programming, rising.
        sigmas: standard deviation at each time relative to g_max, a number or polynomial of g/g_max.
        start: seconds after programming at which the programming error was measured.

    Raises:
        InputError: the times do not rise, or there is not one standard deviation for each.
    """

    times: tuple[float, ...]
    sigmas: tuple[float | tuple[float, ...], ...]
    start: float = 1.0

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        before = checked_number("start", self.start, above=True)
        for name in ("times", "sigmas"):
            given = getattr(self, name)
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise InputError(f"{name} is {given!r}; expected a tuple with an entry for each time, such as (60.0,)")
        remedy = "later than start, when the programming error was measured"
        for index, time in enumerate(self.times):
            before = checked_number(f"times[{index}]", time, least=before, above=True, remedy=remedy)
            remedy = "later than the time before"
        if not self.times or len(self.times) != len(self.sigmas):
            raise InputError(
                f"sigmas has {len(self.sigmas)} entries for {len(self.times)} times; expected one for each, and at "
                "least one"
            )
        sigmas = tuple(checked_polynomial(f"sigmas[{index}]", each) for index, each in enumerate(self.sigmas))
        object.__setattr__(self, "sigmas", sigmas)
        object.__setattr__(self, "times", tuple(map(float, self.times)))

    def sigma(self, programming: float | tuple[float, ...], g: Tensor, age: float) -> Tensor:
        """σ(g, t)."""
        before, law = self.start, programming
        for time, later in zip(self.times, self.sigmas, strict=True):
            if age < time:
                share = math.log(max(age, before) / before) / math.log(time / before)
                return torch.lerp(polynomial(law, g), polynomial(later, g), share)
            before, law = time, later
        return polynomial(law, g)


@dataclass(frozen=True)
class FlickerNoise:
    """1/f read noise: σ(g, t) = g min(amplitude/g^exponent, most) √ln((t + t_r)/(2 t_r)), relative to g_max.

    Args:
        amplitude, exponent, most: of the spectrum's size relative to g.
        read_time: t_r, the duration of a read in seconds.
        earliest: age in seconds below which t is this age.

    Raises:
        InputError: a number is out of range.
    """

    amplitude: float = 0.0088
    exponent: float = 0.65
    most: float = 0.2
    read_time: float = 250e-9
    earliest: float = 20.0

    def __post_init__(self) -> None:
        """Check the settings."""
        plain_fields(self)
        checked_number("amplitude", self.amplitude)
        checked_number("exponent", self.exponent)
        checked_number("most", self.most)
        checked_number("read_time", self.read_time, above=True)
        checked_number("earliest", self.earliest, least=self.read_time)

    def sigma(self, g: Tensor, age: float) -> Tensor:
        """σ(g, t)."""
        time = max(age, self.earliest)
        size = (self.amplitude / g.clamp_min(_SMALLEST) ** self.exponent).clamp_max(self.most)
        return g * size * math.sqrt(math.log((time + self.read_time) / (2 * self.read_time)))
