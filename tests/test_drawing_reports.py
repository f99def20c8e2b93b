"""The reports of the page: the floor plan, conversions as a flow, latency as a timeline, shares of a total."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from browsing import NEEDS_BROWSER, Browser, browser, no_console_errors
from drawing_cases import chain_plan
from networks import digits_cnn

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.drawing.floor import floor_plan
from ffebm_compiler.drawing.record import record_of
from ffebm_compiler.passes.partition.placement import placement_of
from ffebm_compiler.reports.costs import cost_report

__all__ = ["browser", "no_console_errors"]
needs_browser = NEEDS_BROWSER
TIMES = {"read_ns": 100.0, "adc_ns": 1.0, "dac_ns": 1.0, "digital_ns": 0.5, "converters": 64}


@pytest.fixture(scope="module")
def plan() -> ffebm.Plan:
    model, inputs = digits_cnn()
    return ffebm.plan(model, inputs, hardware=ffebm.Hardware(tile_rows=64, tile_cols=64, tiles_per_core=16))


def test_the_floor_plan_is_the_placement(plan: ffebm.Plan) -> None:
    floor, placement = floor_plan(plan), placement_of(plan)
    assert floor["used"] == placement.tiles == sum(block.tiles for block in plan.blocks)
    assert floor["utilisation"] == placement.utilisation
    drawn: dict[tuple[int, int], float] = {}
    for layer in floor["layers"]:
        at = layer["first"]
        for share, times in layer["runs"]:
            for _ in range(times):
                assert (layer["core"], at) not in drawn
                drawn[layer["core"], at] = share
                at += 1
    tiles = {(tile.core, tile.index): round(tile.utilisation, 3) for one in placement.layers for tile in one.tiles()}
    assert drawn == tiles
    paths = [plan.graph.operations[layer["op"]].path for layer in floor["layers"]]
    assert paths == [layer.layer for layer in placement.layers]


def test_a_floor_plan_that_cannot_be_drawn_says_why(plan: ffebm.Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def why(hardware: ffebm.Hardware) -> str:
        return floor_plan(dataclasses.replace(plan, hardware=hardware))["why"]

    assert "tiles or cores without limit" in why(ffebm.Hardware(tiles_per_core=None))
    tight = ffebm.Hardware(tile_rows=64, tile_cols=64, tiles_per_core=3, cores=1)
    assert "the blocks do not fit the only core" in why(tight)
    assert floor_plan(dataclasses.replace(plan, blocks=()))["why"] == "no layer is on a tile"
    monkeypatch.setattr("ffebm_compiler.drawing.floor._MOST_TILES", 1)
    assert "tiles are too many to draw one by one" in why(plan.hardware)


def test_the_timeline_adds_up_to_the_modelled_latency(plan: ffebm.Plan) -> None:
    timed = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, costs=TIMES))
    report, record = cost_report(timed), record_of(timed)
    rows = record["costs"]["timeline"]["rows"]
    homes = [home["title"] for home in record["homes"]]
    assert [row[0] for row in rows] == homes
    assert sum(row[1] for row in rows) == pytest.approx(report.latency.low)
    assert sum(row[2] for row in rows) == pytest.approx(report.latency.high)
    assert record["costs"]["timeline"]["total"] == str(report.latency)
    shares = {name: share for name, share, _ in record["costs"]["time"]}
    assert shares["blocks"] == pytest.approx(report.block_latency.low / report.latency.low)
    # Without the time of a read there is none.
    fewer = {name: value for name, value in TIMES.items() if name != "read_ns"}
    partial = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, costs=fewer))
    told = record_of(partial)["costs"]["timeline"]
    assert (told["rows"], told["missing"]) == ([], ["read_ns"])
    unknown = record_of(plan)["costs"]
    assert unknown["timeline"]["rows"] == []
    assert set(unknown["timeline"]["missing"]) == {*TIMES} - {"digital_ns"}
    assert unknown["time"] == []


def test_the_shares_of_the_energy_add_up_to_the_total(plan: ffebm.Plan) -> None:
    report, record = cost_report(plan), record_of(plan)
    energy = record["costs"]["energy"]
    assert sum(share for _, share, _ in energy) == pytest.approx(1)
    middle = (report.inference.low + report.inference.high) / 2
    shares = {name: share for name, share, _ in energy}
    expected = sum(cost.analog.low + cost.analog.high for cost in report.blocks) / 2 / middle
    assert shares["crossbars"] == pytest.approx(expected)
    assert len(energy) == 4


def record_in(page: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])[0]


@needs_browser
def test_the_flow_of_conversions_adds_up_to_the_plans(browser: Browser, plan: ffebm.Plan, tmp_path: Path) -> None:
    plan.save_html(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.button("flows")
    told = browser.js("return [...document.querySelectorAll('.flow title')].map((t) => t.textContent)")
    numbers = [int(word) for text in told for word in re.findall(r"(?:DAC|ADC) (\d+)", text)]
    assert sum(numbers) == plan.conversions
    # Widths are in proportion to values: the widest arrow has the most.
    width = "return [...document.querySelectorAll('.flow')].map((f) => Number(f.getAttribute('stroke-width')))"
    values = [sum(int(word) for word in re.findall(r"(?:DAC|ADC) (\d+)", text)) for text in told]
    ratios = [w / v for w, v in zip(browser.js(width), values, strict=True) if w > 1.2]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.01)
    browser.js("document.querySelector('.flow').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert "→" in browser.panel()


@needs_browser
def test_a_folded_stage_says_what_its_flows_hide(browser: Browser, tmp_path: Path) -> None:
    plan = chain_plan(40)
    plan.save_html(tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    browser.button("flows")
    assert f"{plan.conversions} values per sample" in browser.panel()
    assert "of them are inside of folded stages" in browser.panel()


@needs_browser
def test_tiles_and_bars_are_drawn_and_lead_to_their_layers(browser: Browser, plan: ffebm.Plan, tmp_path: Path) -> None:
    timed = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, costs=TIMES))
    drawing.save_html(timed, tmp_path / "page.html")
    browser.open(tmp_path / "page.html")
    assert browser.js("return document.querySelectorAll('.top .budget').length") == 2
    browser.button("floor")
    used = browser.js("return document.querySelectorAll('.tiles [class*=full-]').length")
    assert used == sum(block.tiles for block in plan.blocks)
    browser.js(
        "document.querySelector('.tiles [class*=full-]').dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert plan.blocks[0].layers[0] in browser.panel() or "analog" in browser.panel()
    browser.button("timeline")
    rows = browser.js("return [...document.querySelectorAll('.timeline .row')].map((r) => r.innerText.split('\\n')[0])")
    assert rows == [home["title"] for home in record_in(tmp_path / "page.html")["homes"]]
    inside = browser.js(
        "return [...document.querySelectorAll('.timeline .span')].every((s) => {"
        "  const [a, b] = [s.getBoundingClientRect(), s.parentElement.getBoundingClientRect()];"
        "  return a.left >= b.left - 1 && a.right <= b.right + 2; })"
    )
    assert inside
