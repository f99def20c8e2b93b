"""Writing pictures to files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffebm_compiler.drawing.svg import plain, svg_text
from ffebm_compiler.errors import ExportError, InputError

if TYPE_CHECKING:
    from ffebm_compiler.plan import Plan

__all__ = ["save_html", "save_svg", "write_picture"]


def save_svg(plan: Plan, path: str | Path) -> None:
    """Draw a plan as a static SVG picture; an existing file is replaced.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the path cannot be written.
    """
    write_picture(svg_text(plan), path)


def save_html(plan: Plan, path: str | Path) -> None:
    """Draw a plan as one self-contained HTML page; an existing file is replaced.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the path cannot be written.
    """
    title = plain(f"{plan.model} on {plan.hardware.name}")
    write_picture(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head>\n'
        f"<body>{svg_text(plan)}</body></html>\n",
        path,
    )


def write_picture(content: str | bytes, path: str | Path) -> None:
    """Write a picture; an existing file is replaced.

    Raises:
        InputError: where the path is no path.
        ExportError: where it cannot be written.
    """
    if not isinstance(path, str | Path) or not str(path):
        raise InputError(f"path is {path!r}; expected the name of a file to write, e.g. 'partition.html'")
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        Path(path).write_bytes(data)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ExportError(
            f"the picture cannot be written to {path}: {reason}; give a file name in an existing folder that you may "
            "write to"
        ) from error
