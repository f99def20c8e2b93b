"""Pictures of plans: content, geometry, inert names, files."""

from __future__ import annotations

import html
import json
import math
import re
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import networkx
import pytest
import torch
from drawing_cases import chain_plan
from networks import digits_cnn, mlp, transformer
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler import drawing
from ffebm_compiler.drawing.layout import layered
from ffebm_compiler.drawing.record import record_of
from ffebm_compiler.drawing.scene import scene_of, shape_words
from ffebm_compiler.drawing.svg import svg_text
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.plan import Plan, PlanOptions

NASTY = "</script><script>document.title='owned'</script>\"'&<b>\u202eé\x07\x00层"


def words(svg: str) -> list[str]:
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


def data_of(page: str) -> list[dict[str, object]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


# -- scene -------------------------------------------------------------------------------------


def test_the_scene_holds_every_block_part_input_and_output_once() -> None:
    plan = ffebm.plan(*digits_cnn())
    nodes = [node.key for node in scene_of(plan).nodes]
    expected = (
        {b.name for b in plan.blocks} | {p.name for p in plan.digital_parts} | set(plan.graph.inputs) | {"output"}
    )
    assert set(nodes) == expected
    assert len(nodes) == len(expected)


def test_edges_carry_what_crosses_the_converters() -> None:
    plan = ffebm.plan(*digits_cnn())
    edges = scene_of(plan).edges
    for block in plan.blocks:
        into = [edge for edge in edges if edge.target == block.name]
        assert sum(edge.values for edge in into) == block.dac
        assert all("DAC" in edge.conversion for edge in into)
    digital = {part.name for part in plan.digital_parts}
    assert all(not edge.conversion for edge in edges if {edge.source, edge.target} <= digital)


def test_shapes_leave_the_batch_out_and_are_not_claimed_where_they_do_not_fit() -> None:
    assert shape_words((None, 16, 8, 8), 1024) == "16×8×8"
    assert shape_words((10, None, 64), 640) == "10×64"
    assert shape_words((40, 64), 640) == "640 values"
    assert shape_words((), 1) == "1 value"


# -- layout ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_layout_has_no_overlap_and_every_edge_goes_down(seed: int) -> None:
    graph = networkx.gnp_random_graph(18, 0.16, seed=seed, directed=True)
    edges = {(f"n{a}", f"n{b}"): (50.0, 28.0) for a, b in graph.edges if a < b}
    sizes = {f"n{i}": (60.0 + 13 * (i % 5), 30.0 + 9 * (i % 3)) for i in graph.nodes}
    layout = layered(sizes, edges)
    for a, b in combinations(sizes, 2):
        (ax, ay), (bx, by) = layout.centres[a], layout.centres[b]
        apart_x = abs(ax - bx) >= (sizes[a][0] + sizes[b][0]) / 2
        apart_y = abs(ay - by) >= (sizes[a][1] + sizes[b][1]) / 2
        assert apart_x or apart_y
    for (source, target), route in layout.routes.items():
        heights = [y for _, y in route.points]
        assert heights == sorted(heights)
        assert route.points[0][0] == layout.centres[source][0]
        assert route.points[-1][0] == layout.centres[target][0]
        assert all(0 <= x <= layout.width for x, _ in route.points)


def test_layout_of_a_plain_chain_is_one_straight_column() -> None:
    layout = layered(dict.fromkeys("abcd", (40.0, 20.0)), dict.fromkeys(("ab", "bc", "cd"), (10.0, 10.0)))
    assert {round(x, 6) for x, _ in layout.centres.values()} == {20.0}


# -- SVG ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [mlp, digits_cnn, transformer])
def test_svg_names_every_block_layer_and_total(network: object) -> None:
    plan = ffebm.plan(*network())  # type: ignore[operator]
    text = "\n".join(words(drawing.svg_text(plan)))
    for block in plan.blocks:
        assert f"{block.name} · analog" in text
        for layer in block.layers:
            assert f"{layer}: " in text
        assert f"DAC {block.dac}" in text
    for part in plan.digital_parts:
        assert f"{part.name} · digital" in text
    assert f"{len(plan.blocks)} energy block" in text


def test_svg_is_the_same_every_time_and_needs_nothing_else() -> None:
    plan = ffebm.plan(*digits_cnn())
    svg = drawing.svg_text(plan)
    assert svg == drawing.svg_text(Plan.from_dict(plan.to_dict()))
    assert not re.search(r"<script|<style|<image|href|url\(", svg)


def test_svg_says_what_stayed_digital_and_why() -> None:
    text = " ".join(words(drawing.svg_text(chain_plan(3, rejected=(1,)))))
    assert "layers.1.linear: linear stayed digital" in text
    assert "stayed digital: layers.1.linear: it needs 65 tiles, a core has 64" in text


def test_names_are_inert_in_svg() -> None:
    svg = drawing.svg_text(chain_plan(2, prefix=NASTY, model=NASTY))
    root = ElementTree.fromstring(svg)
    assert {element.tag.split("}")[1] for element in root.iter()} <= {"svg", "title", "rect", "g", "path", "text"}
    assert "\u202e" not in svg


@pytest.mark.parametrize(
    ("energy", "words"),
    [
        ("hopfield", ""),
        ("resistive", "resistors on lines ±s, diodes, amplifiers"),
        ("unamplified", "resistors on lines ±s, diodes"),
        ("drn", "resistors and diodes alone"),
    ],
)
def test_resistive_blocks_are_drawn_as_circuits(energy: str, words: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    hybrid = ffebm.convert(model, x, energy=energy)
    (node,) = [node for node in scene_of(hybrid.plan, hybrid).nodes if node.domain == "analog"]
    assert node.circuit == bool(words)
    assert (f"circuit: {words}" in [line.text for line in node.lines]) == bool(words)
    picture = svg_text(hybrid.plan, hybrid)
    assert ("settles as a circuit: its nodes are states" in picture) == bool(words)
    (home,) = [home for home in record_of(hybrid.plan, hybrid)["homes"] if home["domain"] == "analog"]
    assert (("circuit", words) in home["facts"]) == bool(words)
    assert home["sentence"] == f"Energy block: its layers settle together{' as a circuit' if words else ''}."
    single = ffebm.convert(model, x, energy=energy, hardware=ffebm.Hardware(layers_per_block=1))
    assert not any(node.circuit for node in scene_of(single.plan, single).nodes)


def test_a_thousand_blocks_are_drawn_in_seconds() -> None:
    assert drawing.svg_text(chain_plan(1000)).count("· analog, no feedback</text>") == 1000


# -- HTML --------------------------------------------------------------------------------------


def test_page_holds_every_operation_with_its_reason() -> None:
    plan = chain_plan(4, rejected=(2,))
    (record,) = data_of(drawing.html_text(plan))
    ops = record["ops"]
    assert [op["name"] for op in ops] == [op.name for op in plan.graph.operations]
    assert all(op["reason"] for op in ops)
    assert [op["path"] for op in ops if op["stayed"]] == ["layers.2.linear"]
    held = sorted(index for home in record["homes"] for index in home["ops"])
    assert held == list(range(len(ops)))


def test_page_needs_no_other_file_and_allows_no_other_script() -> None:
    page = drawing.html_text(chain_plan(2))
    assert not re.search(r"""(src|href)=["'](?!data:,)""", page)
    assert "default-src 'none'; script-src 'sha256-" in page
    assert "MIT License" in page


def test_names_cannot_leave_the_data_of_the_page() -> None:
    page = drawing.html_text(chain_plan(2, prefix=NASTY, model=NASTY))
    assert page.count("<script") == 2
    assert page.count("</script") == 2
    (record,) = data_of(page)
    assert "</script><script>document.title='owned'</script>\"'&<b>\ufffdé\ufffd\ufffd层" in record["title"]


def test_names_cannot_leave_the_frame_of_a_notebook() -> None:
    class Outside(HTMLParser):
        names: tuple[str, ...] = ()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.names = (*self.names, tag)
            assert {name for name, _ in attrs} == {"sandbox", "srcdoc", "title", "style", "loading"}

        def handle_data(self, data: str) -> None:
            raise AssertionError(f"text beside the frame: {data!r}")

    outside = Outside()
    outside.feed(drawing.notebook_html(chain_plan(2, prefix=NASTY + "</iframe>", model=NASTY)))
    outside.close()
    assert outside.names == ("iframe",)


def test_tiles_of_the_layers_sum_to_the_block_and_devices_are_counted() -> None:
    plan = ffebm.plan(*digits_cnn())
    (record,) = data_of(drawing.html_text(plan))
    for home in record["homes"]:
        if home["domain"] == "analog":
            block = plan.block(home["title"])
            assert sum(int(layer[3]) for layer in home["layers"]) == block.tiles
    assert chain_plan(1).blocks[0].tiles == 1
    (small,) = data_of(drawing.html_text(chain_plan(1)))
    # 64·64 weights of two devices on one tile of 256·256.
    assert small["homes"][0]["facts"][0] == ["tiles", "1, 12.5 % of their devices used"]


def test_notebook_output_is_a_sandboxed_frame_with_the_page() -> None:
    output = ffebm.convert(*mlp())._repr_html_()
    frame = re.fullmatch(r'<iframe sandbox="([^"]*)" srcdoc="([^"]*)"[^<]*></iframe>', output)
    assert frame
    assert set(frame[1].split()) == {"allow-scripts", "allow-downloads"}
    assert html.unescape(frame[2]).startswith("<!DOCTYPE html>")


def test_overlays_show_what_was_measured(tmp_path: Path) -> None:
    model, inputs = mlp()
    hybrid = ffebm.convert(model, inputs).eval()
    comparison = hybrid.compare(inputs)
    gradients = ffebm.check_gradients(hybrid, inputs, lambda y: y.square().mean())
    hybrid(inputs)
    hybrid.save_html(tmp_path / "page.html", comparison=comparison, gradients=gradients)
    (record,) = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))
    gain, deviation, agreement = record["overlays"]
    block = hybrid.blocks[0]
    assert gain["values"][block.name]["text"] == f"loop gain {block.loop_gain:.3g}"
    assert deviation["values"][block.name]["text"] == f"deviation {comparison.blocks[block.name]:.3g}"
    worst = max(1 - gradients[name]["ep"].cosine for name in block.plan.weights)
    assert agreement["values"][block.name]["text"] == f"1 − cos ep {max(worst, 0.0):.3g}"
    measured = dict(record["homes"][0]["measured"])
    assert measured["loop gain κ"] == f"{block.loop_gain:.3g}"
    assert measured["sweeps in the last forward"] == str(comparison.sweeps[block.name])


