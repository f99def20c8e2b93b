"""Whether everybody can read the page: contrast, names for screen readers, print, and the time to the first paint."""

from __future__ import annotations

import base64
import dataclasses
import re
from pathlib import Path

import pytest
from browsing import NEEDS_BROWSER, Browser, browser, no_console_errors
from drawing_cases import chain_plan
from networks import mlp

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.reports.diagnosis import BlockDiagnosis, Diagnosis

pytestmark = NEEDS_BROWSER
__all__ = ["browser", "no_console_errors"]

TIMES = {"read_ns": 100.0, "adc_ns": 1.0, "dac_ns": 1.0, "digital_ns": 0.5, "converters": 64}
PANELS = ("stayed", "why", "floor", "flows", "timeline", "notes", "what-if")
SHOW = {
    "block": "const v = document.querySelector('.view').view; v.panel.item(v.tree.byId.get('home:0'))",
    "operation": "const v = document.querySelector('.view').view; v.panel.item(v.tree.byId.get('op:0'))",
    "arrow": "const v = document.querySelector('.view').view; v.panel.edge(v.tree.arrows[0])",
    "costs": "document.querySelector('.totals .link').click()",
}
CONTRASTS = (
    "const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
    "const paint = (colour) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);"
    "  return [...canvas.getImageData(0, 0, 1, 1).data]; };"
    "const light = (c) => { const [r, g, b] = c.map((v) => v / 255)"
    "    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));"
    "  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
    "const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);"
    "const behind = (e) => { for (; e; e = e.parentElement) {"
    "  const c = paint(getComputedStyle(e).backgroundColor); if (c[3] === 255) return c; } return [255, 255, 255]; };"
    "const found = [];"
    "const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);"
    "while (walk.nextNode()) {"
    "  const e = walk.currentNode.parentElement;"
    "  if (!walk.currentNode.data.trim() || e.closest('script, style, noscript, title')"
    "    || !e.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;"
    "  const inside = e instanceof SVGElement, style = getComputedStyle(e);"
    "  const box = inside && e.parentElement.querySelector(':scope > .box');"
    "  const back = box ? paint(getComputedStyle(box).fill) : behind(inside ? e.closest('svg') : e);"
    "  const value = ratio(paint(inside ? style.fill : style.color), back);"
    "  if (value < 4.5) found.push([e.textContent.slice(0, 40), e.outerHTML.slice(0, 60), value]);"
    "} return found"
)
"""Every visible text whose contrast with what is behind it is below 4.5 (WCAG 2.2, 1.4.3)."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = chain_plan(30, rejected=(1, 2))
    plan = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, costs=TIMES))
    curves = BlockDiagnosis(("layers.0.linear",), 0.3, 4, 2, (0.1, 0.01), (5.0, 4.0, 3.5), True)
    path = tmp_path_factory.mktemp("reading") / "page.html"
    overlay = drawing.Overlay("deviation", "how far", {"block_1": 0.5})
    drawing.save_html(plan, path, None, [overlay], Diagnosis({"block_1": curves}), what_if=True, source="plan.json")
    return path


def media(browser: Browser, theme: str, kind: str = "") -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}] if theme else []
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": kind, "features": features})


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_has_contrast_in_every_panel(browser: Browser, page: Path, theme: str) -> None:
    media(browser, theme)
    try:
        browser.open(page)
        browser.js("document.querySelector('.legend').open = true")
        assert browser.js(CONTRASTS) == []
        for name in PANELS:
            browser.button(name)
            browser.js("document.querySelectorAll('.panel details').forEach((one) => { one.open = true; })")
            assert browser.panel()
            # What the filter dims is meant to be faint: only the panel is read then.
            found = [row for row in browser.js(CONTRASTS) if name != "stayed" or 'class="called' not in row[1]]
            assert found == [], name
        for name, act in SHOW.items():
            browser.js(act)
            assert browser.js(CONTRASTS) == [], name
        browser.js("const s = document.querySelector('select'); s.value = '0'; s.dispatchEvent(new Event('change'))")
        browser.button("details")
        assert browser.js(CONTRASTS) == []
        browser.driver.find_element("name", "search").send_keys("layers.3")
        assert [row for row in browser.js(CONTRASTS) if row[1].startswith(("<li", "<span", "<button", "<p"))] == []
    finally:
        media(browser, "")


CONTROLS = {"button", "searchbox", "textbox", "combobox", "slider", "treeitem", "checkbox", "DisclosureTriangle"}


def test_every_control_has_a_name_for_a_screen_reader(browser: Browser, page: Path) -> None:
    browser.open(page)
    kinds = set()
    for name in ("", *PANELS):
        if name:
            browser.button(name)
        nodes = browser.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        controls = [node for node in nodes if not node["ignored"] and node.get("role", {}).get("value") in CONTROLS]
        assert len(controls) > 20
        assert [node for node in controls if not node.get("name", {}).get("value", "").strip()] == []
        kinds |= {node["role"]["value"] for node in controls}
    assert {"button", "searchbox", "combobox", "treeitem"} <= kinds


@pytest.mark.parametrize("size", ["desktop", "phone", "wide"])
def test_it_prints_light_and_without_tools_on_the_width_of_the_paper(browser: Browser, page: Path, size: str) -> None:
    browser.open(page, size)
    browser.button("theme")
    browser.js("document.documentElement.dataset.theme = 'dark'")
    media(browser, "", "print")
    try:
        hidden = browser.js(
            "return ['.tools', '.controls', '.minimap', '.panel'].filter((name) =>"
            "  document.querySelector(name).checkVisibility())"
        )
        assert hidden == []
        assert browser.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.js(
            "return document.querySelector('.stage > svg').getBoundingClientRect().right <= window.innerWidth"
        )
    finally:
        media(browser, "")
    pdf = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 3


def test_the_head_names_the_file_of_the_plan(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.js("return document.querySelector('.provenance').textContent").startswith("from plan.json · ffebm")


def test_a_thousand_blocks_are_painted_soon(browser: Browser, tmp_path: Path) -> None:
    drawing.save_html(chain_plan(1000), tmp_path / "page.html")
    times = []
    for _ in range(3):
        browser.open(tmp_path / "page.html")
        painted = (
            "const done = arguments[0]; new PerformanceObserver((list) =>"
            "  list.getEntriesByName('first-contentful-paint').forEach((entry) => done(entry.startTime))"
            ").observe({type: 'paint', buffered: true});"
        )
        times.append(browser.driver.execute_async_script(painted))
    # The target is 1 s on a machine of its own; tests share theirs.
    assert min(times) < 3000, times


def test_the_command_names_its_file_in_the_head(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ffebm_compiler.cli.main import main

    ffebm.plan(*mlp()).to_json(tmp_path / "plan.json")
    done = CliRunner().invoke(main, ["draw", str(tmp_path / "plan.json"), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert f"from {tmp_path / 'plan.json'} · ffebm-compiler" in (tmp_path / "page.html").read_text(encoding="utf-8")
