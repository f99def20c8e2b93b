"""A whole hybrid as one ONNX file that plain onnxruntime runs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.onnx import run
from ffebm_compiler.onnx.activation_nodes import activation_nodes
from ffebm_compiler.onnx.emit import Names, Writer
from ffebm_compiler.onnx.manifest import settling_of
from ffebm_compiler.runtime.activations.base import Activation
from ffebm_compiler.runtime.activations.table import ALL, ReLU

DOMAIN = "ffebm.energy"


def _reference() -> tuple[ffebm.HybridModel, Tensor]:
    x = networks.dchn_reference()["x"]
    wiring = ("add", "reshape", "avg_pool")
    hardware = ffebm.Hardware(layers_per_block=5)
    return ffebm.convert(networks.dchn(), x, hardware=hardware, feedback="symmetric", block_ops=wiring), x


def _cnn(folded: bool) -> tuple[ffebm.HybridModel, Tensor]:
    model, x = networks.digits_cnn()
    return ffebm.convert(model, x, fold_batchnorm=folded), x


def _transformer() -> tuple[ffebm.HybridModel, Tensor]:
    model, x = networks.transformer()
    return ffebm.convert(model, x), x


class Wirings(nn.Module):
    """Overlapping and adaptive pooling, a mean, a slice, a selection and a transpose inside one block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.c, self.d, self.e = nn.Linear(9, 5), nn.Linear(4, 4), nn.Linear(4, 3)
        self.overlapping = nn.AvgPool2d(3, stride=2, padding=1)
        self.adaptive = nn.AdaptiveAvgPool2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.overlapping(self.a(x)))
        x = torch.tanh(self.adaptive(self.b(x)))
        x = torch.tanh(self.c(x.flatten(2)))
        x = torch.tanh(self.d(x[:, 1:5].transpose(1, 2)))
        return self.e(torch.tanh(x.mean(1) - x[:, 2]))


def _wirings() -> tuple[ffebm.HybridModel, Tensor]:
    x = networks.noise(3, 2, 12, 12)
    hardware = ffebm.Hardware(layers_per_block=8)
    model = networks.seeded(Wirings).eval()
    return ffebm.convert(model, x, hardware=hardware, block_ops=("add", "reshape", "avg_pool")), x


def _slopes() -> tuple[ffebm.HybridModel, Tensor]:
    x = networks.noise(3, 2, 5, 5)
    return ffebm.convert(networks.seeded(networks.Slopes).eval(), x, feedback=0.3), x


NETWORKS: dict[str, Callable[[], tuple[ffebm.HybridModel, Tensor]]] = {
    "cnn": lambda: _cnn(False),
    "cnn_folded": lambda: _cnn(True),
    "transformer": _transformer,
    "reference": _reference,
    "wirings": _wirings,
    "slopes": _slopes,
    **{name: (lambda name=name: networks.converted(name, nn.GELU)) for name in networks.CASES},
}


