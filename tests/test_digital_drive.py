"""States driven by a digital value: where they are, what they are called, and that everything else stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from partition_cases import total_conversions
from test_partition import digital, layer, relu, wiring
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import InputError, PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import OperationGraph
from ffebm_compiler.passes.partition.decide import Partition, partition
from ffebm_compiler.passes.partition.rules import driven_states


class Normed(nn.Module):
    """Convolution, batch norm and a clamp, twice; an average pool and a linear layer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.clamps = nn.ModuleList([nn.Hardtanh(0, 1), nn.Hardtanh(0, 1)])
        self.pool = nn.AvgPool2d(4)
        self.readout = nn.Linear(width * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm, clamp in zip(self.convs, self.norms, self.clamps, strict=True):
            x = clamp(norm(conv(x)))
        return self.readout(self.pool(x).flatten(1))


def normed() -> tuple[Normed, Tensor]:
    torch.manual_seed(0)
    return Normed(), torch.randn(6, 2, 8, 8)


def drawn(graph: OperationGraph, hardware: Hardware | None = None) -> Partition:
    return partition(graph, hardware or Hardware(), digital_drive=True)


def test_an_activation_behind_batch_norm_opens_the_block_of_the_layer_that_reads_it() -> None:
    model, x = normed()
    plan = ffebm.plan(model, x, digital_drive=True)
    assert [block.layers for block in plan.blocks] == [("convs.0",), ("convs.1",), ("readout",)]
    assert [block.driven for block in plan.blocks] == [(), ("hardtanh",), ()]
    block = plan.blocks[1]
    assert block.operations == ("hardtanh", "conv2d_1")
    assert block.neurons == 2 * 6 * 64
    assert (block.dac, block.tiles) == (6 * 64, 1)
    without = ffebm.plan(model, x)
    assert plan.conversions == without.conversions
    assert not any(block.driven for block in without.blocks)


def test_off_is_the_default_and_leaves_every_plan_as_it_was() -> None:
    model, x = normed()
    for plan in (ffebm.plan(model, x), ffebm.plan(model, x, digital_drive=False)):
        data = json.loads(json.dumps(plan.to_dict()))
        assert data["options"]["digital_drive"] is False
        del data["options"]["digital_drive"]
        for block in data["blocks"]:
            assert block.pop("driven") == []
        assert ffebm.Plan.from_dict(data) == plan  # a file from before the option


def test_it_is_explained() -> None:
    model, x = normed()
    plan = ffebm.plan(model, x, digital_drive=True)
    assert plan.explain("clamps.0") == (
        "analog, block_2: hardtanh is a state driven by a digital value (batch_norm of digital_1, 384 DAC values), "
        "without a weight of its own, with feedback from convs.1"
    )
    assert plan.explain("clamps.1").startswith(
        "digital: no layer's product reaches hardtanh alone within a block, and "
    )


def test_the_input_itself_may_drive_a_state() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Tanh(), nn.Linear(8, 6)).double(), torch.randn(5, 8, dtype=torch.float64)
    hybrid = ffebm.convert(model, x, digital_drive=True, feedback=0.5)
    assert "driven by a digital value (the network's input input, 8 DAC values)" in hybrid.plan.explain("0")
    given = x.requires_grad_()
    assert torch.autograd.gradcheck(hybrid_of(hybrid), (given,), atol=1e-6)


def hybrid_of(hybrid: ffebm.HybridModel) -> Callable[[Tensor], Tensor]:
    """As a function with implicit gradients."""
    hybrid.set_gradient("implicit")
    return lambda x: hybrid(x)


def test_a_state_needs_a_layer_that_reads_it() -> None:
    """Without one it would be its activation; its readers through wires alone would feed back without a weight."""
    graph = OperationGraph({"x": 8}, (relu("r", "x"), digital("d", "r"), layer("a", "d")), ("a",))
    assert drawn(graph).blocks == [["a"]]
    summed = OperationGraph(
        {"x": 8}, (relu("r", "x"), layer("a", "r"), wiring("sum", "a", "r"), layer("b", "sum")), ("b",)
    )
    users = summed.users()
    assert driven_states(summed, ["r", "a"], users) == ["r"]
    assert driven_states(summed, ["r", "a", "sum", "b"], users) == []
    through = OperationGraph(
        {"x": 8}, (relu("r", "x"), wiring("flat", "r", kind="reshape"), layer("a", "flat")), ("a",)
    )
    assert drawn(through).blocks == [["r", "flat", "a"]]


