"""One function for all formats of a picture, chosen by the suffix of its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ffebm_compiler.drawing.exchange import dot_text
from ffebm_compiler.drawing.files import save_html, save_svg, write_picture
from ffebm_compiler.drawing.raster import save_image
from ffebm_compiler.errors import InputError

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData

__all__ = ["check_format", "save_picture"]

_FORMATS = {
    ".html": "an interactive page",
    ".svg": "a vector picture",
    ".png": "an image",
    ".pdf": "a vector picture for papers",
    ".dot": "Graphviz's language",
}


def check_format(path: str | Path) -> str:
    """The suffix of a picture's file, in small letters.

    Raises:
        InputError: for one that no picture has.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join(f"{name} ({what})" for name, what in _FORMATS.items())
        raise InputError(f"the picture is to be written to {str(path)!r}; expected a file that ends in {known}")
    return suffix


def save_picture(
    plan: PlanData, path: str | Path, hybrid: HybridCore | None = None, what_if: bool = False, source: str = ""
) -> None:
    """Draw a plan in the format of the path's suffix; an existing file is replaced.

    `hybrid` adds its feedback weights, and loop gains and sweeps to an HTML page. `what_if` adds other options to one,
    and `source` says in its head where the plan comes from.

    Raises:
        InputError: for an unknown suffix.
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where the path cannot be written, or an optional package is missing.
    """
    suffix = check_format(path)
    if suffix == ".html":
        save_html(plan, path, hybrid, what_if=what_if, source=source)
    elif suffix == ".svg":
        save_svg(plan, path, hybrid)
    elif suffix == ".dot":
        write_picture(dot_text(plan, hybrid), path)
    else:
        save_image(plan, path, hybrid=hybrid)
