"""Points with several figures as one interactive page that needs no server, no network and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ffebm_compiler.drawing.document import html_document, own_file

__all__ = ["Axis", "scatter_page"]


@dataclass(frozen=True)
class Axis:
    """A figure that an axis may show."""

    key: str
    name: str
    unit: str
    higher_is_better: bool


def scatter_page(
    title: str,
    axes: Sequence[Axis],
    records: Sequence[Mapping[str, Any]],
    lines: Mapping[str, float],
    notes: Sequence[str],
) -> str:
    """The page.

    Args:
        title: on top of it.
        axes: the first is the vertical one at the start, the second the horizontal one.
        records: for each point `choices` (name -> text), `values` and `texts` (key of an axis -> number or text),
            `error` of the first axis, and whether it is on the `front`.
        lines: key of an axis -> a value to mark, that of the source.
        notes: sentences below the picture.
    """
    data = {
        "title": title,
        "axes": [asdict(axis) for axis in axes],
        "points": list(records),
        "lines": dict(lines),
        "notes": list(notes),
    }
    fallback = "This picture needs JavaScript; print() shows its table."
    return html_document(title, data, own_file("scatter.js"), {"": own_file("scatter.css")}, fallback)
