"""The page of real networks in a real browser: facts equal the plan's, text is readable, controls are named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from browsing import NEEDS_BROWSER, OVERLAPS, Browser, browser, no_console_errors
from drawing_networks import NETWORKS, plan_of

from ffebm_compiler.drawing import html_text
from ffebm_compiler.drawing.boundaries import ends_of, side_inputs
from ffebm_compiler.driven import settles
from ffebm_compiler.plan import Plan
from ffebm_compiler.reports.text import count

pytestmark = NEEDS_BROWSER
__all__ = ["browser", "no_console_errors"]


ALL = os.environ.get("FFEBM_PAGES") == "all"
MODELS = list(NETWORKS) if ALL else ["resnet18", "vit_tiny", "gpt2", "unet"]
"""`make pages` draws all ten."""


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Plan, Path]]:
    folder = tmp_path_factory.mktemp("facts")
    found = {}
    for name in MODELS:
        plan = plan_of(name)
        plan.save_html(folder / f"{name}.html")
        found[name] = plan, folder / f"{name}.html"
    return found


EDGES = (
    "const view = document.querySelector('.view').view, tree = view.tree;"
    "const all = tree.edges(tree.root).edges;"
    "return all.map((e) => [e.from.title, e.to.title, e.adc, e.dac, [...e.sources], tree.labels(e), e.side])"
)


CLOSE = (
    "return [...document.querySelectorAll('g.node > text')]"
    ".filter((t) => t.checkVisibility({visibilityProperty: true})).map((t) => {"
    "  const box = t.parentElement.querySelector('.box').getBoundingClientRect(), own = t.getBoundingClientRect();"
    "  return [t.textContent, own.left - box.left, box.right - own.right];"
    "}).filter(([, left, right]) => Math.min(left, right) < 2.8)"
)
"""Texts that come closer than 2.8 pixels to the sides of their boxes."""


@pytest.mark.parametrize("name", MODELS)
def test_facts_on_the_page_are_the_plans(browser: Browser, plans: dict[str, tuple[Plan, Path]], name: str) -> None:
    plan, path = plans[name]
    browser.open(path)
    text = browser.js("return document.querySelector('.top').innerText")
    share = f"{100 * plan.analog_share:.1f} %"
    for fact in (f"{len(plan.blocks)} energy blocks", f"{len(plan.digital_parts)} digital parts", f"{share} of"):
        assert fact in text
    assert plan.fingerprint in text
    if browser.js("return document.querySelector('[name=repeats]') !== null"):
        browser.button("repeats")
    for block in plan.blocks:
        titles = [title for title in browser.titles() if f"{block.name} · analog" in title]
        assert len(titles) == 1
        assert ("no feedback" in titles[0]) != settles(plan.graph, block.operations, block.driven)
    # What is written at the arrows of a block adds up to the block's conversions.
    drawn = browser.js(EDGES)
    for block in plan.blocks:
        assert sum(edge[3] for edge in drawn if edge[1] == block.name) == block.dac
        assert sum(edge[2] for edge in drawn if edge[0] == block.name) == block.adc
    # No edge runs back: every one leads along the flow.
    backward = browser.js(
        "const at = document.querySelector('.view').view.picture.direction === 'LR' ? 0 : 1;"
        "return [...document.querySelectorAll('.edge .wire')].filter((wire) => {"
        "  const d = wire.getAttribute('d').match(/[-\\d.]+/g).map(Number);"
        "  return d[d.length - 2 + at] <= d[at]; }).length"
    )
    assert backward == 0


PANELS = (
    "const view = document.querySelector('.view').view, found = {};"
    "for (const item of view.tree.root.items.filter((one) => one.record)) {"
    "  view.panel.item(item);"
    "  const body = document.querySelector('.panel-body');"
    "  const pairs = [...body.querySelectorAll('dl')][0];"
    "  const words = (list) => [...list].map((one) => one.textContent);"
    "  const rows = [...body.querySelectorAll('section')].find((s) => s.querySelector('h3').textContent === 'Layers');"
    "  found[item.title] = {"
    "    facts: words(pairs.querySelectorAll('dt')).map((name, at) => [name, words(pairs.querySelectorAll('dd'))[at]]),"
    "    layers: rows ? [...rows.querySelectorAll('tbody tr')].map((row) => words(row.children)) : [],"
    "    operations: words(body.querySelectorAll('.operations li > .link')),"
    "    reasons: words(body.querySelectorAll('.operations li > small')),"
    "  };"
    "} return found"
)


@pytest.mark.parametrize("name", MODELS)
def test_every_panel_tells_what_the_plan_says(browser: Browser, plans: dict[str, tuple[Plan, Path]], name: str) -> None:
    plan, path = plans[name]
    browser.open(path)
    told = browser.js(PANELS)
    assert list(told) == [*dict.fromkeys(told)]
    assert set(told) == {block.name for block in plan.blocks} | {part.name for part in plan.digital_parts}
    for block in plan.blocks:
        facts = dict(told[block.name]["facts"])
        assert facts["tiles"].split(",")[0] == count(block.tiles)
        expected = {
            "DAC values per sample": block.dac,
            "ADC values per sample": block.adc,
            "neurons": block.neurons,
            "MACs per sample": block.macs,
        }
        assert {key: facts[key] for key in expected} == {key: count(value) for key, value in expected.items()}
        assert facts["reads"] == ", ".join(block.inputs)
        assert facts["gives"] == ", ".join(block.outputs)
        weights = [plan.graph[n] for n in block.operations if plan.graph[n].weights and plan.graph[n].rows]
        rows = told[block.name]["layers"]
        assert [row[0] for row in rows] == [op.path or op.name for op in weights]
        assert [row[2] for row in rows] == [f"{op.rows}×{op.cols}" for op in weights]
        assert [row[4] for row in rows] == [count(op.macs) for op in weights]
    for home in (*plan.blocks, *plan.digital_parts):
        operations = [plan.graph[n] for n in home.operations]
        assert told[home.name]["operations"] == [op.target for op in operations]
        assert told[home.name]["reasons"] == [plan._explain_operation(op) for op in operations]
    # The totals in the head, from the blocks alone.
    head = browser.js("return document.querySelector('.totals').innerText")
    for value in (sum(b.tiles for b in plan.blocks), sum(b.dac for b in plan.blocks), sum(b.adc for b in plan.blocks)):
        assert count(value) in head
    macs = browser.js("return JSON.parse(document.getElementById('data').textContent)[0].ops.map((op) => op.macs)")
    assert sum(macs) == plan.total_macs


@pytest.mark.parametrize("name", ["mixture", "mamba"] if ALL else ["mixture"])
def test_constants_are_side_inputs(name: str) -> None:
    plan = plan_of(name)
    side = {source for sources in side_inputs(plan).values() for source in sources}
    constants = {op.name for op in plan.graph.operations if op.target in ("arange", "zeros") and not op.data}
    made = {op.name: op for op in plan.graph.operations}
    read = {
        source
        for op in plan.graph.operations
        for source in op.data
        if source in made and plan.home(source) != plan.home(op.name)
    }
    assert constants & read
    assert constants & read <= side


def test_masks_are_side_inputs_that_a_button_shows(browser: Browser, plans: dict[str, tuple[Plan, Path]]) -> None:
    plan, path = plans["gpt2"]
    side = side_inputs(plan)
    assert len(side) == 6  # one attention a layer
    assert {source for sources in side.values() for source in sources} == {"expand_2"}
    browser.open(path)
    assert browser.js("return document.querySelectorAll('.edge.side').length") == 0
    browser.button("side")
    assert browser.js("return document.querySelectorAll('.edge.side').length") > 0
    assert side_inputs(plans["resnet18"][0]) == {}
    assert side_inputs(plans["vit_tiny"][0]) == {}


def test_alike_stages_are_one_node_until_it_is_opened(browser: Browser, plans: dict[str, tuple[Plan, Path]]) -> None:
    plan, path = plans["gpt2"]
    browser.open(path)
    (stage,) = [title for title in browser.titles() if "more like" in title]
    folded = len(browser.titles())
    assert folded < len(plan.blocks) + len(plan.digital_parts)
    # The node stands for as many blocks and parts as are missing from the picture.
    missing = len(plan.blocks) + len(plan.digital_parts) + 2 - (folded - 1)
    words = browser.js("return document.querySelector('.repeats').getAttribute('aria-label')").rpartition(", block")[2]
    assert sum(int(word) for word in words.split() if word.isdigit()) == missing
    browser.click(stage)
    assert len(browser.titles()) == len(plan.blocks) + len(plan.digital_parts) + browser.js(
        "return document.querySelector('.view').view.tree.inputs.length"
        "  + document.querySelector('.view').view.tree.outputs.length"
    )
    browser.open(path)
    browser.driver.find_element("name", "search").send_keys("h.2.mlp.c_fc addmm")
    browser.press("\ue007")  # what is found in a folded stage unfolds it
    assert browser.js("return document.querySelector('g.node.selected > .title').textContent") == "addmm"


def test_a_block_says_why_it_ends(browser: Browser, plans: dict[str, tuple[Plan, Path]]) -> None:
    plan, path = plans["resnet18"]
    block = plan.blocks[0]
    ((place, why),) = ends_of(plan, block)
    assert (place, why) == ("maxpool", "max_pool2d is wiring of kind 'max_pool', which block_ops does not list")
    browser.open(path)
    browser.click("block_1 · analog")
    assert f"{place}: {why}" in browser.panel()
    assert any("a core holds" in text for b in plan.blocks for _, text in ends_of(plan, b))
    browser.button("why")
    assert f"1 operation: {why}" in browser.panel()


@pytest.mark.parametrize("size", ["desktop", "phone", "wide"])
@pytest.mark.parametrize("name", MODELS)
def test_text_is_at_least_twelve_pixels_high_and_labels_lie_apart(
    browser: Browser, plans: dict[str, tuple[Plan, Path]], name: str, size: str
) -> None:
    browser.open(plans[name][1], size)
    shown = (
        "const scale = document.querySelector('.view').view.scale;"
        "return [...document.querySelectorAll('.stage text')]"
        ".filter((t) => t.checkVisibility({visibilityProperty: true}))"
        ".map((t) => [t.textContent, parseFloat(getComputedStyle(t).fontSize) * scale])"
    )
    for _ in range(3):
        small = [row for row in browser.js(shown) if row[1] < 11.4]
        assert small == []
        assert browser.js(CLOSE) == []
        overlaps = browser.js(
            "const boxes = [...document.querySelectorAll('.label')]"
            ".filter((t) => t.checkVisibility({visibilityProperty: true}))"
            "  .map((t) => [t.textContent, t.getBoundingClientRect()]);"
            "return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([, q]) =>"
            "  p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3)"
            "  .map(([b]) => `${a} / ${b}`))"
        )
        assert overlaps == []
        assert browser.js(OVERLAPS) == []
        browser.js("document.querySelector('.view').view.zoom(1)")
    assert browser.js("return document.documentElement.scrollWidth <= window.innerWidth")


def test_every_control_has_a_name_and_a_click_on_an_edge_tells_its_values(
    browser: Browser, plans: dict[str, tuple[Plan, Path]]
) -> None:
    path = plans["resnet18"][1]
    browser.open(path)
    nameless = browser.js(
        "return [...document.querySelectorAll('button, input, select, summary, [role=button], [role=treeitem]')]"
        ".filter((e) => !(e.getAttribute('aria-label') || e.textContent.trim())).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert nameless == []
    browser.js("document.querySelector('.edge').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert "x · input → block_1" in browser.panel()
    assert browser.js("return document.querySelector('.panel td:last-child').textContent") == "3072"


@pytest.mark.slow
def test_a_plan_fits_a_small_file(plans: dict[str, tuple[Plan, Path]]) -> None:
    # ResNet-50 with what-if, beside those of the module.
    plan = plan_of("resnet50")
    assert len(html_text(plan, what_if=True).encode()) < 2e6
    assert all(path.stat().st_size < 2e6 for _, path in plans.values())
