"""The constants of the cost model, each with unit, range and source. An unknown one is unknown, never 0.

`Hardware.costs` replaces constants by name, e.g. `costs={"adc_pj": 0.36, "read_ns": 100.0}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches

from ffebm_compiler.errors import HardwareError
from ffebm_compiler.hardware.fabric import Hardware

__all__ = ["Constant", "Quantity", "constants_of", "unknown"]


@dataclass(frozen=True)
class Quantity:
    """A modelled figure: a range in a unit, or unknown.

    A sum or product with an unknown figure is unknown.
    """

    low: float | None
    high: float | None
    unit: str

    @property
    def known(self) -> bool:
        """Whether there is a figure."""
        return self.low is not None

    def __add__(self, other: Quantity) -> Quantity:
        """The sum of two quantities of one unit."""
        if self.unit != other.unit:
            raise HardwareError(f"cannot add {other.unit} to {self.unit}")
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return Quantity(None, None, self.unit)
        return Quantity(self.low + other.low, self.high + other.high, self.unit)

    def __mul__(self, count: float) -> Quantity:
        """The quantity times a number. Zero times an unknown quantity is 0."""
        if not count:
            return Quantity(0.0, 0.0, self.unit)
        if self.low is None or self.high is None:
            return self
        return Quantity(self.low * count, self.high * count, self.unit)

    def ratio(self, other: Quantity) -> tuple[float, float] | None:
        """The range of self / other; None if one of them is unknown or 0."""
        if self.low is None or self.high is None or not other.low or not other.high:
            return None
        return self.low / other.high, self.high / other.low

    def __str__(self) -> str:
        """The range with three digits and a prefix, or `unknown`."""
        if self.low is None or self.high is None:
            return "unknown"
        scale, unit = _prefix(self.high, self.unit)
        low, high = f"{self.low / scale:.3g}", f"{self.high / scale:.3g}"
        return f"{low} {unit}" if low == high else f"{low}–{high} {unit}"


def unknown(unit: str) -> Quantity:
    """An unknown quantity in a unit."""
    return Quantity(None, None, unit)


_STEPS = {"pJ": (("pJ", 1.0), ("nJ", 1e3), ("µJ", 1e6), ("mJ", 1e9), ("J", 1e12)),
          "ns": (("ns", 1.0), ("µs", 1e3), ("ms", 1e6), ("s", 1e9))}  # fmt: skip


def _prefix(value: float, unit: str) -> tuple[float, str]:
    chosen = (1.0, unit)
    for name, scale in _STEPS.get(unit, ()):
        if value >= scale:
            chosen = (scale, name)
    return chosen


@dataclass(frozen=True)
class Constant:
    """One constant of the model."""

    name: str
    what: str
    value: Quantity
    source: str


def _adc(bits: int) -> float:
    """Energy of a conversion with b bits, (100 b + 0.001 · 4^b) fF · V², in pJ at 1 V."""
    return (100 * bits + 0.001 * 4**bits) * 1e-3


def constants_of(hardware: Hardware) -> dict[str, Constant]:
    """The constants for a fabric. Those in its own `costs` replace the model's.

    Raises:
        HardwareError: `hardware.costs` names a constant that the model does not have, or has a count below 1.
    """
    found = {constant.name: constant for constant in _defaults(hardware)}
    own: Mapping[str, float] = hardware.costs or {}
    for name, value in own.items():
        if name not in found:
            close = get_close_matches(name, found, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(found)}"
            raise HardwareError(f"costs names {name!r}, which the cost model does not have: {hint}")
        unit = found[name].value.unit
        if not unit and value < 1:  # a count
            raise HardwareError(
                f"costs[{name!r}] is {value:g}; expected at least 1, the {found[name].what}, or leave it out where it "
                "is not known"
            )
        found[name] = replace(
            found[name], value=Quantity(value, value, unit), source=f"given in Hardware {hardware.name!r}"
        )
    return found


def _defaults(hardware: Hardware) -> list[Constant]:
    return [
        _adc_constant(hardware.adc_bits),
        Constant(
            "dac_pj",
            "one digital-to-analog conversion",
            unknown("pJ")
            if hardware.dac_bits is None
            else Quantity(0.05 * hardware.dac_bits, 0.05 * hardware.dac_bits, "pJ"),
            "no number of bits is given" if hardware.dac_bits is None else "ZigZag's AIMC model: 50 fF·b·V² at 1 V",
        ),
        Constant(
            "cell_pj",
            "one device of a crossbar read once",
            Quantity(0.0018, 0.0018 * (hardware.dac_bits or 8), "pJ"),
            "PUMA-sim, derived: 1.8 fJ for a 1-bit input (low: one analog read; high: a read for each input bit)",
        ),
        Constant(
            "digital_mac_pj",
            "one digital multiply-accumulate, arithmetic alone",
            Quantity(0.23, 4.6, "pJ"),
            "Horowitz, 45 nm: int8 0.2 + 0.03 pJ, fp32 3.7 + 0.9 pJ; memory access is not in it",
        ),
        Constant(
            "element_pj",
            "one elementary operation (an addition, a multiplication or a comparison)",
            Quantity(0.03, 3.7, "pJ"),
            "Horowitz, 45 nm: an int8 addition to an fp32 multiplication",
        ),
        Constant(
            "traffic_pj",
            "one value read from or written to on-chip memory",
            Quantity(0.64, 5.0, "pJ"),
            "low: 8 bits of ISAAC's eDRAM, 20.45 pJ for 256 bits at 32 nm (hwcomponents-library, from the paper's "
            "power); high: 32 bits of an 8 KB SRAM, 10 pJ for 64 bits at 45 nm (Horowitz)",
        ),
        Constant(
            "chip_op_pj",
            "one operation (half a multiply-accumulate) of a full tile, with all that the chip does for it",
            unknown("pJ"),
            "no chip: the presets of chips give it",
        ),
        Constant(
            "gpu_mac_pj",
            "one multiply-accumulate on a V100 at peak, fp32",
            Quantity(38.0, 38.0, "pJ"),
            "300 W / 15.7 TFLOP/s = 19 pJ per FLOP, a bound on its efficiency from above",
        ),
        Constant(
            "update_pj",
            "one weight programmed in an update",
            Quantity(0.0177 * hardware.devices_per_weight, 1.38 * hardware.devices_per_weight, "pJ"),
            "PUMA-sim with PANTHER's constants for a 128² array, derived, for each device of a weight: low: an outer "
            "product written in parallel (290 pJ); high: a write cell by cell (22.6 nJ); other devices may need more",
        ),
        Constant("read_ns", "one read of a tile", unknown("ns"), "depends on the chip: give it in costs"),
        Constant("adc_ns", "one conversion of one converter", unknown("ns"), "depends on the chip: give it in costs"),
        Constant("dac_ns", "one conversion of one converter", unknown("ns"), "depends on the chip: give it in costs"),
        Constant(
            "digital_ns",
            "one digital multiply-accumulate or elementary operation, with all units of the digital side at work",
            Quantity(1.27e-4, 0.0621, "ns"),
            "low: a V100 at its peak of 15.7 TFLOP/s; high: the edge chip Vega at its peak of 32.2 GOPS (Rossi et al. "
            "2021, abstract); a multiply-accumulate is two of their operations, and time of memory is not in it",
        ),
        Constant(
            "converters", "converters of a core that work at once", unknown(""), "depends on the chip: give it in costs"
        ),
    ]


def _adc_constant(bits: int | None) -> Constant:
    if bits is None:
        return Constant("adc_pj", "one analog-to-digital conversion", unknown("pJ"), "no number of bits is given")
    low, high = _adc(bits), 1.56 * _adc(bits) / _adc(8)
    source = (
        "low: ZigZag's AIMC model, (100·b + 0.001·4^b) fF·V² at 1 V, 28 nm; high: ISAAC's 1.56 pJ at 8 bits (PUMA-sim)"
    )
    if bits != 8:
        source += ", scaled to the bits by the same formula"
    return Constant("adc_pj", "one analog-to-digital conversion", Quantity(low, high, "pJ"), source)
