"""The work of `ffebm export`: write the export, run it, and compare it with the hybrid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ffebm_compiler.hybrid import HybridModel
from ffebm_compiler.onnx import export_digital, export_whole, verify

__all__ = ["write_onnx"]


def write_onnx(
    hybrid: HybridModel,
    out: Path,
    args: Sequence[Tensor],
    kwargs: Mapping[str, Tensor],
    tolerance: float | None,
) -> list[str]:
    """Export to a file that ends in .onnx or a folder; returns what to print.

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
        what = "the whole hybrid" if whole else f"{len(hybrid.plan.digital_parts)} digital parts and manifest.json"
        lines = [f"wrote {what}, in eval mode, to {out}"]
        if tolerance is not None:
            found = verify(hybrid, out, args, kwargs, tolerance=tolerance, progress=progress)
            sizes = " and ".join(map(str, found))
            lines.append(
                f"verified in onnxruntime at batch {sizes}: largest relative deviation {max(found.values()):.1e} "
                f"(tolerance {tolerance:.1e})"
            )
    return lines
