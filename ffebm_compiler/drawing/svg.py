"""A plan as one static SVG picture, for papers, reports and notebooks.

It is plain SVG 1.1 with presentation attributes only, without a script, a style sheet or a font that a
viewer must have. Analog and digital differ by colour and by shape. Blue and orange differ for every kind
of colour vision. Energy blocks are rounded with a double outline, digital parts are square.
"""

from __future__ import annotations

import html
import re
import unicodedata
from itertools import pairwise
from typing import TYPE_CHECKING

from ffebm_compiler.drawing.layout import Layout, Route, layered
from ffebm_compiler.drawing.scene import Edge, Line, Node, Scene, scene_of

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData

__all__ = ["COLOURS", "plain", "svg_text"]

COLOURS = {
    "analog": ("#ddeefb", "#0066a1"),
    "digital": ("#fdf0d5", "#8a5200"),
    "input": ("#f1f1f1", "#6b6b6b"),
    "output": ("#f1f1f1", "#6b6b6b"),
}
"""Fill and outline of each domain. Blue and orange differ for every kind of colour vision."""

_INK, _QUIET, _WARN, _EDGE = "#1b1b1b", "#555555", "#a33b00", "#7a7a7a"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
_SIZE, _SMALL, _ROW = 12.0, 11.0, 16.0
_MARGIN, _WRAP, _MOST_LETTERS = 24.0, 96, 58
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """Text as inert XML: escaped, without characters that XML forbids and without changes of text direction."""
    return html.escape(_UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text), quote=True)


def text_width(text: str, size: float) -> float:
    """Width of a text in pixels, estimated from above for common sans-serif fonts."""
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    narrow = sum(letter in "iljtf.,:;'|!()[] " for letter in text)
    return size * (1.05 * wide + 0.36 * narrow + 0.62 * (len(text) - wide - narrow))