def test_a_state_that_is_read_elsewhere_too_would_cost_converters() -> None:
    graph = OperationGraph({"x": 8}, (relu("r", "x"), layer("a", "r"), digital("d", "a", "r")), ("d",))
    assert drawn(graph).blocks == [["a"]]
    saving = OperationGraph({"x": 8}, (relu("r", "x"), layer("a", "r"), layer("b", "x")), ("a", "b"))
    assert drawn(saving).blocks == [["r", "a", "b"]]
    assert total_conversions(saving, [["r", "a", "b"]]) == 24
    assert total_conversions(saving, partition(saving, Hardware()).blocks) == 32


def test_driven_states_are_neurons() -> None:
    graph = OperationGraph({"x": 8}, (relu("r", "x"), layer("a", "r")), ("a",))
    assert drawn(graph, Hardware(neurons_per_block=16)).blocks == [["r", "a"]]
    assert drawn(graph, Hardware(neurons_per_block=15)).blocks == [["a"]]


def test_a_moved_layer_takes_its_driven_state_along() -> None:
    model, x = normed()
    plan = ffebm.plan(model, x, digital_drive=True, block_ops=("add", "reshape", "avg_pool"))
    for where in ("analog", "block_1"):
        if where == "block_1":
            with pytest.raises(PlanError, match="cannot move to block_1, since a value would leave a block"):
                plan.move("convs.1", where)
            continue
        moved = plan.move("convs.1", where)
        assert "hardtanh" in next(block for block in moved.blocks if "convs.1" in block.layers).driven
    digital_now = plan.move("convs.1", "digital")
    assert not any(block.driven for block in digital_now.blocks)
    assert [block.driven for block in digital_now.move("convs.1", "analog").blocks] == [(), ("hardtanh",), ()]


def test_an_edited_plan_is_held_to_the_rule() -> None:
    model, x = normed()
    data = ffebm.plan(model, x, digital_drive=True).to_dict()
    block = data["blocks"][2]
    data["blocks"][2] = {"name": block["name"], "operations": [*block["operations"], "hardtanh_1"]}
    for part in data["digital_parts"]:
        part["operations"] = [name for name in part["operations"] if name != "hardtanh_1"]
    with pytest.raises(PlanError, match=r"'hardtanh_1' of a value from outside of it, but not only layers"):
        ffebm.Plan.from_dict(data)
    data = ffebm.plan(model, x, digital_drive=True).to_dict()
    data["options"]["digital_drive"] = False
    with pytest.raises(PlanError, match=r"block_2 holds 'hardtanh', which no layer of the block feeds"):
        ffebm.Plan.from_dict(data)


def test_bad_values_are_refused() -> None:
    model, x = normed()
    with pytest.raises(InputError, match=r"digital_drive is 'yes'; expected True or False"):
        ffebm.plan(model, x, digital_drive="yes")  # type: ignore[arg-type]