@pytest.fixture(scope="module", params=NETWORKS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    hybrid, x = NETWORKS[request.param]()
    path = tmp_path_factory.mktemp("onnx") / "hybrid.onnx"
    assert hybrid.export_onnx(path) == path
    return request.param, hybrid, x, path


@pytest.fixture(scope="module")
def cnn() -> tuple[ffebm.HybridModel, Tensor]:
    return _cnn(True)


def session_of(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


def in_onnxruntime(path: Path, x: Tensor) -> Tensor:
    session = session_of(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def functions_of(path: Path) -> dict[str, Any]:
    return {function.name: function for function in onnx.load(path).functions}


@pytest.mark.parametrize("size", [1, 7])
def test_onnxruntime_computes_the_hybrid(exported: Any, size: int) -> None:
    _, hybrid, x, path = exported
    inputs = networks.noise(size, *x.shape[1:], seed=size)
    with torch.no_grad():
        expected = hybrid(inputs)
    assert relative(in_onnxruntime(path, inputs), expected) <= 1e-5


def test_a_block_with_feedback_is_a_function_with_a_loop(exported: Any) -> None:
    _, hybrid, _, path = exported
    model = onnx.load(path)
    onnx.checker.check_model(str(path), full_check=True)
    assert {item.domain: item.version for item in model.opset_import} == {"": 20, DOMAIN: 1}
    assert model.ir_version == 10
    (shape,) = (info.type.tensor_type.shape for info in model.graph.input)
    assert shape.dim[0].dim_param == "batch"
    functions = functions_of(path)
    calls = {
        {item.key: item.value for item in node.metadata_props}["ffebm.block"]: node
        for node in model.graph.node
        if node.domain == DOMAIN
    }
    assert list(calls) == [block.name for block in hybrid.blocks]
    for block in hybrid.blocks:
        call = calls[block.name]
        assert functions[call.op_type].domain == DOMAIN
        coupled = block.module.program.coupled
        assert any(node.op_type == "Loop" for node in functions[call.op_type].node) == coupled
        metadata = {item.key: item.value for item in call.metadata_props}
        assert metadata["ffebm.layers"] == ", ".join(block.layers)
        assert metadata["ffebm.tiles"] == str(block.plan.tiles)
        assert float(metadata["ffebm.loop_gain"]) == pytest.approx(block.loop_gain, rel=1e-5)
        if coupled:
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in call.attribute}
            for limit, value in settling_of(block.module, "float32").items():
                if limit in ("largest_change", "min_sweeps", "max_sweeps"):
                    assert attributes[limit] == pytest.approx(value)


def test_nothing_of_this_machine_is_in_the_file(exported: Any) -> None:
    text = exported[3].read_bytes()
    for trace in (b"site-packages", b'File "', b"stack_trace", str(Path(__file__).parent.parent).encode()):
        assert trace not in text
    assert [item.name for item in exported[3].parent.iterdir()] == ["hybrid.onnx"]


def test_weights_have_the_sources_names_and_are_stored_once(tmp_path: Path) -> None:
    hybrid, _ = networks.converted("tied", nn.GELU)
    hybrid.export_onnx(tmp_path / "tied.onnx")
    model = onnx.load(tmp_path / "tied.onnx")
    names = [item.name for item in model.graph.initializer]
    assert {"shared.weight", "shared.bias", "head.weight"} <= set(names)
    assert len(names) == len(set(names))
    floats = sum(int(np.prod(item.dims)) for item in model.graph.initializer)
    assert floats == sum(p.numel() for p in hybrid.parameters())


def test_blocks_of_one_structure_share_a_function(tmp_path: Path) -> None:
    hybrid, _ = _transformer()
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    assert len(hybrid.blocks) == 6
    assert len(functions_of(tmp_path / "hybrid.onnx")) == 3


def test_train_mode_hybrid_exports_in_eval_mode_and_is_left_alone(tmp_path: Path) -> None:
    hybrid, x = _cnn(False)
    with torch.no_grad():
        expected = hybrid.eval()(x)
    hybrid.train()
    before = {key: value.clone() for key, value in hybrid.state_dict().items()}
    with pytest.warns(ffebm.FFEBMWarning, match=r"is in train mode \(batch_norm of \w+.*call hybrid.eval\(\)"):
        hybrid.export_onnx(tmp_path / "hybrid.onnx")
    assert all(module.training for module in hybrid.modules() if isinstance(module, nn.BatchNorm2d))
    assert all(torch.equal(value, before[key]) for key, value in hybrid.state_dict().items())
    assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", x), expected) <= 1e-5


def test_batch_norm_stays_unless_asked_to_fuse(tmp_path: Path) -> None:
    model, x = networks.digits_cnn()
    hybrid = ffebm.convert(model, x, force_digital="block*")
    for fuse in (False, True):
        path = tmp_path / f"{fuse}.onnx"
        hybrid.export_onnx(path, fuse_batchnorm=fuse)
        kinds = [node.op_type for node in onnx.load(path).graph.node]
        assert kinds.count("BatchNormalization") == (1 if fuse else 6)
        with torch.no_grad():
            assert relative(in_onnxruntime(path, x), hybrid(x)) <= 1e-5


@pytest.mark.parametrize("feedback", [0.05, 0.1, 0.3, 0.9])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_the_loop_does_the_runtimes_sweeps(activation: type[nn.Module], feedback: float, tmp_path: Path) -> None:
    """At a tolerance of 1e-4. Where one did a sweep more than the other, they would differ by more than rounding."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(20, 30), activation(), nn.Linear(30, 25), activation(), nn.Linear(25, 25))
    x = torch.randn(16, 20)
    hybrid = ffebm.convert(model, x, feedback=feedback).eval()
    with torch.no_grad():
        expected = hybrid(x)
    path = tmp_path / "whole.onnx"
    hybrid.export_onnx(path)
    assert relative(in_onnxruntime(path, x), expected) < 2e-6


@pytest.mark.parametrize("schedule", ["backward", "even_odd"])
def test_the_solvers_schedule_and_tolerance_are_those_of_the_loop(
    cnn: tuple[ffebm.HybridModel, Tensor], tmp_path: Path, schedule: Any
) -> None:
    hybrid = copy.deepcopy(cnn[0])
    hybrid.configure(
        feedback=0.1, estimator=ffebm.EquilibriumPropagation(), solver=ffebm.GaussSeidel(rtol=1e-3, schedule=schedule)
    )
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    with torch.no_grad():
        expected = hybrid(cnn[1])
    # A loose tolerance: other sweeps would end elsewhere.
    assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", cnn[1]), expected) <= 1e-6


def test_a_block_that_does_not_settle_gives_nan(tmp_path: Path) -> None:
    model, x = networks.mlp()
    for on_failure in ("error", "warn"):
        solver = ffebm.GaussSeidel(rtol=1e-7, max_sweeps=1, on_failure=on_failure)
        hybrid = ffebm.convert(model, x, solver=solver, feedback=0.9)
        hybrid.export_onnx(tmp_path / "hybrid.onnx")
        found = in_onnxruntime(tmp_path / "hybrid.onnx", x)
        assert bool(found.isnan().all()) == (on_failure == "error")


def test_double_precision_is_limited_by_attributes_alone(tmp_path: Path) -> None:
    """γ is an attribute, which ONNX holds in single precision."""
    model, x = networks.mlp(nn.Tanh)
    hybrid = ffebm.convert(model.double(), x.double())
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    with torch.no_grad():
        assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", x.double()), hybrid(x.double())) <= 1e-8


def test_large_models_keep_their_tensors_beside_the_file(
    cnn: tuple[ffebm.HybridModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffebm_compiler.onnx.whole._LARGE", 100)
    cnn[0].export_onnx(tmp_path / "hybrid.onnx")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["hybrid.onnx", "hybrid.onnx.data"]
    with torch.no_grad():
        assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", cnn[1]), cnn[0](cnn[1])) <= 1e-5


def test_tensors_computed_from_weights_may_come_first_and_have_any_name(tmp_path: Path) -> None:
    """A class token is expanded before any input is read; `to` is also a method of every module."""

    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 4))
            self.register_buffer("positions", torch.arange(6))
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
            return self.last(torch.softmax(tokens, 1) * self.positions.to(torch.float32)[:, None])

    x = networks.noise(3, 5, 4)
    hybrid = ffebm.convert(networks.seeded(Token), x)
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    for size in (1, 7):
        inputs = networks.noise(size, 5, 4)
        with torch.no_grad():
            expected = hybrid(inputs)
        assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", inputs), expected) <= 1e-5
        assert relative(run(tmp_path / "parts", inputs)[0], expected) <= 1e-5


def test_a_flattened_sequence_is_unfolded_for_any_batch(tmp_path: Path) -> None:
    """Two free sizes that are not the same: batch and batch times tokens."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x.reshape(-1, 4)))
            return self.b(h.reshape(x.shape[0], 5, 6))

    hybrid = ffebm.convert(networks.seeded(Flat), networks.noise(3, 5, 4)).eval()
    assert hybrid.blocks[0].layers == ("a", "b")
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    for size in (1, 7):
        inputs = networks.noise(size, 5, 4)
        with torch.no_grad():
            assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", inputs), hybrid(inputs)) <= 1e-5


def test_several_inputs_and_outputs_keep_their_order(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            total = self.a(x) + self.b(y)
            return total, {"same": total, "first": x, "soft": torch.softmax(total, 1)}

    x, y = networks.noise(3, 4), networks.noise(3, 5)
    hybrid = ffebm.convert(networks.seeded(Two), (x, y))
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    with torch.no_grad():
        total, rest = hybrid(x, y)
    found = session_of(tmp_path / "hybrid.onnx").run(None, {"x": x.numpy(), "y": y.numpy()})
    for have, want in zip(found, [total, *rest.values()], strict=True):
        assert relative(torch.from_numpy(have), want) <= 1e-5
    hybrid.export_onnx(tmp_path / "parts", parts="digital")
    for have, want in zip(run(tmp_path / "parts", (x, y)), [total, *rest.values()], strict=True):
        assert relative(have, want) <= 1e-5


def test_a_wider_sequence_may_be_free_too(tmp_path: Path) -> None:
    model, x = networks.transformer()
    free = torch.export.Dim.DYNAMIC
    hybrid = ffebm.convert(model, x, dynamic_shapes=({0: free, 1: free},))
    hybrid.export_onnx(tmp_path / "hybrid.onnx")
    for shape in ((1, 9, 8), (4, 2, 8)):
        inputs = networks.noise(*shape)
        with torch.no_grad():
            assert relative(in_onnxruntime(tmp_path / "hybrid.onnx", inputs), hybrid(inputs)) <= 1e-5


def test_free_image_sizes_in_a_settling_convolution_are_refused(tmp_path: Path) -> None:
    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    free = torch.export.Dim.DYNAMIC
    hybrid = ffebm.convert(networks.seeded(Images), networks.noise(2, 1, 8, 8), dynamic_shapes=({0: free, 2: free},))
    with pytest.raises(ffebm.ExportError, match=r"block_1, layer b: the image size of a convolution .* is free"):
        hybrid.export_onnx(tmp_path / "hybrid.onnx")


def test_half_precision_is_refused_with_what_to_do(cnn: tuple[ffebm.HybridModel, Tensor], tmp_path: Path) -> None:
    model, x = networks.mlp()
    hybrid = ffebm.convert(model.bfloat16(), x.bfloat16())
    with pytest.raises(ffebm.ExportError, match=r"block_1 computes in bfloat16: export hybrid.float\(\)"):
        hybrid.export_onnx(tmp_path / "hybrid.onnx")


def test_a_folder_is_no_file(cnn: tuple[ffebm.HybridModel, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ffebm.ExportError, match=re.escape("is a folder: name a file that ends in .onnx")):
        cnn[0].export_onnx(tmp_path)


def test_an_unknown_activation_is_named_with_its_layer(
    cnn: tuple[ffebm.HybridModel, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(activation_nodes.__globals__["_TABLE"], ReLU)
    with pytest.raises(ffebm.ExportError, match=r"block_1, layer stem: activation ReLU\(\) has no ONNX form"):
        cnn[0].export_onnx(tmp_path / "hybrid.onnx")


def test_average_pooling_without_an_onnx_form_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Conv2d(2, 2, 2))
    hybrid = ffebm.convert(model, networks.noise(2, 1, 8, 8), block_ops=("add", "reshape", "avg_pool"))
    with pytest.raises(ffebm.ExportError, match=r"block_1, layer 0: average pooling with ceil_mode.*no ONNX form"):
        hybrid.export_onnx(tmp_path / "hybrid.onnx")


@pytest.mark.parametrize("activation", ALL, ids=repr)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_activation_is_torchs(activation: Activation, dtype: str) -> None:
    writer = Writer(Names(), dtype)
    result = activation_nodes(writer, activation, "h")
    kind = writer.elem_type
    output = writer.op("Identity", result)
    graph = onnx.helper.make_graph(
        writer.nodes,
        "activation",
        [onnx.helper.make_tensor_value_info("h", kind, ["n"])],
        [onnx.helper.make_tensor_value_info(output, kind, ["n"])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    h = torch.cat([torch.linspace(-30, 30, 1201), torch.tensor([-1e4, 1e4, 0.0, -3.0, 3.0])]).to(getattr(torch, dtype))
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString())
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented:
        pytest.skip(f"onnxruntime has no {dtype} kernel for it")
    found = torch.from_numpy(session.run(None, {"h": h.numpy()})[0])
    scale = 2e-6 if dtype == "float32" else 1e-7  # some attributes are float32 in ONNX
    torch.testing.assert_close(found, activation.value(h), rtol=scale, atol=scale)
