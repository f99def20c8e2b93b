"""The interactive page in a real browser: opened from disk, with the network off.

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver); skipped without.
"""

from __future__ import annotations

import base64
import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import pytest
from browsing import NEEDS_BROWSER, OVERLAPS, SIZES, Browser, browser, no_console_errors
from drawing_cases import chain_plan
from networks import digits_cnn, mlp, transformer
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.reports.diagnosis import BlockDiagnosis, Diagnosis

pytestmark = NEEDS_BROWSER
__all__ = ["browser", "no_console_errors"]

NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'&层"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    made = {
        "cnn": ffebm.plan(*digits_cnn()),
        "transformer": ffebm.plan(*transformer()),
        "rejected": chain_plan(6, rejected=(2, 4)),
        "nasty": chain_plan(3, prefix=NASTY, model=NASTY, rejected=(1,)),
    }
    for name, plan in made.items():
        drawing.save_html(plan, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["cnn", "transformer", "rejected"])
def test_opens_with_blocks_and_parts_only_and_loads_nothing(
    browser: Browser, pages: dict[str, Path], name: str, size: str
) -> None:
    browser.open(pages[name], size)
    record = browser.js("return JSON.parse(document.getElementById('data').textContent)[0]")
    titles = browser.titles()
    assert len(titles) == len(record["homes"]) + len(record["inputs"]) + len(record["outputs"])
    for home in record["homes"]:
        assert any(home["title"] in title for title in titles)
    assert browser.js("return performance.getEntriesByType('resource').length") == 0
    # The page itself never scrolls sideways: the picture scrolls inside it.
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("size", SIZES)
def test_a_click_opens_a_block_in_place_and_a_second_one_closes_it(
    browser: Browser, pages: dict[str, Path], size: str
) -> None:
    browser.open(pages["transformer"], size)
    before = browser.titles()
    browser.click("block_3 · analog")
    opened = browser.titles()
    assert any("from digital_3" in title for title in opened)
    # The model's own operations before and after a layer are two nodes, so that no arrow runs back.
    assert {"gelu", "add"} <= set(opened)
    # Its title is on the screen, also where the block is wider than the window.
    assert browser.js(
        "const title = document.querySelector('[aria-expanded=true] > .title').getBoundingClientRect();"
        "return title.left >= 0 && title.right <= window.innerWidth"
    )
    browser.click("gelu")
    assert "layers.0" in browser.panel()
    assert "block_3" in browser.panel()
    assert (
        browser.js("return document.querySelector('[aria-expanded=true] > .title').textContent")
        == "▾ ∿ block_3 · analog"
    )
    browser.click("block_3 · analog")
    assert browser.titles() == before


def test_nodes_never_overlap_when_open(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["transformer"])
    browser.button("expand")
    overlaps = browser.js(OVERLAPS)
    assert overlaps == []
    outside = browser.js(
        "return [...document.querySelectorAll('g.node g.node')].filter((n) => {"
        "  const [p, q] = [n.querySelector('.box').getBoundingClientRect(),"
        "    n.parentElement.closest('g.node').querySelector('.box').getBoundingClientRect()];"
        "  return p.left < q.left || p.right > q.right || p.top < q.top || p.bottom > q.bottom;"
        "}).map((n) => n.dataset.id)"
    )
    assert outside == []
    browser.button("collapse")
    assert not any("from" in title for title in browser.titles())


def test_text_fits_its_box(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["transformer"])
    browser.button("expand")
    too_wide = browser.js(
        "const shown = (t) => t.checkVisibility({visibilityProperty: true});"
        "return [...document.querySelectorAll('g.node')].filter((n) => [...n.querySelectorAll(':scope > text')]"
        ".some((t) => shown(t) && t.getBBox().width > n.querySelector('.box').width.baseVal.value))"
        ".map((n) => n.dataset.id)"
    )
    assert too_wide == []


@pytest.mark.parametrize("size", SIZES)
def test_panel_tells_layers_tiles_conversions_and_reasons(browser: Browser, pages: dict[str, Path], size: str) -> None:
    browser.open(pages["rejected"], size)
    browser.click("block_1 · analog")
    text = browser.panel()
    for expected in (
        "layers.0.linear",
        "64×64",
        "12.5 % of their devices used",
        "DAC values per sample",
        "layers.0.linear.weight",
    ):
        assert expected in text
    browser.driver.find_element("css selector", ".panel .close").click()
    assert browser.panel() == ""
    browser.click("digital_3 · digital")
    assert "layers.2.linear: digital: it needs 65 tiles, a core has 64" in browser.panel()


