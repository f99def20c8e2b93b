"""Pictures as files and in notebooks."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ffebm_compiler.drawing.differences import differences_of
from ffebm_compiler.drawing.overlay import Overlay, check_kind, loop_gain_overlay, relaxation_overlay
from ffebm_compiler.drawing.page import page_text
from ffebm_compiler.drawing.record import record_of
from ffebm_compiler.drawing.svg import svg_text
from ffebm_compiler.errors import InputError
from ffebm_compiler.files.whole_files import write_whole
from ffebm_compiler.reports.checks import GradientReport
from ffebm_compiler.reports.diagnosis import Diagnosis

if TYPE_CHECKING:
    from ffebm_compiler.drawing.measurements import GainPoint
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData

__all__ = ["html_text", "notebook_html", "save_html", "save_side_by_side", "save_svg", "write_picture"]


def save_svg(plan: PlanData, path: str | Path, hybrid: HybridCore | None = None) -> None:
    """Draw a plan as a static SVG picture; an existing file is replaced. `hybrid` adds its feedback weights.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the path cannot be written.
    """
    write_picture(svg_text(plan, hybrid), path, ".svg")


def html_text(
    plan: PlanData,
    hybrid: HybridCore | None = None,
    overlays: Sequence[Overlay] = (),
    diagnosis: Diagnosis | None = None,
    what_if: bool = False,
    source: str = "",
    gradients: GradientReport | None = None,
    loop_gains: Sequence[GainPoint] = (),
) -> str:
    """The interactive page of a plan.

    `hybrid` adds loop gains and sweeps, `diagnosis` (of `hybrid.diagnose(x)`) how each block settles,
    `what_if` the plan under other options, `source` the file or the name that the head names as the plan's origin,
    `gradients` (of `check_gradients`) a mark on each block, `loop_gains` (of `loop_gain_points`) a slider.

    Raises:
        InputError: where the diagnosis is of another plan, or a measurement is none.
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the layout library is missing.
    """
    if gradients is not None:
        check_kind("gradients", gradients, GradientReport, "ffebm.check_gradients(hybrid, inputs, loss_fn)")
    if diagnosis is not None:
        check_kind("diagnosis", diagnosis, Diagnosis, "hybrid.diagnose(x)")
    shown = [loop_gain_overlay(hybrid)] if hybrid is not None and plan.blocks else []
    if diagnosis is not None and plan.blocks:
        shown.append(relaxation_overlay(plan, diagnosis))
    record = record_of(plan, hybrid, [*shown, *overlays], diagnosis, what_if, source, gradients, loop_gains)
    return page_text([record], f"{plan.model} on {plan.hardware.name}")


def save_html(
    plan: PlanData,
    path: str | Path,
    hybrid: HybridCore | None = None,
    overlays: Sequence[Overlay] = (),
    diagnosis: Diagnosis | None = None,
    what_if: bool = False,
    source: str = "",
    gradients: GradientReport | None = None,
    loop_gains: Sequence[GainPoint] = (),
) -> None:
    """Write the interactive page, one self-contained file; an existing file is replaced.

    Raises:
        InputError: where the diagnosis is of another plan.
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the path cannot be written or the layout library is missing.
    """
    page = html_text(plan, hybrid, overlays, diagnosis, what_if, source, gradients, loop_gains)
    write_picture(page, path, *_PAGES)


def save_side_by_side(
    first: PlanData, second: PlanData, path: str | Path, titles: tuple[str, str] | None = None
) -> None:
    """Write two plans beside each other in one page, e.g. for two kinds of hardware; an existing file is replaced.

    Blocks that the other plan lacks are marked, and a report *differences* lists them. `titles` stand above the plans,
    e.g. ("before", "after").

    Raises:
        PlanError: where a plan has no operation or is cyclic.
        ExportError: where the path cannot be written or the layout library is missing.
    """
    records = [record_of(first), record_of(second)]
    beside = differences_of(first, second)
    beside["names"] = titles or ("the first", "the second")
    for record, alone in zip(records, beside["blocks"], strict=True):
        record["beside"] = beside
        for home in record["homes"]:
            home["differs"] = home["title"] in alone
    for record, title in zip(records, titles or (), strict=False):
        record["title"] = f"{title}: {record['title']}"
    write_picture(page_text(records, " and ".join(record["title"] for record in records)), path, *_PAGES)


def notebook_html(plan: PlanData, hybrid: HybridCore | None = None, height: int = 620) -> str:
    """The interactive page inside a sandboxed frame, which cannot reach the notebook around it.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the layout library is missing.
    """
    page = html.escape(html_text(plan, hybrid), quote=True)
    return (
        f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{page}" title="partition of the network" '
        f'style="width:100%;height:{height}px;border:1px solid #ccc" loading="lazy"></iframe>'
    )


_SUFFIXES = (".html", ".htm", ".svg", ".png", ".pdf", ".dot", ".jpg", ".jpeg", ".gif", ".json")
"""Suffixes by which programs choose how to open a file."""
_PAGES = (".html", ".htm")


def write_picture(content: str | bytes, path: str | Path, *suffixes: str) -> None:
    """Write a picture; an existing file is replaced, or left as it is where that fails.

    Args:
        content: the file's content.
        path: the file.
        suffixes: those that such files have. A name with the suffix of another format is refused; without any, none is.

    Raises:
        InputError: where the path is no path, or its suffix is that of another format.
        ExportError: where it cannot be written.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise InputError(f"path is {path!r}; expected the name of a file to write, e.g. 'partition.html'")
    suffix = Path(path).suffix.lower()
    if suffix in _SUFFIXES and suffixes and suffix not in suffixes:
        raise InputError(
            f"path is {str(path)!r}; expected a name that ends in {suffixes[0]}, which is what is written (save_html "
            "writes pages, save_svg SVG, save_image PNG and PDF)"
        )
    write_whole(path, content, failure="the picture cannot be written")
