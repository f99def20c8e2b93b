"""The static picture as PNG or PDF, drawn by matplotlib, without system programs or fonts to install.

`svg_text` writes few kinds of elements, and this module draws exactly those: rectangles, paths of
lines and cubic curves, texts, and groups that are moved. matplotlib is the optional dependency
`ffebm-compiler[plots]` and brings its own font. cairosvg would need the system's cairo, and resvg-py the
system's fonts.
"""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from ffebm_compiler.drawing.files import write_picture
from ffebm_compiler.drawing.svg import svg_text
from ffebm_compiler.errors import ExportError, InputError

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData

__all__ = ["figure_class", "save_image"]

_FORMATS = ("png", "pdf")
_POINTS = 0.75
"""Points per pixel of the picture (1/96 inch)."""
_MOST_PIXELS = 2**16 - 1
_STEP = re.compile(r"([MLClhz])([^MLClhz]*)")


def save_image(plan: PlanData, path: str | Path, dpi: float = 192.0, hybrid: HybridCore | None = None) -> None:
    """Draw a plan as a PNG or PDF picture, by the path's suffix; an existing file is replaced.

    `hybrid` adds its feedback weights. A PNG that would be higher than 65535 pixels gets fewer dots per inch.

    Raises:
        InputError: for another suffix, or `dpi` that is not positive.
        PlanError: where the plan has no operation or is cyclic.
        ExportError: where matplotlib is missing or the path cannot be written.
    """
    kind = Path(path).suffix.lower().lstrip(".") if isinstance(path, str | Path) else ""
    if kind not in _FORMATS:
        raise InputError(f"path is {path!r}; expected a file name that ends in .png or .pdf (save_svg writes SVG)")
    if not dpi > 0:
        raise InputError(f"dpi is {dpi!r}; expected a positive number of dots per inch, e.g. 192")
    root = ElementTree.fromstring(svg_text(plan, hybrid))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    figure = figure_class()(figsize=(width / 96, height / 96))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    _draw(axes, root, 0.0, 0.0)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # matplotlib draws boxes for letters that its font lacks, and would warn of each.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format=kind, dpi=min(dpi, 96 * _MOST_PIXELS / max(width, height)))
    write_picture(buffer.getvalue(), path)


def figure_class() -> Any:
    """matplotlib's `Figure`, which needs no window and no global state.

    Raises:
        ExportError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ExportError("PNG, PDF and plots need matplotlib: pip install 'ffebm-compiler[plots]'") from error
    return Figure


def _draw(axes: Any, group: ElementTree.Element, x: float, y: float) -> None:
    for element in group:
        kind, attributes = element.tag.rpartition("}")[2], element.attrib
        if kind == "g":
            move = re.fullmatch(r"translate\(([-\d.]+),([-\d.]+)\)", attributes.get("transform", "translate(0,0)"))
            assert move is not None
            _draw(axes, element, x + float(move[1]), y + float(move[2]))
        elif kind == "rect":
            _rectangle(axes, attributes, x, y)
        elif kind == "path":
            _path(axes, attributes, x, y)
        elif kind == "text":
            axes.text(
                x + float(attributes["x"]),
                y + float(attributes["y"]),
                element.text or "",
                fontsize=float(attributes["font-size"]) * _POINTS,
                color=attributes["fill"],
                ha={"middle": "center", "start": "left"}[attributes["text-anchor"]],
                va="baseline",
                fontweight="bold" if "font-weight" in attributes else "normal",
                family="DejaVu Sans",
                parse_math=False,
            )


def _paint(attributes: dict[str, str]) -> dict[str, Any]:
    dashes = [float(length) * _POINTS for length in attributes.get("stroke-dasharray", "").split()]
    width = float(attributes.get("stroke-width", 0)) * _POINTS
    return {
        "facecolor": attributes["fill"],
        "edgecolor": attributes.get("stroke", "none"),
        "linewidth": width,
        "linestyle": (0, tuple(length / width for length in dashes)) if dashes else "solid",
    }


def _rectangle(axes: Any, attributes: dict[str, str], x: float, y: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, top = x + float(attributes.get("x", 0)), y + float(attributes.get("y", 0))
    width, height = float(attributes["width"]), float(attributes["height"])
    radius = min(float(attributes.get("rx", 0)), width / 2, height / 2)
    style = f"round,pad=0,rounding_size={radius}" if radius else "square,pad=0"
    axes.add_patch(FancyBboxPatch((left, top), width, height, boxstyle=style, **_paint(attributes)))


def _path(axes: Any, attributes: dict[str, str], x: float, y: float) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    points: list[tuple[float, float]] = []
    codes: list[int] = []
    for letter, numbers in _STEP.findall(attributes["d"]):
        values = [float(number) for number in re.findall(r"-?[\d.]+", numbers)]
        if letter in "MLC":
            code = {"M": Curve.MOVETO, "L": Curve.LINETO, "C": Curve.CURVE4}[letter]
            points += [(x + u, y + v) for u, v in zip(values[::2], values[1::2], strict=True)]
            codes += [int(code)] * (len(values) // 2)
        else:
            dx, dy = (*values, 0.0, 0.0)[:2]
            points.append((points[-1][0] + dx, points[-1][1] + dy))
            codes.append(int(Curve.CLOSEPOLY if letter == "z" else Curve.LINETO))
    axes.add_patch(PathPatch(Curve(points, codes), **_paint(attributes)))
