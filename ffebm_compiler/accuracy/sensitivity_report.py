"""`Sensitivity`: the result of `ffebm.sensitivity`, to be printed, stored and drawn."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ffebm_compiler.drawing.charts import Bar, bars_svg
from ffebm_compiler.drawing.files import write_picture
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.reports.text import table_text
from ffebm_compiler.runtime.devices.devices import Devices

__all__ = ["Loss", "Sensitivity"]

_WIDTH = 80


@dataclass(frozen=True)
class Loss:
    """What one part's devices cost, measured with each draw."""

    name: str
    """A parameter's name (or the path of a layer whose weight is computed), or a block's name."""
    kind: str
    """`"weight"`, `"block"`, `"feedback"` (of a block, without devices), or `"all"`."""
    blocks: tuple[str, ...]
    macs: int
    """Multiply-accumulates per sample."""
    values: tuple[float, ...]
    """The loss of each draw, in the units of the metric. It is negative where the metric became better."""
    deviation: float | None = None
    """Mean over the draws of Σ (y − y₀)² / Σ (y₀ − ȳ₀)², with y the outputs and y₀ the source's.

    It tells parts apart whose losses are zero or noise. None where `evaluate` does not call the network itself.
    """

    @property
    def mean(self) -> float:
        """Mean over the draws."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None with one draw."""
        return statistics.stdev(self.values) / len(self.values) ** 0.5 if len(self.values) > 1 else None


@dataclass(frozen=True)
class Sensitivity:
    """The loss of every weight and every block; `print` it."""

    model: str
    hardware: str
    devices: Devices
    age: float
    draws: int
    source: float
    """The metric of the source network."""
    ideal: float
    """The metric of the hybrid in exact arithmetic."""
    total_macs: int
    losses: tuple[Loss, ...]

    def of(self, kind: str) -> tuple[Loss, ...]:
        """The losses of one kind: `"weight"`, `"block"`, `"feedback"` or `"all"`."""
        return tuple(loss for loss in self.losses if loss.kind == kind)

    @property
    def weights(self) -> dict[str, Loss]:
        """Name of a weight -> its loss, in the order of the network."""
        return {loss.name: loss for loss in self.of("weight")}

    @property
    def blocks(self) -> dict[str, Loss]:
        """Name of a block -> the loss of its devices, in the plan's order."""
        return {loss.name: loss for loss in self.of("block")}

    @property
    def feedback(self) -> dict[str, Loss]:
        """Name of a block that settles -> the loss of its feedback in exact arithmetic."""
        return {loss.name: loss for loss in self.of("feedback")}

    @property
    def everything(self) -> Loss:
        """The loss with all layers on devices."""
        return self.of("all")[0]

    def __str__(self) -> str:
        """Tables of 80 columns, the largest losses first."""
        everything = self.everything
        age = f", {self.age:g} s old" if self.age else ""
        words = (
            f"sensitivity of {self.model} on {self.hardware} (devices modelled)",
            f"devices {self.devices.name}{age}, {self.draws} draw{'s' * (self.draws > 1)}, each part alone on devices",
            f"source {self.source + 0.0:.4g}, ideal hybrid {self.ideal:.4g}, all layers on devices "
            f"{_with_error(everything)} lost",
            "± is the standard error over the draws; outputs is their deviation from the source's, relative to their "
            "variance",
        )
        lines = [line for text in words for line in textwrap.wrap(text, _WIDTH)]
        for kind, head in (("weight", "weight"), ("block", "block"), ("feedback", "feedback of")):
            found = sorted(self.of(kind), key=lambda loss: (-loss.mean, -(loss.deviation or 0.0)))
            if found:
                columns = (head, "share of MACs", "loss", "±", "outputs", "")
                lines.append(table_text("", columns, self._rows(found), _WIDTH))
        return "\n".join(lines)

    def _rows(self, losses: Sequence[Loss]) -> list[tuple[str, ...]]:
        most = max((abs(loss.mean) for loss in losses), default=0.0)
        rows: list[tuple[str, ...]] = []
        for loss in losses:
            length = round(8 * max(0.0, loss.mean) / most) if most else 0
            error = "" if loss.error is None else f"{loss.error:.2g}"
            share = f"{100 * loss.macs / self.total_macs:.1f} %" if self.total_macs else ""
            outputs = "" if loss.deviation is None else f"{loss.deviation:.2g}"
            rows.append((_shortened(loss.name), share, f"{loss.mean:+.3g}", error, outputs, "█" * length))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        losses = [{**asdict(loss), "mean": loss.mean, "error": loss.error} for loss in self.losses]
        plain = {name: getattr(self, name) for name in ("model", "hardware", "age", "draws", "source", "ideal")}
        return {"note": "devices are modelled", **plain, "devices": self.devices.to_dict(), "losses": losses}

    def to_json(self, path: str | Path) -> None:
        """Write the result; an existing file is replaced.

        Raises:
            ExportError: the file cannot be written.
        """
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def save_svg(self, path: str | Path) -> None:
        """Draw the losses as bars in the order of the network, with their standard errors, as an SVG picture.

        Raises:
            ExportError: the file cannot be written.
        """
        write_picture(self.svg(), path, ".svg")

    def svg(self) -> str:
        """The picture as text."""
        panels = {
            "loss of each weight's devices": self.of("weight"),
            "loss of each block's devices": self.of("block"),
            "loss of each block's feedback, in exact arithmetic": self.of("feedback"),
        }
        bars = {
            title: [Bar(loss.name, loss.mean, loss.error or 0.0) for loss in losses]
            for title, losses in panels.items()
            if losses
        }
        below = (
            f"{self.draws} draws of {self.devices.name} (modelled); source {self.source:.4g}, ideal hybrid "
            f"{self.ideal:.4g}, all layers on devices {_with_error(self.everything)} lost"
        )
        return bars_svg(f"Which layers matter: {self.model} on {self.hardware}", bars, below)

    def _repr_html_(self) -> str:
        return self.svg()


def _with_error(loss: Loss) -> str:
    return f"{loss.mean:.3g}" if loss.error is None else f"{loss.mean:.3g} ± {loss.error:.2g}"


def _shortened(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"…{name[-(most - 1) :]}"