def test_plans_and_hybrids_are_stored_with_it(tmp_path: Path) -> None:
    model, x = normed()
    plan = ffebm.plan(model, x, digital_drive=True)
    plan.to_json(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["options"]["digital_drive"] is True
    read = ffebm.Plan.from_json(tmp_path / "plan.json")
    assert read == plan
    hybrid = ffebm.convert(model, x, plan=read, feedback=0.5).eval()
    hybrid.save(tmp_path / "hybrid")
    again = ffebm.load(tmp_path / "hybrid", normed()[0]).eval()
    assert again.plan == hybrid.plan
    assert torch.equal(again(x), hybrid(x))
    assert not torch.equal(hybrid(x), model.eval()(x))


def test_without_feedback_it_is_the_source() -> None:
    model, x = normed()
    hybrid = ffebm.convert(model, x, digital_drive=True, feedback=0.9)
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_are_those_of_the_equilibrium(mode: str) -> None:
    """Also through batch norm's statistics: each estimator against float64 autograd through the relaxation."""
    model, x = normed()
    hybrid = ffebm.convert(model.double(), x.double(), digital_drive=True, feedback=0.5).train(mode == "train")
    report = ffebm.check_gradients(hybrid.eval(), x.double(), lambda out: out.square().mean())
    for name, found in report.agreements.items():
        if name in ("convs.0.bias", "convs.1.bias") and mode == "train":
            continue  # batch norm removes them: their gradients are zero
        assert found["implicit"].relative_error < 1e-8, name
        assert found["ep"].relative_error < 1e-3, name


def settled() -> tuple[ffebm.HybridModel, Tensor]:
    """With running statistics of a few batches, in eval mode."""
    model, x = normed()
    for _ in range(5):
        model(torch.randn(32, 2, 8, 8))
    return ffebm.convert(model.eval(), x, digital_drive=True, feedback=0.5).eval(), x


def test_reports_know_it() -> None:
    hybrid, x = settled()
    text = hybrid.summary()
    assert "driven" in text.splitlines()[1]
    assert [line.split()[1] for line in text.splitlines() if line.startswith(" block_2")][:2] == ["hardtanh", "2"]
    assert hybrid.compare(x).blocks["block_2"] > 0.01
    costs = hybrid.cost_report().blocks[1]
    assert costs.sweeps is not None
    assert costs.sweeps > 1
    assert costs.reads == 2 * costs.sweeps * costs.macs
    block = hybrid.blocks[1]
    assert block.loop_gain == pytest.approx(0.5, rel=0.01)
    assert len(block.states) == 2


def test_pictures_show_a_state_without_weights() -> None:
    from ffebm_compiler.drawing.record import record_of

    model, x = normed()
    plan = ffebm.plan(model, x, digital_drive=True)
    assert r"clamps.0: state hardtanh, driven, no weights\nconvs.1: conv2d 54×6" in plan.to_dot()
    homes = {home["title"]: home for home in record_of(plan)["homes"]}
    block = homes["block_2"]
    assert block["sentence"] == "Energy block: its layer settles with a state driven by a digital value."
    assert ("driven states, without weights", "hardtanh") in block["facts"]
    assert [op["name"] for op in record_of(plan)["ops"] if op["driven"]] == ["hardtanh"]


def test_plans_with_and_without_it_differ() -> None:
    model, x = normed()
    with_it, without = ffebm.plan(model, x, digital_drive=True), ffebm.plan(model, x)
    assert str(with_it.diff(without)) == (
        "clamps.0: hardtanh: block_2, driven, with feedback from convs.1 -> no driven state"
    )
    assert not with_it.diff(ffebm.Plan.from_dict(with_it.to_dict()))


def test_onnx_settles_as_the_hybrid(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    hybrid, x = settled()
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "hybrid.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), hybrid(x), rtol=1e-5, atol=1e-5)
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    from ffebm_compiler.onnx import run

    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "parts", x)[0], hybrid(x), rtol=1e-5, atol=1e-5)


class Linears(nn.Module):
    """Layer norm, a clamp, a linear layer, a ReLU, a linear layer: all that a resistive energy holds."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(torch.clamp(0.5 * self.norm(x), 0, 1))))


def test_a_resistive_energy_loads_a_driven_state() -> None:
    """Its equilibrium satisfies s = sigma((F + feedback)/D), and gradients are those of finite differences."""
    torch.manual_seed(0)
    model, x = Linears().double(), torch.randn(5, 12, dtype=torch.float64)
    hybrid = ffebm.convert(model, x, digital_drive=True, energy="resistive", feedback=0.2)
    (block,) = hybrid.blocks
    assert block.module.program.upstream == ((), (0,), (1,))
    report = ffebm.check_gradients(hybrid, x, lambda out: out.square().mean())
    for name, found in report.agreements.items():
        assert found["implicit"].relative_error < 1e-7, name
        assert found["ep"].relative_error < 1e-3, name


def test_a_resistive_energy_loads_a_driven_state_through_a_convolution() -> None:
    model, x = normed()
    hybrid = ffebm.convert(model.double(), x.double(), digital_drive=True, energy="resistive", feedback=0.2)
    assert hybrid.plan.blocks[1].driven == ("hardtanh",)
    report = ffebm.check_gradients(hybrid.eval(), x.double(), lambda out: out.square().mean())
    for name, found in report.agreements.items():
        assert found["implicit"].relative_error < 1e-7, name
        assert found["ep"].relative_error < 1e-3, name


@pytest.mark.parametrize("energy", ["unamplified", "drn"])
def test_driven_states_of_resistors_without_amplifiers(energy: str) -> None:
    """The digital value reaches its state through a conductance of 1, which loads it as any other."""
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU()))
    model = model.double()
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.abs_()
    x = noise(3, 6).double()
    solver = ffebm.GaussSeidel(rtol=1e-13)
    hybrid = ffebm.convert(model, x, energy=energy, feedback="symmetric", digital_drive=True, solver=solver)
    (block,) = [block for block in hybrid.blocks if block.module.program.coupled]
    hybrid(x)
    driven, out = block.states
    value, weight, bias = (
        F.layer_norm(model[0](x), (8,), model[1].weight, model[1].bias),
        model[3].weight,
        model[3].bias,
    )
    assert torch.allclose(driven, ((value + out @ weight) / (1 + weight.sum(0))).clamp_min(0))
    assert torch.allclose(out, ((driven @ weight.T + bias) / weight.sum(1)).clamp_min(0))
    report = ffebm.check_gradients(hybrid, x, lambda y: y.square().sum())
    assert report.worst("implicit")[1].relative_error < 1e-8
