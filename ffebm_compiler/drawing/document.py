"""A self-contained HTML page with one script, which reads its data from a JSON block.

Every name of a model reaches the page inside that block, in which `<`, `>` and `&` are escaped. A content security
policy allows only the page's own script, by its hash, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ffebm_compiler.drawing.svg import plain

__all__ = ["html_document", "own_file"]

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_HIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]")


def html_document(title: str, data: Any, script: str, styles: Mapping[str, str], fallback: str) -> str:
    """The page.

    Args:
        title: of the window.
        data: JSON values, the content of the element `data`.
        script: an ES module.
        styles: id of a style sheet -> its text. An empty id is left out.
        fallback: what a browser without JavaScript shows.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
    )
    text = json.dumps(_visible(data), ensure_ascii=False, separators=(",", ":"))
    for letter, escape in _UNSAFE.items():
        text = text.replace(letter, escape)
    sheets = (
        f'<style id="{name}">{sheet}</style>' if name else f"<style>{sheet}</style>" for name, sheet in styles.items()
    )
    return "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<title>{plain(title)}</title>",
            *sheets,
            "</head>",
            "<body>",
            f"<noscript>{plain(fallback)}</noscript>",
            f'<script type="application/json" id="data">{text}</script>',
            f'<script type="module">{script}</script>',
            "</body>",
            "</html>",
            "",
        )
    )


def _visible(value: Any) -> Any:
    """JSON values in which control characters and changes of text direction are made visible."""
    if isinstance(value, str):
        return _HIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, Mapping):
        return {_visible(key): _visible(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_visible(item) for item in value]
    return value


def own_file(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("ffebm_compiler.drawing").joinpath(name).read_text(encoding="utf-8")
