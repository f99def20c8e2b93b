"""What can be moved through on the page: loop gains, the states of a block, gradients checked, two plans compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from browsing import NEEDS_BROWSER, Browser, browser, no_console_errors
from drawing_cases import chain_plan
from networks import digits_cnn, mlp
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.drawing.differences import differences_of
from ffebm_compiler.drawing.measurements import gains_of, gradients_of
from ffebm_compiler.reports.checks import Comparison

__all__ = ["browser", "no_console_errors"]
needs_browser = NEEDS_BROWSER
GAINS = (0.1, 0.5)


@pytest.fixture(scope="module")
def hybrid() -> tuple[ffebm.HybridModel, Tensor]:
    model, inputs = mlp()
    return ffebm.convert(model, inputs, feedback=0.3), inputs


@pytest.fixture(scope="module")
def page(hybrid: tuple[ffebm.HybridModel, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    made, inputs = hybrid
    path = tmp_path_factory.mktemp("moves") / "page.html"
    points = drawing.loop_gain_points(made, inputs, evaluate=lambda h: 0.75, feedbacks=GAINS)
    gradients = ffebm.check_gradients(made, inputs, lambda y: y.logsumexp(1).mean())
    made.save_html(path, gradients=gradients, diagnosis=made.diagnose(inputs, sweeps=4), loop_gains=points)
    return path


def test_points_are_what_compare_measures_and_the_feedback_is_restored(
    hybrid: tuple[ffebm.HybridModel, Tensor],
) -> None:
    made, inputs = hybrid
    before = made.compare(inputs).output
    points = drawing.loop_gain_points(made, inputs, feedbacks=reversed(GAINS))
    assert [point.value for point in points] == [None, None]
    assert made.compare(inputs).output == pytest.approx(before)
    told = gains_of(made.plan, points)
    assert told is not None
    assert [point["feedback"] for point in told["points"]] == list(GAINS)
    other = ffebm.convert(*mlp(), feedback=0.5).compare(inputs)
    assert told["points"][1]["output"] == pytest.approx(other.output, rel=1e-3)
    assert told["points"][0]["output"] < told["points"][1]["output"]


def test_points_of_another_plan_or_of_one_gain_are_refused() -> None:
    strange = drawing.GainPoint(0.1, Comparison({"block_9": 0.1}, 0.1, {"block_9": 2}, {"block_9": ("x",)}))
    with pytest.raises(ffebm.InputError, match="'block_9', which is no block of the plan"):
        gains_of(chain_plan(1), [strange])
    known = dataclasses.replace(strange, comparison=Comparison({"block_1": float("inf")}, 0.1, {}, {}))
    with pytest.raises(ffebm.InputError, match="two points are of one loop gain"):
        gains_of(chain_plan(1), [known, known])
    told = gains_of(chain_plan(1), [known])
    assert told is not None
    assert told["points"][0]["blocks"] == {"block_1": None}
    assert gains_of(chain_plan(1), []) is None


def test_recorded_states_begin_feedforward_and_end_settled(hybrid: tuple[ffebm.HybridModel, Tensor]) -> None:
    made, inputs = hybrid
    block = made.diagnose(inputs, sweeps=30)["block_1"]
    assert len(block.states) == 31
    assert all(0 < len(row) <= 48 for row in block.states[0])
    # At the feedforward values, the first state is the source's first activation.
    model, _ = mlp()
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))
    seen: list[Tensor] = []
    handle = first.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    model(inputs)
    handle.remove()
    preactivation = seen[0][0].flatten()
    step = -(-preactivation.numel() // 48)
    values = torch.tensor(block.states[0][0])
    assert torch.allclose(values, preactivation.relu()[::step], atol=1e-5)
    last, before = (
        torch.tensor([value for row in rows for value in row]) for rows in (block.states[-1], block.states[-2])
    )
    assert torch.allclose(last, before, atol=1e-6)


def test_a_blocks_gradients_are_the_reports(hybrid: tuple[ffebm.HybridModel, Tensor]) -> None:
    made, inputs = hybrid
    report = ffebm.check_gradients(made, inputs, lambda y: y.logsumexp(1).mean())
    block = made.plan.blocks[0]
    told = gradients_of(block, report)
    assert told is not None
    worst = min(report[name][report.own].cosine for name in block.weights)
    assert told["text"] == f"worst cosine of ep {worst:.6f}"
    assert told["good"] == (worst >= 0.999)
    assert len(told["rows"]) == len(block.weights) * len(report.estimators)
    assert gradients_of(block, None) is None
    bad = dataclasses.replace(
        report,
        agreements={
            name: {key: dataclasses.replace(value, cosine=0.5) for key, value in row.items()}
            for name, row in report.agreements.items()
        },
    )
    told = gradients_of(block, bad)
    assert told is not None
    assert not told["good"]


def test_differences_are_those_of_the_plans() -> None:
    model, inputs = digits_cnn()
    first, second = ffebm.plan(model, inputs), ffebm.plan(model, inputs, force_digital=("block1",))
    third = ffebm.plan(model, inputs, hardware=ffebm.Hardware(layers_per_block=1))
    told = differences_of(first, third)
    rows = {row[0]: row[1:] for row in told["rows"]}
    assert rows["energy blocks"] == (str(len(first.blocks)), str(len(third.blocks)))
    assert rows["tiles"] == tuple(str(sum(b.tiles for b in p.blocks)) for p in (first, third))
    for alone, plan, other in ((told["blocks"][0], first, third), (told["blocks"][1], third, first)):
        theirs = [set(block.layers) for block in other.blocks]
        assert alone == [block.name for block in plan.blocks if set(block.layers) not in theirs]
    same = differences_of(first, first)
    assert same["alone"] == [[], []]
    assert same["blocks"] == [[], []]
    paths = [{path for block in plan.blocks for path in block.layers} for plan in (first, second)]
    assert differences_of(first, second)["alone"] == [sorted(paths[0] - paths[1]), sorted(paths[1] - paths[0])]


@needs_browser
def test_the_slider_moves_through_measured_loop_gains(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.button("gains")
    assert "0.1" in browser.js("return document.querySelector('.panel dl dd').textContent")
    browser.js("document.querySelector('[name=gain]').focus()")
    browser.press("\ue014")
    assert browser.js("return document.querySelector('.panel dl dd').textContent") == "0.5"
    assert browser.js("return document.querySelector('[name=gain]').getAttribute('aria-valuetext')") == "κ 0.5"
    assert "accuracy" in browser.panel()
    assert "0.75" in browser.panel()
    assert browser.js("return document.querySelectorAll('.bar').length") == 1
    browser.driver.find_element("css selector", ".panel .close").click()
    assert browser.js("return document.querySelectorAll('.bar').length") == 0


@needs_browser
def test_states_play_sweep_by_sweep_and_gradients_are_marked(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert any("∇✓" in title for title in browser.titles())
    browser.click("block_1")
    assert "worst cosine of ep" in browser.panel()
    shades = "return [...document.querySelectorAll('.states rect')].map((r) => r.getAttribute('fill-opacity')).join()"
    before = browser.js(shades)
    browser.js("document.querySelector('[name=sweep]').focus()")
    browser.press("\ue014")
    assert "after sweep 1" in browser.panel()
    assert browser.js(shades) != before
    browser.js("document.querySelector('[name=play]').click()")
    assert "at the feedforward values" in browser.panel()
    assert browser.js(shades) == before
    browser.driver.execute_async_script("setTimeout(arguments[0], 2400)")
    assert "after sweep 4" in browser.panel()


@needs_browser
def test_what_two_plans_do_not_share_is_marked(browser: Browser, tmp_path: Path) -> None:
    model, inputs = digits_cnn()
    first = ffebm.plan(model, inputs)
    second = ffebm.plan(model, inputs, hardware=ffebm.Hardware(layers_per_block=1))
    drawing.save_side_by_side(first, second, tmp_path / "two.html", ("four layers", "one layer"))
    browser.open(tmp_path / "two.html", "wide")
    told = differences_of(first, second)["blocks"]
    marked = browser.js(
        "return [...document.querySelectorAll('.view')].map((v) =>"
        "  [...v.querySelectorAll('.differs > .title')].map((t) => t.textContent.match(/block_\\d+/)[0]))"
    )
    assert [sorted(names) for names in marked] == [sorted(names) for names in told]
    browser.button("differences")
    assert "four layers" in browser.panel()
