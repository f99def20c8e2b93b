"""Bars with their errors as one static SVG picture, in the style of the partition's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ffebm_compiler.drawing.svg import COLOURS, plain, shorten, text_width

__all__ = ["Bar", "bars_svg"]

_INK, _QUIET, _LINE = "#1b1b1b", "#555555", "#b5b5b5"
_FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Helvetica, Arial, sans-serif"
_MARGIN, _ROW, _WIDE = 24.0, 18.0, 420.0


@dataclass(frozen=True)
class Bar:
    """A value with its standard error."""

    name: str
    value: float
    error: float = 0.0


def bars_svg(title: str, panels: Mapping[str, Sequence[Bar]], below: str) -> str:
    """A panel of horizontal bars for each title. All panels have one scale.

    Args:
        title: above the picture.
        panels: title of a panel -> its bars, from top to bottom.
        below: a sentence below the picture.
    """
    bars = [bar for panel in panels.values() for bar in panel]
    low = min(0.0, *(bar.value - bar.error for bar in bars)) if bars else 0.0
    high = max(0.0, *(bar.value + bar.error for bar in bars)) if bars else 0.0
    scale = _WIDE / ((high - low) or 1.0)
    names = max((text_width(shorten(bar.name, 44), 11.0) for bar in bars), default=60.0)
    left = _MARGIN + names + 10.0
    zero = left - low * scale
    rows = [
        _text(_MARGIN, 34.0, title, 16.0, bold=True),
    ]
    y = 58.0
    for name, panel in panels.items():
        rows.append(_text(_MARGIN, y + 4.0, name, 12.5, bold=True))
        y += 14.0
        top = y
        for bar in panel:
            rows += _bar(bar, left, zero, scale, y)
            y += _ROW
        rows.append(f'<path d="M{zero:.1f},{top:.1f}V{y:.1f}" stroke="{_INK}" stroke-width="1"/>')
        y += 24.0
    rows.append(_text(_MARGIN, y, below, 11.0, _QUIET))
    width = max(left + _WIDE + 90.0, text_width(below, 11.0) + 2 * _MARGIN, text_width(title, 16.0) + 2 * _MARGIN)
    height = y + _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" font-family="{_FONT}" role="img">',
            f"<title>{plain(title)}</title>",
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            *rows,
            "</svg>",
            "",
        ]
    )


def _bar(bar: Bar, left: float, zero: float, scale: float, y: float) -> list[str]:
    fill, stroke = COLOURS["digital" if bar.value > 0 else "analog"]
    start, end = sorted((zero, zero + bar.value * scale))
    middle = y + _ROW / 2
    low, high = (zero + (bar.value + sign * bar.error) * scale for sign in (-1, 1))
    spread = f" ± {bar.error:.2g}" if bar.error else ""
    said = f"{bar.value:.3g}{spread}"
    rows = [
        f"<g><title>{plain(f'{bar.name}: {said}')}</title>",
        _text(left - 8.0, middle + 4.0, shorten(bar.name, 44), 11.0, anchor="end"),
        f'<path d="M{left:.1f},{y + _ROW:.1f}h{_WIDE:.1f}" stroke="{_LINE}" stroke-width="0.4"/>',
        f'<rect x="{start:.1f}" y="{y + 3:.1f}" width="{end - start:.1f}" height="{_ROW - 6:.1f}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="1"/>',
    ]
    if bar.error:
        rows.append(
            f'<path d="M{low:.1f},{middle:.1f}H{high:.1f}M{low:.1f},{middle - 3:.1f}v6M{high:.1f},{middle - 3:.1f}v6" '
            f'stroke="{_INK}" stroke-width="1" fill="none"/>'
        )
    rows.append(_text(max(end, high) + 6.0, middle + 4.0, said, 10.0, _QUIET))
    return [*rows, "</g>"]


def _text(
    x: float, y: float, text: str, size: float, fill: str = _INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}"{weight}>'
        f"{plain(text)}</text>"
    )