@pytest.mark.parametrize("size", SIZES)
def test_search_finds_a_module_path_opens_it_and_dims_the_rest(
    browser: Browser, pages: dict[str, Path], size: str
) -> None:
    browser.open(pages["transformer"], size)
    browser.driver.find_element("name", "search").send_keys("layers.1 self_attn linear")
    assert "found" in browser.panel()
    dimmed = browser.js("return document.querySelectorAll('g.node.dimmed').length")
    assert 0 < dimmed < len(browser.titles())
    browser.press("\ue007")
    assert browser.js("return document.querySelector('g.node.selected > .title').textContent") == "linear"
    assert "layers.1.self_attn" in browser.panel()
    visible = browser.js(
        "const [a, b, p] = ['g.node.selected .box', '.stage', '.panel']"
        "  .map((selector) => document.querySelector(selector).getBoundingClientRect());"
        "return a.top >= b.top - 1 && a.top + 10 <= (p.left <= b.left ? p.top : b.bottom)"
    )
    assert visible
    browser.driver.find_element("name", "search").clear()
    browser.driver.find_element("name", "search").send_keys("nothing like this")
    assert "0 found" in browser.panel()


def test_filter_shows_what_stayed_digital_with_reasons(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rejected"])
    assert browser.js("return document.querySelector('[name=stayed]').textContent") == "stayed digital (2)"
    browser.button("stayed")
    kept = browser.js("return [...document.querySelectorAll('g.node:not(.dimmed) > .title')].map((t) => t.textContent)")
    assert [title.split()[1] for title in kept] == ["digital_3", "digital_5"]
    assert "layers.2.linear" in browser.panel()
    assert "it needs 65 tiles" in browser.panel()
    browser.button("stayed")
    assert browser.js("return document.querySelectorAll('g.node.dimmed').length") == 0


def test_keyboard_alone_is_enough(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["rejected"])
    browser.js("document.querySelector('g.node[tabindex=\"0\"]').focus()")
    browser.press("\ue015")
    assert browser.js("return document.activeElement.dataset.id") == "home:0"
    browser.press("\ue014")
    assert browser.js("return document.activeElement.getAttribute('aria-expanded')") == "true"
    assert "block_1" in browser.panel()
    browser.press("\ue00c")
    assert browser.panel() == ""
    browser.press("\ue012")
    assert browser.js("return document.activeElement.getAttribute('aria-expanded')") == "false"
    browser.press("/")
    assert browser.js("return document.activeElement.name") == "search"
    assert browser.js("return document.activeElement.value") == ""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_in_both_themes(browser: Browser, pages: dict[str, Path], theme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": theme}]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        browser.open(pages["rejected"])
        worst = browser.js(
            "const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});"
            "const light = (c) => { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1);"
            "  const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)"
            "    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));"
            "  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };"
            "const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);"
            "return Math.min(...[...document.querySelectorAll('g.node > text')].map((t) => ratio("
            "  light(getComputedStyle(t).fill), light(getComputedStyle(t.parentElement.querySelector('.box')).fill))))"
        )
        assert worst >= 4.5
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_picture_downloads_as_svg_that_stands_alone(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["cnn"])
    browser.click("block_2 · analog")
    browser.button("svg")
    path = browser.downloads / "partition.svg"
    for _ in range(100):
        if path.exists():
            break
        browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("block_2 · analog" in line for line in texts)
    assert "var(--" not in text
    assert not root.get("class")  # a picture that was small on the screen shows all its text in the file
    assert "#0066a1" in text


def test_names_with_markup_stay_text(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["nasty"])
    browser.button("expand")
    browser.click("digital_2 · digital")
    browser.button("stayed")
    browser.driver.find_element("name", "search").send_keys("script")
    assert NASTY in browser.driver.title
    assert browser.js("return document.querySelectorAll('script').length") == 2
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert NASTY in browser.js("return document.querySelector('.panel').textContent")


def test_markup_in_the_hardware_and_the_titles_stays_text(browser: Browser, tmp_path: Path) -> None:
    plan = chain_plan(2)
    hardware = dataclasses.replace(plan.hardware, name=NASTY, costs={"adc_pj": 1.0})
    plan = dataclasses.replace(plan, hardware=hardware, notes=(NASTY,))
    drawing.save_side_by_side(plan, plan, tmp_path / "page.html", (NASTY, "after"))
    browser.open(tmp_path / "page.html")
    browser.js("[...document.querySelectorAll('.totals .link')][0].click()")
    assert f"given in Hardware {NASTY!r}" in browser.js("return document.querySelector('.panel').textContent")
    assert browser.js("return document.querySelectorAll('script').length") == 2
    assert browser.js("return document.querySelectorAll('img').length") == 0
    assert browser.driver.title != "owned"


def test_overlays_are_chosen_from_a_list(browser: Browser, tmp_path: Path) -> None:
    overlay = drawing.Overlay("deviation", "how far", {"block_1": 0.5, "block_2": 0.25})
    drawing.save_html(chain_plan(2), tmp_path / "page.html", overlays=[overlay])
    browser.open(tmp_path / "page.html")
    assert browser.js("return document.querySelectorAll('.bar').length") == 0
    browser.js("const s = document.querySelector('select'); s.value = '0'; s.dispatchEvent(new Event('change'))")
    assert browser.js("return [...document.querySelectorAll('.measured')].map((t) => t.textContent)") == [
        "deviation 0.5",
        "deviation 0.25",
    ]
    widths = browser.js(
        "const wide = (element) => Number(element.getAttribute('width'));"
        "return [...document.querySelectorAll('.bar')].map((bar) => wide(bar) / wide(bar.previousSibling))"
    )
    assert widths == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("size", SIZES)
def test_the_panel_draws_how_a_block_settles_and_its_costs(browser: Browser, tmp_path: Path, size: str) -> None:
    block = BlockDiagnosis(("layers.0.linear",), 0.3, 4, 2, (0.1, 0.01, float("inf")), (5.0, 4.0, 3.5, 3.4), True)
    drawing.save_html(chain_plan(1), tmp_path / "page.html", diagnosis=Diagnosis({"block_1": block}))
    browser.open(tmp_path / "page.html", size)
    browser.click("block_1 · analog")
    assert browser.js("return [...document.querySelectorAll('.curve')].map((c) => c.getAttribute('aria-label'))") == [
        "residual: largest relative change of a layer, from 0.1 to 0.01 over sweeps 1 to 3",
        "energy, less that of the feedforward values, from 0 to -1.6 over sweeps 0 to 3",
    ]
    assert browser.js(
        "return [...document.querySelectorAll('.curve')].map((c) => c.querySelectorAll('circle').length)"
    ) == [2, 4]
    fits = (
        "return [...document.querySelectorAll('.curve')].every((c) => { const b = c.getBBox();"
        "  return b.x >= 0 && b.y >= 0 && b.x + b.width <= 348 && b.y + b.height <= 128; })"
    )
    assert browser.js(fits)
    assert "The forward stopped at sweep 2, the dashed line." in browser.panel()
    assert "a minimum of E" in browser.panel()
    assert "same layers digital" in browser.panel()
    browser.js("[...document.querySelectorAll('.totals .link')][0].click()")
    assert "Constants and their sources" in browser.panel()
    assert "adc_pj" in browser.panel()


def test_a_plan_without_blocks_and_an_input_that_is_an_output(browser: Browser, tmp_path: Path) -> None:
    plan = chain_plan(2, rejected=(0, 1))
    graph = OperationGraph({"x": 64, "unused": 3}, plan.graph.operations, (*plan.graph.outputs, "x"))
    drawing.save_html(dataclasses.replace(plan, graph=graph), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    titles = [title.removeprefix("▸ ") for title in browser.titles()]
    assert sorted(titles) == [
        "digital_1 · digital", "digital_2 · digital", "output 1", "output 2", "unused · input", "x · input",
    ]  # fmt: skip
    browser.click("output 2")
    assert "64 values per sample" in browser.panel()
    browser.button("expand")
    assert "to output 1" in browser.titles()
    assert "0 energy blocks" in browser.js("return document.querySelector('.totals').textContent")


@pytest.mark.parametrize("size", SIZES)
def test_two_plans_stand_beside_each_other(browser: Browser, tmp_path: Path, size: str) -> None:
    drawing.save_side_by_side(chain_plan(2, model="First"), chain_plan(3, model="Second"), tmp_path / "two.html")
    browser.open(tmp_path / "two.html", size)
    assert browser.js("return [...document.querySelectorAll('h1')].map((h) => h.textContent)") == [
        "First on test",
        "Second on test",
    ]
    assert browser.js(
        "return [...document.querySelectorAll('.stage')].every((s) => s.clientWidth > 150 && s.clientHeight > 150)"
    )


def test_three_thousand_operations_open_closed_and_a_block_still_opens(browser: Browser, tmp_path: Path) -> None:
    drawing.save_html(chain_plan(1000, rejected=tuple(range(0, 1000, 2))), tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert len(browser.titles()) < 20  # alike stages are one node
    browser.button("repeats")
    assert len(browser.titles()) == 1502
    for block in ("block_7", "block_9", "block_200"):
        browser.click(f"{block} · analog")
        assert f"▾ {block} · analog, no feedback" in browser.titles()
    assert browser.js(OVERLAPS) == []
    # Every edge begins at the bottom of a node and ends at the top of one.
    loose = browser.js(
        "const near = (a, b) => Math.abs(a - b) < 1;"
        "const root = document.querySelector('.root > g');"
        "const boxes = [...root.querySelectorAll(':scope > g.node')].map((n) => {"
        "  const [x, y] = n.getAttribute('transform').match(/[-\\d.]+/g).map(Number);"
        "  const [w, h] = ['width', 'height'].map((k) => Number(n.querySelector('.box').getAttribute(k)));"
        "  return {left: x, right: x + w, top: y, bottom: y + h}; });"
        "return [...root.querySelectorAll(':scope > g.edge')].filter((e) => {"
        "  const d = e.querySelector('.wire').getAttribute('d').match(/[-\\d.]+/g).map(Number);"
        "  const [u, v, x, y] = [d[0], d[1], d.at(-2), d.at(-1) + 5];"
        "  return !(boxes.some((b) => near(v, b.bottom) && u >= b.left - 1 && u <= b.right + 1)"
        "    && boxes.some((b) => near(y, b.top) && x >= b.left - 1 && x <= b.right + 1)); }).length"
    )
    assert loose == 0


def test_notebook_frame_runs_apart_from_the_notebook(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "notebook.html").write_text(
        f"<!DOCTYPE html><title>notebook</title><body>{drawing.notebook_html(chain_plan(2))}</body>", encoding="utf-8"
    )
    browser.driver.get((tmp_path / "notebook.html").as_uri())
    frame = browser.driver.find_element("tag name", "iframe")
    assert browser.js("return arguments[0].contentDocument", frame) is None
    browser.driver.switch_to.frame(frame)
    try:
        assert any("block_1" in title for title in browser.titles())
        browser.click("block_1 · analog")
        assert "layers.0.linear" in browser.panel()
    finally:
        browser.driver.switch_to.default_content()


def test_a_frame_that_gets_its_size_late_fits_until_it_is_touched(browser: Browser, tmp_path: Path) -> None:
    frame = drawing.notebook_html(chain_plan(2)).replace('loading="lazy"', "").replace("sandbox=", "data-was=")
    (tmp_path / "late.html").write_text(
        f'<!DOCTYPE html><title>late</title><body><div style="width:10px">{frame}</div></body>', encoding="utf-8"
    )
    browser.driver.get((tmp_path / "late.html").as_uri())
    resize = (
        "const [pixels, done] = arguments; document.querySelector('div').style.width = `${pixels}px`;"
        "const inside = document.querySelector('iframe').contentDocument;"
        "setTimeout(() => done(inside.querySelector('svg[role=tree]').getBoundingClientRect().width), 300);"
    )
    narrow = browser.driver.execute_async_script(resize, 10)
    wide = browser.driver.execute_async_script(resize, 900)
    assert wide > 1.2 * narrow
    browser.js("document.querySelector('iframe').contentDocument.querySelector('[name=out]').click()")
    assert browser.driver.execute_async_script(resize, 880) == pytest.approx(wide / 1.25, rel=0.01)


def test_screenshot_is_not_blank(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["cnn"])
    shot = base64.b64decode(browser.driver.get_screenshot_as_base64())
    assert len(shot) > 20_000


def test_feedback_through_weights_of_its_own_is_drawn_as_a_wire_of_its_own(browser: Browser, tmp_path: Path) -> None:
    model, x = mlp(nn.Tanh)
    for name, own in (("tied", "tied"), ("free", "free")):
        ffebm.convert(model, x, feedback_weights=own).save_html(tmp_path / f"{name}.html")
    browser.open(tmp_path / "tied.html")
    browser.click("block_1")
    assert browser.js("return document.querySelectorAll('.back, .swatch.back').length") == 0
    browser.open(tmp_path / "free.html")
    assert browser.js("return document.querySelectorAll('svg .back').length") == 0  # closed
    assert "feedback through 3 weights of its own" in browser.js("return document.querySelector('.root').textContent")
    browser.click("block_1")
    assert browser.js("return document.querySelectorAll('svg .back').length") == 3
    labels = browser.js("return [...document.querySelectorAll('.label')].map((label) => label.textContent)")
    assert [label for label in labels if "feedback" in label] == [
        f"feedback: layers.{index}.weight_feedback" for index in (1, 2, 3)
    ]
    assert browser.js("return document.querySelectorAll('.swatch.back').length") == 1
