"""The documentation as a site: `make docs` builds it into build/docs, and a warning is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ffebm_compiler as ffebm

DOCS = Path(__file__).parent

project = "ffebm-compiler"
author = "the authors of ffebm-compiler"
release = version = ffebm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns: list[str] = []
suppress_warnings = ["myst.strikethrough"]

# Notebooks are committed with their outputs. `make tutorials` runs them again, and tests/test_docs.py runs their cells.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

default_role = "code"
_SECTIONS = ("Args", "Attributes", "Example", "Examples", "Raises", "Returns", "Yields", "Source")

html_theme = "pydata_sphinx_theme"
html_title = f"ffebm-compiler {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_context = {"default_mode": "auto"}
html_theme_options: dict[str, Any] = {
    "show_prev_next": False,
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

KINDS = ("index", "tutorials/index", "how-to", "reference/index", "explanations", "about")
"""The pages that list all other pages."""
MARK = "<!-- pages that are in no list -->"


def unlisted() -> list[str]:
    """Pages of this folder that no list names: they are shown among the how-tos."""
    lists = "\n".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in KINDS)
    pages = sorted(path.stem for path in DOCS.glob("*.md"))
    named = set(re.findall(r"^(?:[^<\n]+<)?/?([\w-]+)>?$", lists, re.MULTILINE))
    return [name for name in pages if name not in named and name not in KINDS]


def _add_unlisted(app: Any, docname: str, source: list[str]) -> None:
    if docname == "how-to" and unlisted():
        listed = "\n".join(unlisted())
        source[0] = source[0].replace(MARK, f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```")


def _literal_equations(app: Any, what: str, name: str, target: Any, options: Any, lines: list[str]) -> None:
    """Make indented paragraphs of a docstring literal: equations keep their lines and their asterisks."""
    section = False
    found: list[str] = []
    for line in lines:
        plain = line.strip()
        indented = line.startswith("    ")
        if plain and not indented:
            section = plain.rstrip(":") in _SECTIONS and plain.endswith(":")
        if indented and not section and found and not found[-1].strip():
            found += ["::", ""]
        found.append(re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", line))  # the plural of a name
    lines[:] = found


def _draw_gallery(app: Any, exception: Exception | None) -> None:
    """Make the pages of the gallery from its plans."""
    if exception is None and app.builder.format == "html":
        for path in sorted((DOCS / "gallery").glob("*.json")):
            (Path(app.outdir) / "gallery").mkdir(exist_ok=True)
            ffebm.Plan.from_json(path).save_html(Path(app.outdir) / "gallery" / f"{path.stem}.html")


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("build-finished", _draw_gallery)
    app.connect("source-read", _add_unlisted)
    app.connect("autodoc-process-docstring", _literal_equations, priority=100)
