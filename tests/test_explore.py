"""`ffebm.explore`: accuracy and costs over hardware, loop gain and devices."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from by_name import interrupted_at, minus_distance
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.accuracy.exploration import Exploration, Point
from ffebm_compiler.hardware.costs import Quantity

DEVICES = ffebm.Devices(programming=0.1, name="<b>errs</b>")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@cache
def task() -> tuple[Tensor, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).eval()
    return torch.randn(32, 6), model


def score(net: Callable[[Tensor], Tensor]) -> float:
    return minus_distance(net, *task())


def explored(evaluate: Any = score, **options: Any) -> Exploration:
    x, model = task()
    given: dict[str, Any] = {
        "hardware": ["crossbar-64", "pcm-64"],
        "feedback": [0.1, 0.4],
        "devices": [None, DEVICES],
        "draws": 2,
    }
    return ffebm.explore(model, x[:2], evaluate, **{**given, **options})


@cache
def result() -> Exploration:
    return explored()


def test_every_combination_is_measured_and_costed() -> None:
    found = result()
    assert found.source == 0
    assert len(found.points) == 8
    assert found.refused == ()
    x, model = task()
    for point in found.points:
        devices = None if point.devices == "none" else DEVICES
        hybrid = ffebm.convert(model, x[:2], hardware=point.hardware, feedback=point.feedback).eval()
        report = hybrid.cost_report()
        assert point.energy == report.inference
        assert point.chip_energy == report.chip_inference
        assert point.chip_energy.known == (point.hardware == "pcm-64")
        values = []
        for draw in range(2 if devices else 1):
            hybrid.set_devices(None if devices is None else ffebm.Devices(programming=0.1, seed=draw))
            values.append(score(hybrid))
        assert point.value == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert (point.error is None) == (devices is None)
        fabric = ffebm.hardware_presets()[point.hardware]
        assert point.area == point.tiles * (fabric.tile_rows or 0) * (fabric.tile_cols or 0)
        assert point.analog_share == 1


def test_the_pareto_front() -> None:
    def point(value: float, energy: float | None, area: float) -> Point:
        pj, ns = Quantity(energy, energy, "pJ"), Quantity(None, None, "ns")
        return Point("chip", 0.1, "none", value, None, pj, ns, pj, ns, area, 1, 1, 1, 1.0)

    points = (
        point(0.9, 5, 2),
        point(0.8, 4, 2),
        point(0.8, 5, 2),
        point(0.7, 4, 3),
        point(0.6, 9, 1),
        point(0.9, 5, 2),
    )
    found = Exploration("Net", 0.95, True, points, ())
    assert found.objectives == ("energy", "area")
    assert found.front == (points[0], points[1], points[4], points[5])
    lower = Exploration("Net", 0.95, False, points, ())
    assert lower.front == (points[1], points[3], points[4])
    chip = Quantity(2.0, 3.0, "pJ")
    chips = Exploration("Net", 0.95, True, tuple(replace(each, chip_energy=chip) for each in points), ())
    assert chips.objectives == ("energy at chip level", "area")
    assert [point.value for point in chips.front] == [0.9, 0.6, 0.9]
    unknown = Exploration("Net", 0.95, True, (*points, point(0.1, None, 9)), ())
    assert unknown.objectives == ("area",)
    assert unknown.front == (points[0], points[4], points[5])


def test_table_and_files(tmp_path: Path) -> None:
    found = result()
    text = str(found)
    assert "8 combinations, source" in text
    assert "modelled" in text
    assert "chip level" in text
    assert max(map(len, text.splitlines())) <= 120
    found.to_json(tmp_path / "found.json")
    data = json.loads((tmp_path / "found.json").read_text())
    assert sum(point["front"] for point in data["points"]) == len(found.front)
    page = found.html()
    assert "<b>errs</b>" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "iframe" in found._repr_html_()


def test_hardware_without_room_for_a_layer_is_listed_or_refused() -> None:
    x, model = task()
    tiny = ffebm.Hardware(tile_rows=1, tile_cols=1, tiles_per_core=1, name="tiny")
    found = ffebm.explore(model, x, score, hardware=[tiny, "crossbar-64"])
    assert [point.hardware for point in found.points] == ["crossbar-64"]
    (refused,) = found.refused
    assert refused.reason.startswith("no layer of the network is analog on tiny (0: ")
    with pytest.raises(ffebm.InputError, match=r"no layer of the network is analog on tiny .*there is nothing to expl"):
        ffebm.explore(model, x, score, hardware=[tiny])


def test_what_is_not_possible_is_listed() -> None:
    unrolled = ffebm.Hardware(conv_mapping="unrolled", name="unrolled")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    x = torch.randn(2, 1, 6, 6)
    found = ffebm.explore(model, x, lambda net: net(x).mean(), hardware=[unrolled], devices=[None, "pcm"], draws=1)
    (refused,) = found.refused
    assert (refused.hardware, refused.devices) == ("unrolled", "pcm")
    assert "tiles of its own for every output position" in refused.reason
    assert "not possible: unrolled, κ 0.1, devices pcm: layer '0'" in str(found)
    nothing = Exploration("Net", 1.0, True, (), found.refused)
    assert "no combination is possible" in str(nothing)
    with pytest.raises(ffebm.InputError, match="nothing to draw"):
        nothing.html()


def test_an_interrupted_exploration_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "exploration.json"
    calls: list[int] = []
    interrupted = interrupted_at(9, score, calls)
    with pytest.raises(KeyboardInterrupt):
        explored(interrupted, file=file)
    kept = json.loads(file.read_text())["results"]
    assert 2 <= len(kept) <= 5
    with ThreadPoolExecutor(2) as threads:
        assert explored(file=file, executor=threads) == result()
    calls[:] = []
    assert explored(interrupted, file=file) == result()
    assert len(calls) == 2  # of the source alone
    # Another metric, and another network, are other explorations.
    with pytest.raises(ffebm.InputError, match="of another exploration: its value of the source is"):
        explored(lambda net: 1 + score(net), file=file)
    x, _ = task()
    other = nn.Sequential(nn.Linear(6, 3)).eval()
    with pytest.raises(ffebm.InputError, match="of another exploration: its weights is"):
        ffebm.explore(other, x[:2], score, draws=2, file=file)
    damaged = json.loads(file.read_text())
    next(iter(damaged["results"].values())).pop("value")
    file.write_text(json.dumps(damaged))
    with pytest.raises(ffebm.InputError, match=r"exploration.json: a point .* is damaged \(KeyError: 'value'\)"):
        explored(file=file)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"evaluate": 1}, ffebm.InputError, "evaluate is a int"),
        ({"hardware": []}, ffebm.InputError, "hardware is an empty list"),
        ({"hardware": "tpu"}, ffebm.HardwareError, "tpu"),
        ({"feedback": [1.5]}, ffebm.InputError, "feedback"),
        ({"devices": ["flash"]}, ffebm.InputError, "devices is 'flash'"),
        ({"draws": 0}, ffebm.InputError, "draws is 0"),
        ({"age": -2}, ffebm.InputError, "age is -2"),
        ({"executor": 3}, ffebm.InputError, "executor is a int"),
        ({"gradient": "ep"}, ffebm.InputError, "there is no argument 'gradient'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        explored(**arguments)


def test_an_evaluate_that_fails_or_draws() -> None:
    x, _ = task()
    with pytest.raises(ffebm.InputError, match="evaluate is not deterministic"):
        explored(lambda net: net(torch.randn_like(x)).sum())
    calls = []

    def failing(net: Any) -> float:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("disk full")
        return 1.0

    said = r"with hardware crossbar-64, feedback 0\.1, devices <b>errs</b>: RuntimeError: disk full"
    with pytest.raises(ffebm.InputError, match=said):
        explored(failing)


def test_negative_costs() -> None:
    with pytest.raises(ffebm.HardwareError, match=r"costs\['adc_pj'\] must be a finite number of at least 0, got -1"):
        ffebm.Hardware(costs={"adc_pj": -1})


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")), reason="needs chromium and chromium-driver")
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    webdriver = pytest.importorskip("selenium.webdriver")
    found = result()
    found.save_html(tmp_path / "page.html")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get((tmp_path / "page.html").as_uri())

        def all_of(selector: str) -> list[Any]:
            return list(driver.find_elements("css selector", selector))

        assert driver.get_log("browser") == []
        assert len(all_of("svg .point")) == len(all_of("tbody tr")) == 8
        assert "errs" in driver.page_source
        driver.execute_script("document.querySelector('#x').value='area';"
                              "document.querySelector('#x').dispatchEvent(new Event('change'))")  # fmt: skip
        assert "area (crosspoints)" in all_of("#picture")[0].text
        driver.execute_script("document.querySelectorAll('input[type=checkbox]')[0].click()")
        assert len(all_of("svg .point")) == 4
        driver.execute_script("document.querySelectorAll('thead button')[4].click()")
        assert "▼" in all_of("thead")[0].text
        all_of("tbody tr")[0].click()
        assert "loop gain: " in all_of("#told")[0].text
        assert len(all_of("svg .point.chosen")) == 1
        assert driver.get_log("browser") == []
    finally:
        driver.quit()
