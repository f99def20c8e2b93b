"""What was measured and what is modelled, on the page and as plots."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from drawing_cases import chain_plan
from networks import mlp

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.passes.partition.compare import sweep
from ffebm_compiler.reports.diagnosis import BlockDiagnosis, Diagnosis

RESIDUALS = (0.1, 0.01, 0.001)


def record_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    (record,) = json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return record


def diagnosis(
    residuals: tuple[float, ...] = RESIDUALS, energies: tuple[float, ...] = (5.0, 4.0, 3.5, 3.4)
) -> Diagnosis:
    settled = BlockDiagnosis(("layers.0.linear",), 0.3, 4, 2, residuals, energies, True)
    plain = BlockDiagnosis(("layers.1.linear",), 0.0, 0, 0, (), (), False)
    return Diagnosis({"block_1": settled, "block_2": plain})


def test_the_page_holds_the_curves_of_a_diagnosis(tmp_path: Path) -> None:
    model, inputs = mlp()
    hybrid = ffebm.convert(model, inputs)
    found = hybrid.diagnose(inputs, sweeps=5)
    hybrid.save_html(tmp_path / "page.html", diagnosis=found)
    record = record_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    block = found["block_1"]
    curves = record["homes"][0]["curves"]
    assert curves["residuals"] == list(block.residuals)
    assert curves["energies"] == [energy - block.energies[0] for energy in block.energies]
    assert curves["sweeps"] == block.sweeps
    assert dict(curves["facts"])["residual's ratio per sweep"] == f"{block.rate:.3g}"
    rate = next(overlay for overlay in record["overlays"] if overlay["name"] == "rate")
    assert rate["values"]["block_1"]["text"] == f"rate {block.rate:.3g}"


def test_a_block_without_feedback_has_no_curve_and_what_diverged_is_a_gap() -> None:
    found = diagnosis((0.1, math.inf, math.nan), (1.0, 2.0, math.inf, math.nan))
    homes = record_of(drawing.html_text(chain_plan(2), diagnosis=found))["homes"]
    analog = [home for home in homes if home["domain"] == "analog"]
    assert analog[0]["curves"]["residuals"] == [0.1, None, None]
    assert analog[0]["curves"]["energies"] == [0.0, 1.0, None, None]
    assert analog[1]["curves"] is None


def test_a_diagnosis_of_another_model_is_refused() -> None:
    with pytest.raises(ffebm.InputError, match=r"the diagnosis names 'block_2', which is no block of the plan"):
        drawing.html_text(chain_plan(1), diagnosis=diagnosis())


def test_the_page_holds_the_costs_with_their_sources() -> None:
    model, inputs = mlp()
    hybrid = ffebm.convert(model, inputs)
    report = hybrid.cost_report()
    record = record_of(drawing.html_text(hybrid.plan, hybrid))
    assert dict(record["homes"][0]["costs"])["one inference"] == str(report.blocks[0].inference)
    assert record["costs"]["rows"][0] == ["one inference", str(report.inference), str(report.digital_inference)]
    assert [row[0] for row in record["costs"]["constants"]] == list(report.constants)
    assert all(row[3] for row in record["costs"]["constants"])


def test_costs_that_cannot_be_modelled_leave_a_note() -> None:
    plan = chain_plan(1)
    plan = dataclasses.replace(plan, hardware=dataclasses.replace(plan.hardware, costs={"adc_pjj": 1.0}))
    record = record_of(drawing.html_text(plan))
    assert record["costs"] is None
    assert record["homes"][0]["costs"] == []
    assert record["notes"][-1].startswith("no costs are shown: costs names 'adc_pjj'")


def test_relaxation_plot_has_a_line_for_each_block_with_feedback() -> None:
    figure = drawing.plot_relaxation(diagnosis())
    residuals, energies = figure.axes
    assert [line.get_label() for line in residuals.lines[:1]] == ["block_1"]
    assert list(residuals.lines[0].get_ydata()) == list(RESIDUALS)
    assert (list(residuals.lines[1].get_xdata()), list(residuals.lines[1].get_ydata())) == ([2], [0.01])
    assert list(energies.lines[0].get_ydata()) == pytest.approx([1.0, 0.6 / 1.6, 0.1 / 1.6, 0.0])
    assert len(energies.lines) == 1


def test_relaxation_plot_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    figure = drawing.plot_relaxation(diagnosis((0.1, math.inf, math.nan), (1.0, 2.0, math.inf, math.nan)))
    figure.savefig(tmp_path / "p.png")
    assert [math.isnan(value) for value in figure.axes[0].lines[0].get_ydata()] == [False, True, True]
    with pytest.raises(ffebm.InputError, match="no block of the diagnosis has feedback"):
        drawing.plot_relaxation(Diagnosis({}))


def test_hardware_plot_shows_every_row_and_joins_the_best(tmp_path: Path) -> None:
    plan = ffebm.plan(*mlp())
    rows = sweep(plan, {"layers_per_block": [1, 2, 3], "tile_rows": [16, 64]})
    figure = drawing.plot_hardware(rows)
    axes = figure.axes[0]
    assert [tuple(point) for point in axes.collections[0].get_offsets()] == [(r.tiles, r.conversions) for r in rows]
    assert len(axes.texts) == len({(row.tiles, row.conversions) for row in rows})
    best = [tuple(point) for point in axes.collections[1].get_offsets()]
    top = [row for row in rows if row.analog_macs == max(r.analog_macs for r in rows)]
    assert all(any(b[0] <= row.tiles and b[1] <= row.conversions for b in best) for row in top)
    assert not any(a != b and a[0] <= b[0] and a[1] <= b[1] for a in best for b in best)
    figure.savefig(tmp_path / "p.png")
    with pytest.raises(ffebm.InputError, match="the sweep holds no row"):
        drawing.plot_hardware([])
    with pytest.raises(ffebm.InputError, match=r"rows is a SweepRow; expected a Sequence, which .*compare\.sweep\("):
        drawing.plot_hardware(rows[0])
    with pytest.raises(ffebm.InputError, match=r"rows\[1\] is a int; expected a SweepRow, which .*compare\.sweep\("):
        drawing.plot_hardware([rows[0], 3])
