"""The documentation as a site: it builds, its links lead somewhere, everybody can read it, in a real browser.

The browser reads `SOME` pages of it, and all with FFEBM_PAGES=all (`make pages`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsing import NEEDS_BROWSER, Browser, browser
from test_drawing_reading import CONTRASTS, media

__all__ = ["browser"]

DOCS = Path(__file__).parents[1] / "docs"
SOME = ("index", "gallery", "tutorials/read-the-picture", "reference/convert", "command-line", "mathematics", "search")
ALL = tuple(path.relative_to(DOCS).with_suffix("").as_posix() for path in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")))
READ = (*ALL, "search", "genindex") if os.environ.get("FFEBM_PAGES") == "all" else SOME
NAMELESS = (
    "return [...document.querySelectorAll('button, input, select, textarea, summary, a[href], [role=button]')]"
    ".filter((e) => e.checkVisibility({visibilityProperty: true}))"
    ".filter((e) => !(e.getAttribute('aria-label') || e.getAttribute('title') || e.textContent.trim()"
    "  || e.getAttribute('placeholder') || e.labels?.length || e.querySelector('img[alt]:not([alt=\"\"])')))"
    ".map((e) => e.outerHTML.slice(0, 120))"
)
"""Controls without a name for a screen reader."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("myst_nb")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-P", "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.pictures: list[str | None] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.anchors.update(value for key in ("id", "name") if (value := found.get(key)))
        self.links += [value for key in ("href", "src") if (value := found.get(key))]
        if tag == "img":
            self.pictures.append(found.get("alt"))


@pytest.mark.slow
def test_links_lead_somewhere_and_pictures_have_texts(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > len(ALL)
    assert (site / "gallery" / "gpt2.html") in pages
    assert "<dt" in (site / "reference" / "convert.html").read_text(encoding="utf-8")
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else path
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
        assert all(page.pictures), f"{path}: a picture without a text"
    assert broken == []


@pytest.fixture
def _no_console_errors(browser: Browser) -> Iterator[None]:
    browser.errors()
    yield
    # The theme logs which of its themes it shows.
    assert [entry for entry in browser.driver.get_log("browser") if entry["level"] != "INFO"] == []


@pytest.mark.slow
@NEEDS_BROWSER
@pytest.mark.usefixtures("_no_console_errors")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", READ)
def test_everybody_can_read_it(browser: Browser, site: Path, name: str, theme: str) -> None:
    media(browser, theme)
    try:
        browser.driver.get((site / f"{name}.html").as_uri())
        assert browser.js("return document.documentElement.dataset.theme") == theme
        browser.js("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.js(CONTRASTS) == []
        assert browser.js(NAMELESS) == []
        assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        media(browser, "")