def test_the_gradients_on_a_page_are_those_of_the_hybrid_s_own_estimator() -> None:
    model, inputs = mlp()
    hybrid = ffebm.convert(model, inputs, gradient="implicit").eval()
    gradients = ffebm.check_gradients(hybrid, inputs, lambda y: y.square().mean())
    overlay = drawing.gradient_overlay(hybrid.plan, gradients)
    (block,) = (block for block in hybrid.blocks if block.name in overlay.values)
    assert overlay.name == "1 − cos implicit"
    worst = max(1 - gradients[name]["implicit"].cosine for name in block.plan.weights)
    assert overlay.values[block.name] == max(0.0, worst)


def test_overlay_bars_are_shares_of_the_largest_value() -> None:
    linear = drawing.Overlay("x", "", {"a": 1.0, "b": 0.25, "c": float("nan")}).to_dict()["values"]
    assert [linear[name]["share"] for name in "abc"] == [1.0, 0.25, 1.0]
    powers = drawing.Overlay("x", "", {"a": 1.0, "b": 1e-3, "c": 0.0, "d": 1e-9}, logarithmic=True).to_dict()["values"]
    assert [round(powers[name]["share"], 9) for name in "abcd"] == [1.0, 0.5, 0.0, 0.0]


def test_an_overlay_of_another_model_is_refused() -> None:
    comparison = ffebm.Comparison({"block_9": 0.1}, 0.1, {}, {})
    with pytest.raises(ffebm.InputError, match=r"names 'block_9', which is no block of the plan"):
        drawing.deviation_overlay(chain_plan(2), comparison)
    with pytest.raises(ffebm.InputError, match=r"names no weight of the plan's blocks"):
        drawing.gradient_overlay(chain_plan(2), _report("other.weight"))


