"""The interactive picture: one HTML page that needs no server, no network and no other file.

The layout is dagre's, in the edition that netron ships in its wheel (9.3: MIT, pure Python, no
dependencies, 105 kB of readable JavaScript). Of the packages that pip installs, it is the only one
with a layered layout, a permissive licence and a maintainer (looked at in November 2026). pyvis and
gravis ship vis-network, which lays out no compound graph and draws on a canvas without keyboard or
SVG; they were last released in 2023 and 2021. plotly has no layered layout, and the elk family is not
permissive. The library is read from the installed package when the page is written. Panning,
zooming by scrolling, focus and folding are the browser's own.

Every name of a model reaches the page inside a JSON block, in which `<`, `>` and `&` are
escaped, and is shown as a text node. A content security policy allows only the page's own script,
by its hash, and no network.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffebm_compiler.drawing.document import html_document, own_file
from ffebm_compiler.errors import ExportError

__all__ = ["page_text"]

_SCRIPTS = (
    "page_tree.js",
    "page_stages.js",
    "page_wires.js",
    "page_picture.js",
    "page_curves.js",
    "page_export.js",
    "page_budget.js",
    "page_floor.js",
    "page_measured.js",
    "page_flows.js",
    "page_panel.js",
    "page_minimap.js",
    "page_app.js",
)

_NOTICE = """\
/* Layout: dagre (https://github.com/dagrejs/dagre), Copyright (c) 2012-2014 Chris Pettitt, in the edition of
netron (https://github.com/lutzroeder/netron), Copyright (c) Lutz Roeder. Both under the MIT License:

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions: The above copyright notice and
this permission notice shall be included in all copies or substantial portions of the Software. THE SOFTWARE IS PROVIDED
"AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF
MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE,
ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE. */
"""


def page_text(records: Sequence[Mapping[str, Any]], title: str) -> str:
    """The page for one record, or for several side by side.

    Raises:
        ExportError: where the installed netron does not have the layout library.
    """
    script = _layout_library() + "\n" + "\n".join(own_file(name) for name in _SCRIPTS)
    styles = {
        "colours": own_file("page_colours.css"),
        "picture": own_file("page_picture.css"),
        "": own_file("page.css"),
    }
    fallback = "This picture needs JavaScript; save_svg() writes one that does not."
    return html_document(title, list(records), script, styles, fallback)


def _layout_library() -> str:
    """The text of dagre from the installed netron, an ES module that exports `layout`. netron is not imported."""
    found = importlib.util.find_spec("netron")
    folders = list(found.submodule_search_locations or ()) if found is not None else []
    file = Path(folders[0]) / "dagre.js" if folders else None
    if file is None or not file.is_file():
        raise ExportError(
            "the interactive picture takes its layout from the package netron, which is not installed or lacks "
            "dagre.js: pip install 'netron>=8.4,<10', or use save_svg()"
        )
    source = file.read_text(encoding="utf-8")
    if not re.search(r"^export const \{[^}]*\blayout\b", source, re.MULTILINE) or re.search(
        "</script", source, re.IGNORECASE
    ):
        raise ExportError(
            f"{file} does not export the function `layout`, so this version of netron cannot be used: pip install "
            "'netron>=8.4,<10', or use save_svg()"
        )
    return _NOTICE + source
