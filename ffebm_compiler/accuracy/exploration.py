"""`Exploration`: the result of `ffebm.explore`, to be printed, stored and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ffebm_compiler.accuracy.journal import is_moderate
from ffebm_compiler.drawing.files import write_picture
from ffebm_compiler.drawing.scatter import Axis, scatter_page
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.checked_json import clipped
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.hardware.costs import Quantity
from ffebm_compiler.reports.text import count, table_text

_WIDTH = 120

__all__ = ["Exploration", "Point", "Refused"]


@dataclass(frozen=True)
class Point:
    """One combination, and what it is worth. Everything but `value` is modelled, per sample."""

    hardware: str
    feedback: float | str
    devices: str
    value: float
    """The metric, mean over the draws."""
    error: float | None
    """Its standard error; None with one draw."""
    energy: Quantity
    """Of one inference, in pJ, bottom-up."""
    chip_energy: Quantity
    """Of one inference, in pJ, at chip level; unknown unless the hardware is a published chip."""
    training: Quantity
    """Of the phases of one training step, in pJ, bottom-up."""
    latency: Quantity
    """Of one inference, in ns."""
    area: float
    """Crosspoints of all tiles in use."""
    tiles: int
    cores: int
    conversions: int
    analog_share: float

    @classmethod
    def of(cls, hardware: str, feedback: float | str, devices: str, found: Mapping[str, Any]) -> Point:
        """The point with the numbers of a file.

        Raises:
            InputError: a number is missing.
        """

        def number(name: str) -> float:
            value = found[name]
            if not is_moderate(value):
                raise ValueError(f"{name} is {clipped(ascii(value))}")
            return float(value)

        def known(name: str) -> float | None:
            return None if found[name] is None else number(name)

        def quantity(name: str, unit: str) -> Quantity:
            return Quantity(known(f"{name}_low"), known(f"{name}_high"), unit)

        try:
            return cls(
                hardware,
                feedback,
                devices,
                number("value"),
                known("error"),
                quantity("energy", "pJ"),
                quantity("chip_energy", "pJ"),
                quantity("training", "pJ"),
                quantity("latency", "ns"),
                number("area"),
                int(number("tiles")),
                int(number("cores")),
                int(number("conversions")),
                number("analog_share"),
            )
        except (KeyError, ValueError) as error:
            name = type(error).__name__
            raise InputError(f"a point of the exploration is damaged ({name}: {error}): delete the file") from error


@dataclass(frozen=True)
class Refused:
    """A combination that is not possible, or does not settle."""

    hardware: str
    feedback: float | str
    devices: str
    reason: str


def _middle(quantity: Quantity) -> float | None:
    return None if quantity.low is None or quantity.high is None else (quantity.low + quantity.high) / 2


_COSTS: dict[str, Callable[[Point], float | None]] = {
    "energy at chip level": lambda point: _middle(point.chip_energy),
    "energy": lambda point: _middle(point.energy),
    "latency": lambda point: _middle(point.latency),
    "area": lambda point: point.area,
}


@dataclass(frozen=True)
class Exploration:
    """Every combination that was explored; `print` it, or `save_html` it."""

    model: str
    source: float
    """The metric of the source network."""
    higher_is_better: bool
    points: tuple[Point, ...]
    refused: tuple[Refused, ...]

    @property
    def objectives(self) -> tuple[str, ...]:
        """What the Pareto front weighs beside the metric: those of energy, latency and area that all points know.

        Energy counts at chip level if all points know it, else bottom-up: the two do not compare.
        """
        known = [name for name, of in _COSTS.items() if all(of(point) is not None for point in self.points)]
        return tuple(name for name in known if not (name == "energy" and "energy at chip level" in known))

    @property
    def front(self) -> tuple[Point, ...]:
        """The Pareto front: points that no other point equals or beats in everything, and beats in something.

        Energy and latency count by the middle of their ranges.
        """
        sign = 1.0 if self.higher_is_better else -1.0
        known = self.objectives

        def costs(point: Point) -> tuple[float, ...]:
            return (-sign * point.value, *(float(_COSTS[name](point) or 0.0) for name in known))

        found = {id(point): costs(point) for point in self.points}

        def beaten(point: Point) -> bool:
            mine = found[id(point)]
            return any(
                other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in found.values()
            )

        return tuple(point for point in self.points if not beaten(point))

    def __str__(self) -> str:
        """A table, the best metric first; a star marks the Pareto front."""
        front = {id(point) for point in self.front}
        ordered = sorted(self.points, key=lambda point: -point.value if self.higher_is_better else point.value)
        chips = any(point.chip_energy.known for point in ordered)
        rows = [
            (
                f"{'*' if id(point) in front else ' '} {point.hardware}",
                str(point.feedback),
                point.devices,
                f"{point.value:.3g}" + ("" if point.error is None else f" ± {point.error:.1g}"),
                str(point.energy),
                *([str(point.chip_energy)] if chips else []),
                str(point.latency),
                count(point.area),
            )
            for point in ordered
        ]
        chip = ("chip level",) if chips else ()
        columns = ("  hardware", "κ", "devices", "metric", "energy", *chip, "latency", "area")
        weighed = " and ".join(("the metric", *self.objectives))
        lines = [
            f"exploration of {self.model}: {len(self.points)} combinations, source {self.source:.4g}",
            "energy and latency of one inference are modelled, area counts crosspoints",
            "energy is bottom-up, which is too low, and at chip level where the hardware is a published chip",
            f"* is the Pareto front of {weighed}",
            table_text("", columns, rows, _WIDTH) if rows else "no combination is possible",
        ]
        lines += [f"not possible: {r.hardware}, κ {r.feedback}, devices {r.devices}: {r.reason}" for r in self.refused]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        front = {id(point) for point in self.front}
        points = [{**asdict(point), "front": id(point) in front} for point in self.points]
        return {
            "note": "energy, latency and area are modelled, per sample",
            "model": self.model,
            "source": self.source,
            "higher_is_better": self.higher_is_better,
            "points": points,
            "refused": [asdict(each) for each in self.refused],
        }

    def to_json(self, path: str | Path) -> None:
        """Write the result; an existing file is replaced.

        Raises:
            ExportError: the file cannot be written.
        """
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def save_html(self, path: str | Path) -> None:
        """Draw the points as one self-contained, interactive page; an existing file is replaced.

        Any two figures are its axes, choices can be hidden, and the table beside it can be sorted.

        Raises:
            InputError: there is no point.
            ExportError: the file cannot be written.
        """
        write_picture(self.html(), path, ".html", ".htm")

    def html(self) -> str:
        """The page as text.

        Raises:
            InputError: there is no point.
        """
        if not self.points:
            raise InputError("no combination of the exploration is possible, so that there is nothing to draw")
        front = {id(point) for point in self.front}
        axes = [
            Axis("value", "metric", "", self.higher_is_better),
            Axis("energy", "energy of an inference", "pJ", False),
            Axis("chip", "energy at chip level", "pJ", False),
            Axis("training", "energy of a training step", "pJ", False),
            Axis("latency", "latency of an inference", "ns", False),
            Axis("area", "area", "crosspoints", False),
            Axis("conversions", "conversions", "", False),
        ]
        records: list[dict[str, Any]] = []
        for point in self.points:
            energy, training, latency = map(_middle, (point.energy, point.training, point.latency))
            chip_energy = _middle(point.chip_energy)
            records.append(
                {
                    "choices": {
                        "hardware": point.hardware,
                        "loop gain": str(point.feedback),
                        "devices": point.devices,
                    },
                    "values": {
                        "value": point.value,
                        "energy": energy,
                        "chip": chip_energy,
                        "training": training,
                        "latency": latency,
                        "area": point.area,
                        "conversions": point.conversions,
                    },
                    "texts": {
                        "value": f"{point.value:.4g}" + ("" if point.error is None else f" ± {point.error:.1g}"),
                        "energy": str(point.energy),
                        "chip": str(point.chip_energy),
                        "training": str(point.training),
                        "latency": str(point.latency),
                        "area": count(point.area),
                        "conversions": count(point.conversions),
                    },
                    "error": point.error,
                    "front": id(point) in front,
                }
            )
        known = [axis for axis in axes if any(record["values"][axis.key] is not None for record in records)]
        weighed = ", ".join(("the metric", *self.objectives))
        notes = [
            "Energy, latency and area are modelled, per sample; dots are middles of ranges.",
            "Energies are bottom-up, which is too low, and at chip level for published chips.",
            f"The line joins the Pareto front of {weighed}.",
            *(f"Not possible: {r.hardware}, κ {r.feedback}, {r.devices}: {r.reason}" for r in self.refused),
        ]
        return scatter_page(f"Exploration of {self.model}", known, records, {"value": self.source}, notes)

    def _repr_html_(self) -> str:
        import html

        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe sandbox="allow-scripts" srcdoc="{page}" title="exploration" '
            'style="width:100%;height:560px;border:1px solid #ccc"></iframe>'
        )