def _report(name: str) -> ffebm.GradientReport:
    from ffebm_compiler.reports.checks import Agreement

    return ffebm.GradientReport({name: dict.fromkeys(("ep", "implicit", "unrolled"), Agreement(1.0, 0.0))})


def test_two_plans_beside_each_other(tmp_path: Path) -> None:
    drawing.save_side_by_side(chain_plan(2, model="First"), chain_plan(3, model="Second"), tmp_path / "two.html")
    records = data_of((tmp_path / "two.html").read_text(encoding="utf-8"))
    assert [record["title"] for record in records] == ["First on test", "Second on test"]


# -- bad input ---------------------------------------------------------------------------------


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "p.svg"
    path.write_text("old" * 100_000)
    drawing.save_svg(chain_plan(1), path)
    assert path.read_text(encoding="utf-8") == drawing.svg_text(chain_plan(1))


@pytest.mark.parametrize("save", [drawing.save_svg, drawing.save_html])
def test_a_path_that_cannot_be_written_is_named(save: object, tmp_path: Path) -> None:
    with pytest.raises(ffebm.ExportError, match=r"missing.p: No such file or directory; give a file name"):
        save(chain_plan(1), tmp_path / "missing" / "p")  # type: ignore[operator]
    with pytest.raises(ffebm.ExportError, match=r"Is a directory|Permission denied"):
        save(chain_plan(1), tmp_path)  # type: ignore[operator]
    with pytest.raises(ffebm.InputError, match="path is None; expected the name of a file"):
        save(chain_plan(1), None)  # type: ignore[operator]


