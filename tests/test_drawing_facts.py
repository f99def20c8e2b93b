"""The page of real networks in a real browser: facts equal the plan's, text is readable, controls are named."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import seeded
from test_drawing_page import CHROMIUM, DRIVER, OVERLAPS, Browser, browser
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.drawing.boundaries import ends_of, side_inputs
from ffebm_compiler.driven import settles
from ffebm_compiler.plan import Plan

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from zoo_models import load_torchvision

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
__all__ = ["browser"]


def resnet18() -> tuple[nn.Module, Any, dict[str, Any]]:
    load_torchvision()
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.resnet18(), torch.randn(1, 3, 32, 32), {}


def vision_transformer() -> tuple[nn.Module, Any, dict[str, Any]]:
    load_torchvision()
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", depth=3, img_size=64), torch.randn(1, 3, 64, 64), {}


def gpt2() -> tuple[nn.Module, Any, dict[str, Any]]:
    load_torchvision()
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=4, n_embd=32, n_head=2, vocab_size=50)
    return transformers.GPT2Model(config), (torch.randint(0, 50, (1, 8)),), {"use_cache": False}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "resnet18": resnet18,
    "vit": vision_transformer,
    "gpt2": gpt2,
}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Plan, Path]]:
    folder = tmp_path_factory.mktemp("facts")
    found = {}
    for name, make in MODELS.items():
        model, args, kwargs = seeded(make)
        plan = ffebm.plan(model.eval(), args, kwargs, fold_batchnorm=name == "resnet18")
        plan.save_html(folder / f"{name}.html")
        found[name] = plan, folder / f"{name}.html"
    return found


@pytest.fixture(autouse=True)
def no_console_errors(browser: Browser) -> Iterator[None]:
    browser.errors()
    yield
    assert browser.errors() == []


EDGES = (
    "const view = document.querySelector('.view').view, tree = view.tree;"
    "const all = tree.edges(tree.root).edges;"
    "return all.map((e) => [e.from.title, e.to.title, e.adc, e.dac, [...e.sources], tree.labels(e), e.side])"
)


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
    # No edge runs back: every one leads from a node above to one below.
    backward = browser.js(
        "const at = (g) => g.getAttribute('transform').match(/[-\\d.]+/g).map(Number)[1];"
        "const found = [...document.querySelectorAll('.edge .tip')].filter((tip) => {"
        "  const [, end] = tip.getAttribute('d').match(/[-\\d.]+/g).map(Number);"
        "  const [, start] = tip.parentElement.querySelector('.wire').getAttribute('d').match(/[-\\d.]+/g).map(Number);"
        "  return end <= start; }); return found.length"
    )
    assert backward == 0


def test_masks_are_side_inputs_that_a_button_shows(browser: Browser, plans: dict[str, tuple[Plan, Path]]) -> None:
    plan, path = plans["gpt2"]
    side = side_inputs(plan)
    assert len(side) == 4  # one attention a layer
    assert {source for sources in side.values() for source in sources} == {"expand_2"}
    browser.open(path)
    assert browser.js("return document.querySelectorAll('.edge.side').length") == 0
    browser.button("side")
    assert browser.js("return document.querySelectorAll('.edge.side').length") > 0
    assert side_inputs(plans["resnet18"][0]) == {}
    assert side_inputs(plans["vit"][0]) == {}


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


def test_a_plan_fits_a_small_file(plans: dict[str, tuple[Plan, Path]]) -> None:
    assert all(path.stat().st_size < 2e6 for _, path in plans.values())