def shorten(text: str, most: int = _MOST_LETTERS) -> str:
    """A long text with an ellipsis in its middle."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2 - 1]}…{text[len(text) - (most - most // 2) :]}"


def svg_text(plan: PlanData, hybrid: HybridCore | None = None) -> str:
    """The partition of a plan as the text of an SVG picture; `hybrid` adds its feedback weights.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
    """
    scene = scene_of(plan, hybrid)
    sizes = {node.key: _node_size(node) for node in scene.nodes}
    labels = {(edge.source, edge.target): _label_size(edge) for edge in scene.edges}
    layout = layered(sizes, labels)
    head, head_width, head_height = _header(scene)
    foot, foot_width, foot_height = _footer(scene)
    width = max(layout.width, head_width, foot_width) + 2 * _MARGIN
    height = head_height + layout.height + foot_height + 4 * _MARGIN
    left, top = (width - layout.width) / 2, head_height + 2 * _MARGIN
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="{_FONT}" font-size="{_SIZE:g}" role="img">',
        f"<title>{plain(scene.title)}: {plain(scene.totals)}</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<g transform="translate({_MARGIN:.1f},{_MARGIN:.1f})">{head}</g>',
        f'<g transform="translate({left:.1f},{top:.1f})">',
        *(_edge_path(layout.routes[edge.source, edge.target], edge) for edge in scene.edges),
        *(_edge_label(layout.routes[edge.source, edge.target], edge) for edge in scene.edges),
        *(_node(node, layout, sizes[node.key]) for node in scene.nodes),
        "</g>",
        f'<g transform="translate({_MARGIN:.1f},{top + layout.height + _MARGIN:.1f})">{foot}</g>',
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _text(
    x: float, y: float, text: str, size: float, fill: str = _INK, anchor: str = "middle", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"{weight}>'
        f"{plain(text)}</text>"
    )


def _node_size(node: Node) -> tuple[float, float]:
    widths = [text_width(shorten(line.text), _SMALL) for line in node.lines]
    widths.append(text_width(shorten(_headline(node)), _SIZE) * 1.08 + (92.0 if node.circuit else 0.0))
    return max(widths) + 28.0, 14.0 + _ROW * (1 + len(node.lines))


def _headline(node: Node) -> str:
    if node.domain == "analog" and not node.settles:
        return f"{node.title} · analog, no feedback"
    return {"analog": f"∿ {node.title} · analog", "digital": f"{node.title} · digital"}.get(node.domain, node.title)


def _label_lines(edge: Edge) -> list[str]:
    return [line for line in (edge.shape, edge.conversion) if line]


def _label_size(edge: Edge) -> tuple[float, float]:
    lines = _label_lines(edge)
    return max(text_width(line, 10.0) for line in lines) + 8.0, 13.0 * len(lines) + 2.0


def _node(node: Node, layout: Layout, size: tuple[float, float]) -> str:
    (x, y), (width, height) = layout.centres[node.key], size
    left, top = x - width / 2, y - height / 2
    parts = [
        f'<g class="{node.domain}"><title>{plain(node.tooltip)}</title>',
        _outline(node.domain, left, top, width, height, node.settles),
    ]
    parts.append(_text(x, top + 19.0, shorten(_headline(node)), _SIZE, COLOURS[node.domain][1], bold=True))
    if node.circuit:
        parts += [_resistor(end, top + 15.0, COLOURS[node.domain][1]) for end in (left + 14.0, left + width - 48.0)]
    for index, line in enumerate(node.lines):
        parts.append(_line(line, x, top + 19.0 + _ROW * (index + 1)))
    return "".join(parts) + "</g>"


def _resistor(x: float, y: float, colour: str) -> str:
    """The symbol of a resistor, 34 pixels long, from its left end."""
    zigzag = "".join(f"L{x + 8 + 3 * k:.1f},{y + (-4 if k % 2 else 4):.1f}" for k in range(1, 6))
    path = f"M{x:.1f},{y:.1f}L{x + 8:.1f},{y:.1f}{zigzag}L{x + 26:.1f},{y:.1f}L{x + 34:.1f},{y:.1f}"
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.4"/>'


def _line(line: Line, x: float, y: float) -> str:
    fill = {"plain": _INK, "quiet": _QUIET, "warn": _WARN}[line.style]
    return _text(x, y, shorten(line.text), _SMALL, fill, bold=line.style == "warn")


def _outline(domain: str, left: float, top: float, width: float, height: float, settles: bool = False) -> str:
    fill, stroke = COLOURS[domain]
    radius = {"analog": min(16.0, height / 2.5), "digital": 0.0}.get(domain, height / 2)

    def box(inset: float, paint: str, line: float) -> str:
        return (
            f'<rect x="{left + inset:.1f}" y="{top + inset:.1f}" width="{width - 2 * inset:.1f}" '
            f'height="{height - 2 * inset:.1f}" rx="{max(radius - inset, 0.0):.1f}" fill="{paint}" stroke="{stroke}" '
            f'stroke-width="{line:g}"/>'
        )

    return box(0.0, fill, 2.0) + box(3.5, "none", 0.8) if settles else box(0.0, fill, 1.4)


def _edge_path(route: Route, edge: Edge) -> str:
    points = route.points
    steps = [f"M{points[0][0]:.1f},{points[0][1]:.1f}"]
    for index, ((x, y), (u, v)) in enumerate(pairwise(points)):
        last = index == len(points) - 2
        end = v - 5.0 if last else v
        middle = (y + end) / 2
        straight = abs(x - u) < 0.5
        steps.append(
            f"L{u:.1f},{end:.1f}" if straight else f"C{x:.1f},{middle:.1f} {u:.1f},{middle:.1f} {u:.1f},{end:.1f}"
        )
    x, y = points[-1]
    dash = "" if edge.conversion else ' stroke-dasharray="5 3"'
    return (
        f'<path d="{"".join(steps)}" fill="none" stroke="{_EDGE}" stroke-width="1.4"{dash}/>'
        f'<path d="M{x:.1f},{y:.1f}l-4,-7h8z" fill="{_EDGE}"/>'
    )


def _edge_label(route: Route, edge: Edge) -> str:
    lines = _label_lines(edge)
    (x, y), (width, height) = route.label, _label_size(edge)
    left, top = x - width / 2, y - height / 2
    box = f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#ffffff"/>'
    first = top + 11.0
    return box + "".join(
        _text(x, first + 13.0 * i, line, 10.0, _QUIET if i == 0 else _INK) for i, line in enumerate(lines)
    )


def _header(scene: Scene) -> tuple[str, float, float]:
    title, totals = shorten(scene.title, 90), scene.totals
    drawn = _text(0, 16, title, 17.0, anchor="start", bold=True) + _text(0, 38, totals, 12.5, _QUIET, "start")
    return drawn, max(text_width(title, 17.0) * 1.08, text_width(totals, 12.5)), 44.0


def _footer(scene: Scene) -> tuple[str, float, float]:
    """The legend, the layers that stayed digital, and the notes."""
    parts = [
        _outline("analog", 0.0, 0.0, 34.0, 18.0, settles=True),
        _text(42.0, 13.0, "energy block: analog, settles to an equilibrium", _SMALL, anchor="start"),
        _outline("analog", 0.0, 26.0, 34.0, 18.0),
        _text(42.0, 39.0, "energy block without feedback: analog, exactly the source's", _SMALL, anchor="start"),
        _outline("digital", 0.0, 52.0, 34.0, 18.0),
        _text(42.0, 65.0, "digital part: runs forward", _SMALL, anchor="start"),
        f'<path d="M0,87h34" fill="none" stroke="{_EDGE}" stroke-width="1.4"/>',
        _text(42.0, 91.0, "crosses a converter: DAC and ADC values per sample", _SMALL, anchor="start"),
        f'<path d="M0,107h34" fill="none" stroke="{_EDGE}" stroke-width="1.4" stroke-dasharray="5 3"/>',
        _text(42.0, 111.0, "stays digital", _SMALL, anchor="start"),
    ]
    y = 134.0
    if any(node.circuit for node in scene.nodes):
        words = "settles as a circuit: its nodes are states, and its conductances weights"
        parts += [_resistor(0.0, 127.0, COLOURS["analog"][1]), _text(42.0, 131.0, words, _SMALL, anchor="start")]
        y += 20.0
    rows = [(f"stayed digital: {path}: {reason}", _WARN) for path, reason in scene.rejected[:10]]
    if len(scene.rejected) > 10:
        rows.append((f"and {len(scene.rejected) - 10} more layers stayed digital", _WARN))
    rows += [(f"note: {note}", _QUIET) for note in scene.notes]
    width = 360.0
    for row, fill in rows:
        for piece in _wrapped(row):
            parts.append(_text(0.0, y, piece, _SMALL, fill, "start"))
            width = max(width, text_width(piece, _SMALL))
            y += _ROW
    return "".join(parts), width, y - _ROW


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WRAP) or [text]
