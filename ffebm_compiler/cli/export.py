"""The work of `ffebm export`: write the export, run it, and compare it with the hybrid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.onnx import export_digital, export_whole, verify

__all__ = ["Written", "write_onnx"]


@dataclass(frozen=True)
class Written:
    """What an export wrote, and how far it is from the hybrid."""

    wrote: str
    digital_parts: int | None
    """None for a hybrid in one file."""
    tolerance: float | None
    deviations: Mapping[str, float]
    """Batch size -> largest relative deviation in onnxruntime. Empty where the export was not run."""

    def __str__(self) -> str:
        """One sentence, or two."""
        one_file = self.digital_parts is None
        what = "the whole hybrid" if one_file else f"{self.digital_parts} digital parts and manifest.json"
        lines = [f"wrote {what}, in eval mode, to {self.wrote}"]
        if self.deviations:
            lines.append(
                f"verified in onnxruntime at batch {' and '.join(self.deviations)}: largest relative deviation "
                f"{max(self.deviations.values()):.1e} (tolerance {self.tolerance:.1e})"
            )
        return "\n".join(lines)


def write_onnx(
    hybrid: HybridModel,
    out: Path,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    tolerance: float | None,
) -> Written:
    """Export to a file that ends in .onnx or a folder.

    Args:
        hybrid: the hybrid to export.
        out: the file or folder.
        args: inputs to verify with.
        kwargs: inputs to verify with, by name.
        tolerance: largest relative deviation that is accepted. With None, the export is not run.

    Raises:
        ExportError: it cannot be written, or it deviates by more than `tolerance`.
    """
    whole = out.suffix.lower() == ".onnx"
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    total = 2 + (0 if whole else len(hybrid.plan.digital_parts)) + (0 if tolerance is None else 2)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=-1)

        def progress(what: str) -> None:
            bar.update(task, advance=1, description=what)

        export = export_whole if whole else export_digital
        export(hybrid, out, progress=progress)
        found = {}
        if tolerance is not None:
            found = verify(hybrid, out, args, kwargs, tolerance=tolerance, progress=progress)
    parts = None if whole else len(hybrid.plan.digital_parts)
    return Written(str(out), parts, tolerance, {str(batch): deviation for batch, deviation in found.items()})