def test_an_empty_graph_is_refused() -> None:
    full = chain_plan(1)
    empty = Plan(
        "Empty", full.hardware, PlanOptions(), (), (), {}, {}, (), ("",), OperationGraph({"x": 1}, (), ("x",))
    )  # fmt: skip
    for draw in (drawing.svg_text, drawing.html_text, drawing.notebook_html):
        with pytest.raises(ffebm.PlanError, match="the plan of Empty has no operation, so there is nothing to draw"):
            draw(empty)


def test_a_missing_layout_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ffebm.ExportError, match=r"takes its layout from the package netron, which is not installed"):
        drawing.html_text(chain_plan(1))


# -- other tools -------------------------------------------------------------------------------


def test_dot_has_every_node_and_edge_and_no_open_quote() -> None:
    plan = chain_plan(3, prefix=NASTY + "\\", rejected=(1,))
    text = drawing.dot_text(plan)
    scene = scene_of(plan)
    # A quoted string of DOT: anything but a bare quote, with escaped characters.
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "Q", text)
    assert '"' not in bare
    assert bare.count("Q -> Q [label=Q") == len(scene.edges)
    assert len(re.findall(r"^  Q \[label=Q, shape", bare, re.MULTILINE)) == len(scene.nodes)


def test_model_explorer_reads_every_operation_under_its_block() -> None:
    plan = ffebm.plan(*digits_cnn())
    collection = json.loads(drawing.model_explorer_text(plan))
    (graph,) = collection["graphs"]
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == len(plan.graph.operations) + len(plan.graph.inputs) + 1
    for op in plan.graph.operations:
        assert nodes[op.name]["namespace"].split("/")[0] == plan.home(op.name)
        assert [edge["sourceNodeId"] for edge in nodes[op.name]["incomingEdges"]] == list(op.inputs)
    assert all(edge["sourceNodeId"] in nodes for node in nodes.values() for edge in node["incomingEdges"])


# -- PNG, PDF and plots ------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_image_has_its_format_and_takes_any_name(tmp_path: Path, suffix: str, start: bytes) -> None:
    path = tmp_path / f"partition.{suffix}"
    drawing.save_image(chain_plan(3, prefix="層$x_{$ " + NASTY, rejected=(1,)), path)
    assert path.read_bytes().startswith(start)


