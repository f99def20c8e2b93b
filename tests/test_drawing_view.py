"""How the page shows a large network: direction, level of detail, the small map, and arrows by keyboard and search."""

from __future__ import annotations

from pathlib import Path

import pytest
from browsing import NEEDS_BROWSER, OVERLAPS, Browser, browser, no_console_errors
from drawing_cases import chain_plan

from ffebm_compiler import drawing

pytestmark = NEEDS_BROWSER
__all__ = ["browser", "no_console_errors"]

VIEW = "document.querySelector('.view').view"
STATE = f"const p = {VIEW}.picture; return [p.direction, p.level]"
WHOLE = (
    f"const v = {VIEW}; return v.picture.size.width * v.scale <= v.stage.clientWidth"
    "  && v.picture.size.height * v.scale <= v.stage.clientHeight"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("view")
    # 11 layers are too few to fold.
    made = {"short": chain_plan(2), "long": chain_plan(11, rejected=(3, 8)), "folded": chain_plan(40)}
    for name, plan in made.items():
        drawing.save_html(plan, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in made}


@pytest.mark.parametrize("size", ["desktop", "phone", "wide"])
def test_the_whole_is_on_the_screen_first(browser: Browser, pages: dict[str, Path], size: str) -> None:
    for name in pages:
        browser.open(pages[name], size)
        assert browser.js(WHOLE), name
        assert browser.js(OVERLAPS) == []
        assert not browser.js("return document.querySelector('.minimap').checkVisibility()")


def test_a_long_network_runs_from_left_to_right_on_a_wide_window(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["long"], "wide")
    assert browser.js(STATE)[0] == "LR"
    flows = (
        "return [...document.querySelectorAll('.edge')].map((e) => {"
        "  const d = e.querySelector('.wire').getAttribute('d').match(/[-\\d.]+/g).map(Number);"
        "  return [d.at(-2) - d[0], d.at(-1) - d[1]]; })"
    )
    assert all(right > 0 for right, _ in browser.js(flows))
    # What is open runs from top to bottom.
    browser.click("block_1 · analog")
    down = (
        "return [...document.querySelectorAll('g.node .edge .wire')].map((wire) => {"
        "  const d = wire.getAttribute('d').match(/[-\\d.]+/g).map(Number); return d.at(-1) - d[1]; })"
    )
    assert len(browser.js(down)) > 1
    assert all(step > 0 for step in browser.js(down))
    browser.click("block_1 · analog")
    browser.button("across")
    assert browser.js(STATE)[0] == "TB"
    assert all(down > 0 for _, down in browser.js(flows))
    assert browser.js("return document.querySelector('[name=across]').getAttribute('aria-pressed')") == "false"
    browser.open(pages["long"], "phone")
    assert browser.js(STATE)[0] == "TB"


def test_details_shows_everything_at_a_scale_that_can_be_read(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["short"])
    assert browser.js(STATE)[1] == "full"
    browser.open(pages["long"])
    assert browser.js(STATE)[1] != "full"
    assert browser.js("return document.querySelectorAll('.label').length") == 0
    browser.button("details")
    assert browser.js(STATE)[1] == "full"
    assert browser.js(f"return {VIEW}.scale") >= 0.96
    assert browser.js(f"return {VIEW}.stage.scrollLeft") == 0  # from the start of the flow
    assert "DAC 64" in browser.js("return document.querySelector('.root').textContent")
    browser.button("details")
    assert browser.js(STATE)[1] != "full"
    assert browser.js(WHOLE)


def test_the_small_map_shows_and_moves_the_window(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["long"])
    browser.button("details")
    assert browser.js("return document.querySelector('.minimap').checkVisibility()")
    boxes = browser.js("return document.querySelectorAll('.minimap rect:not(.window)').length")
    assert boxes == len(browser.titles())
    browser.js(
        "const map = document.querySelector('.minimap'), box = map.querySelector('svg').getBoundingClientRect();"
        "map.setPointerCapture = () => {};"
        "map.dispatchEvent(new PointerEvent('pointerdown', {buttons: 1, clientX: box.right - 1,"
        "  clientY: box.bottom - 1, bubbles: true}));"
    )
    place = browser.js(f"const s = {VIEW}.stage; return [s.scrollLeft + s.clientWidth, s.scrollWidth]")
    assert place[0] == pytest.approx(place[1], abs=2)
    window = "return Number(document.querySelector('.minimap .window').getAttribute('x'))"
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert browser.js(window) > 0


def test_what_was_whole_stays_whole_beside_a_panel(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["long"])
    browser.button("flows")
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert browser.js(WHOLE)
    assert not browser.js("return document.querySelector('.legend').open")


def test_arrows_are_reached_by_the_keyboard_alone(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["long"])
    browser.js("document.querySelector('g.node[data-id=\"input:x\"]').focus()")
    browser.press("e")
    assert browser.js("return document.activeElement.getAttribute('aria-label')").startswith(
        "arrow from x · input to block_1: "
    )
    browser.press("e")  # the input has a second arrow, the skip
    second = browser.js("return document.activeElement.getAttribute('aria-label')")
    assert second.startswith("arrow from x · input to digital_2: ")
    browser.press("\ue007")
    assert "x · input → digital_2" in browser.panel()
    assert browser.js("return document.querySelector('.panel td:last-child').textContent") == "64"
    # The panel makes the picture smaller, and the focus stays on the arrow that is drawn anew.
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert browser.js("return document.activeElement.getAttribute('aria-label')") == second
    browser.press("\ue015")
    assert browser.js("return document.activeElement.getAttribute('aria-label')").startswith("digital_2, digital")
    browser.js("document.querySelector('g.node[data-id=\"output:0\"]').focus()")
    browser.press("e")
    assert browser.js("return document.querySelector('.status').textContent") == "no arrow leaves this box"


def test_a_folded_stage_opens_by_the_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["folded"])
    before = len(browser.titles())
    browser.js("document.querySelector('g.repeats').focus()")
    browser.press("\ue007")
    assert len(browser.titles()) > before
    assert browser.js("return document.activeElement.dataset.id").startswith("home:")


def test_search_finds_arrows_by_their_ends_and_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["long"])
    browser.driver.find_element("name", "search").send_keys("block_3 DAC")
    assert "1 arrow" in browser.panel()
    assert "digital_2 · digital" not in browser.panel()
    assert browser.js("return document.querySelectorAll('.edge.hit').length") == 1
    browser.js("[...document.querySelectorAll('.panel .link')].at(-1).click()")
    assert "digital_2 → block_3" in browser.panel()
    assert browser.js("return document.querySelector('.edge.chosen').getAttribute('aria-label')").startswith(
        "arrow from digital_2 to block_3"
    )