def test_png_shows_the_colours_of_both_domains(tmp_path: Path) -> None:
    from matplotlib.image import imread

    plan = ffebm.plan(*digits_cnn())
    drawing.save_image(plan, tmp_path / "p.png", dpi=96)
    pixels = (imread(tmp_path / "p.png")[..., :3] * 255).round().astype(int)
    width, height = re.search(r'width="(\d+)" height="(\d+)"', drawing.svg_text(plan)).groups()  # type: ignore[union-attr]
    assert abs(pixels.shape[0] - int(height)) <= 1
    assert abs(pixels.shape[1] - int(width)) <= 1
    for fill, _ in (drawing.svg.COLOURS[domain] for domain in ("analog", "digital")):
        colour = [int(fill[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == colour).all(-1).sum() > 5000


def test_image_refuses_other_formats_and_resolutions(tmp_path: Path) -> None:
    with pytest.raises(ffebm.InputError, match=r"expected a file name that ends in \.png or \.pdf"):
        drawing.save_image(chain_plan(1), tmp_path / "p.gif")
    with pytest.raises(ffebm.InputError, match="dpi is 0; expected a positive number"):
        drawing.save_image(chain_plan(1), tmp_path / "p.png", dpi=0)


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ffebm.ExportError, match=r"need matplotlib: pip install 'ffebm-compiler\[plots\]'"):
        drawing.save_image(chain_plan(1), tmp_path / "p.png")


def test_plots_show_the_measured_numbers() -> None:
    model, inputs = mlp()
    hybrid = ffebm.convert(model, inputs)
    comparison = hybrid.compare(inputs)
    bars = drawing.plot_deviation(comparison).axes[0].patches
    assert [bar.get_width() for bar in bars] == list(comparison.blocks.values())
    report = ffebm.check_gradients(hybrid, inputs, lambda y: y.square().mean())
    line = drawing.plot_gradients(report).axes[0].lines[0]
    assert list(line.get_xdata()) == [max(1 - row["ep"].cosine, 1e-16) for row in report.agreements.values()]
    before = hybrid.blocks[0].loop_gain
    measured = drawing.feedback_sweep(hybrid, lambda h: h.compare(inputs).output, (0.3, 0.01, 0.1))
    assert hybrid.blocks[0].loop_gain == before
    assert measured[0.01] < measured[0.1] < measured[0.3]
    assert list(drawing.plot_feedback(measured, source=0.0).axes[0].lines[0].get_xdata()) == [0.01, 0.1, 0.3]


def test_plots_of_infinite_deviations(tmp_path: Path) -> None:
    comparison = ffebm.Comparison({"block_1": 0.5, "block_2": math.inf}, math.inf, {}, {})
    figure = drawing.plot_deviation(comparison)
    figure.savefig(tmp_path / "deviation.png")
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["block_1", "block_2 (infinite)"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == [0.5, 0.0]
    drawing.plot_feedback({0.1: 0.5, 0.3: math.inf}).savefig(tmp_path / "feedback.png")


def test_plots_of_nothing_are_refused() -> None:
    with pytest.raises(ffebm.InputError, match="holds no energy block"):
        drawing.plot_deviation(ffebm.Comparison({}, 0.0, {}, {}))
    with pytest.raises(ffebm.InputError, match="holds no parameter"):
        drawing.plot_gradients(ffebm.GradientReport({}))
    with pytest.raises(ffebm.InputError, match="nothing was measured"):
        drawing.plot_feedback({})
    with pytest.raises(ffebm.InputError, match=r"measured is a list; expected a Mapping, which feedback_sweep\("):
        drawing.plot_feedback([0.1, 0.3])
    with pytest.raises(ffebm.InputError, match=r"object of type str at loop gain 0\.1; expected a number"):
        drawing.plot_feedback({0.1: "high"})
    with pytest.raises(ffebm.InputError, match=r"object of type str of the source network; expected a number"):
        drawing.plot_feedback({0.1: 0.5}, source="high")
