"""Every kind of weight-stationary layer and every activation: converted, exact alone, right gradients together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.ir import ALWAYS_JOIN

ALL_WIRING = ("add", "reshape", "concat", "scale", "avg_pool")
Case = tuple[Callable[[], nn.Module], tuple[int, ...]]


class Of(nn.Module):
    """A function of parameters and an input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _pair(first: Callable[[], nn.Module], second: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(first(), nn.Tanh(), second())


LAYERS: dict[str, Case] = {
    "linear": (_pair(lambda: nn.Linear(5, 6), lambda: nn.Linear(6, 4)), (3, 5)),
    "linear on tokens": (_pair(lambda: nn.Linear(5, 6), lambda: nn.Linear(6, 4, bias=False)), (3, 7, 5)),
    "F.linear": (lambda: Of(lambda m, x: F.linear(torch.tanh(F.linear(x, m.a)), m.b), a=(6, 5), b=(4, 6)), (3, 5)),
    "x @ W.T": (lambda: Of(lambda m, x: torch.tanh(x @ m.a.T) @ m.b.T, a=(6, 5), b=(4, 6)), (3, 5)),
    "x @ W": (lambda: Of(lambda m, x: torch.tanh(x @ m.a) @ m.b, a=(5, 6), b=(6, 4)), (3, 2, 5)),
    "addmm": (lambda: Of(lambda m, x: torch.addmm(m.c, torch.tanh(x @ m.a), m.b), a=(5, 6), b=(6, 4), c=(4,)), (3, 5)),
    "conv1d": (_pair(lambda: nn.Conv1d(2, 4, 3, padding=1), lambda: nn.Conv1d(4, 3, 3, stride=2)), (3, 2, 9)),
    "conv2d": (_pair(lambda: nn.Conv2d(2, 4, 3, padding=1), lambda: nn.Conv2d(4, 3, 3, stride=2)), (3, 2, 8, 8)),
    "conv2d dilated": (
        _pair(lambda: nn.Conv2d(2, 4, 3, dilation=2), lambda: nn.Conv2d(4, 3, 2, padding=1, bias=False)),
        (3, 2, 8, 8),
    ),
    "conv2d grouped": (_pair(lambda: nn.Conv2d(4, 8, 3, groups=2), lambda: nn.Conv2d(8, 4, 1, groups=4)), (3, 4, 6, 6)),
    "conv2d depthwise": (
        _pair(lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), lambda: nn.Conv2d(8, 8, 3, groups=8)),
        (3, 4, 6, 6),
    ),
    "conv2d same": (
        _pair(lambda: nn.Conv2d(2, 4, 3, padding="same"), lambda: nn.Conv2d(4, 3, 5, padding="same", dilation=2)),
        (3, 2, 8, 8),
    ),
    "conv2d same, even kernel": (
        _pair(lambda: nn.Conv2d(2, 4, 4, padding="same"), lambda: nn.Conv2d(4, 3, (2, 3), padding="same")),
        (3, 2, 8, 8),
    ),
    "conv2d valid": (_pair(lambda: nn.Conv2d(2, 4, 3, padding="valid"), lambda: nn.Conv2d(4, 3, 1)), (3, 2, 8, 8)),
    "conv2d circular": (
        _pair(lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), lambda: nn.Conv2d(4, 3, 1)),
        (3, 2, 8, 8),
    ),
    "conv3d": (_pair(lambda: nn.Conv3d(1, 3, 3, padding=1), lambda: nn.Conv3d(3, 2, 2)), (2, 1, 4, 4, 4)),
    "conv transpose 1d": (
        _pair(lambda: nn.ConvTranspose1d(2, 4, 3, stride=2), lambda: nn.ConvTranspose1d(4, 3, 3)),
        (3, 2, 5),
    ),
    "conv transpose 2d": (
        _pair(
            lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1),
            lambda: nn.ConvTranspose2d(4, 4, 3, groups=2),
        ),
        (3, 2, 5, 5),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    model, x = build(), torch.randn(shape)
    single = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    assert not single.plan.rejected
    assert all(placement.block for placement in single.plan.weights.values())
    torch.testing.assert_close(single(x), model(x), rtol=1e-5, atol=1e-6)
    hybrid = ffebm.convert(model, x, feedback=0.3)
    assert len(hybrid.plan.blocks) == 1
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.3, rel=1e-3)
    report = ffebm.check_gradients(hybrid, x, lambda output: output.square().mean())
    for estimator in ("ep", "implicit"):
        assert report.worst(estimator)[1].cosine > 0.9999, report


ACTIVATIONS: dict[str, tuple[nn.Module, bool]] = {
    # module, monotone
    "relu": (nn.ReLU(), True),
    "relu6": (nn.ReLU6(), True),
    "leaky_relu": (nn.LeakyReLU(0.1), True),
    "elu": (nn.ELU(0.7), True),
    "selu": (nn.SELU(), True),
    "celu": (nn.CELU(0.8), True),
    "hardtanh": (nn.Hardtanh(-0.5, 0.8), True),
    "hardsigmoid": (nn.Hardsigmoid(), True),
    "sigmoid": (nn.Sigmoid(), True),
    "tanh": (nn.Tanh(), True),
    "softplus": (nn.Softplus(), True),
    "log_sigmoid": (nn.LogSigmoid(), True),
    "softsign": (nn.Softsign(), True),
    "softshrink": (nn.Softshrink(0.1), True),
    "gelu": (nn.GELU(), False),
    "gelu, tanh": (nn.GELU(approximate="tanh"), False),
    "silu": (nn.SiLU(), False),
    "mish": (nn.Mish(), False),
    "hardswish": (nn.Hardswish(), False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    torch.manual_seed(0)
    activation, monotone = ACTIVATIONS[name]
    model, x = nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 4)), torch.randn(8, 6)
    hybrid = ffebm.convert(model, x, feedback=0.3)
    assert len(hybrid.plan.blocks) == 1
    first = hybrid.blocks[0].module.program.layers[0].activation
    assert first.monotone == monotone
    assert (first.name in hybrid.summary()) == (not monotone)  # marked as a stationary point only
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    report = ffebm.check_gradients(hybrid, x, lambda output: output.square().mean())
    assert report.worst("ep")[1].cosine > 0.999, report
    assert report.worst("implicit")[1].cosine > 0.9999, report


@pytest.mark.parametrize("module", [nn.Hardshrink(), nn.Softmax(-1), nn.GLU(), nn.Threshold(0.1, 0.0)])
def test_what_has_no_potential_ends_the_block(module: nn.Module) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 12), module, nn.LazyLinear(4)), torch.randn(8, 6)
    model(x)
    hybrid = ffebm.convert(model, x)
    assert len(hybrid.plan.blocks) == 2
    assert hybrid.plan.explain("1").startswith("digital: ")
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)


class Wired(nn.Module):
    """Two branches, concatenated, scaled, pooled, permuted, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.c = nn.Conv2d(7, 4, 3, padding=1)
        self.d = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([torch.relu(self.a(x)), torch.tanh(self.b(x))], 1)
        h = torch.relu(self.c(F.avg_pool2d(h, 2)) * 0.5 - 0.1)
        return self.d(h.flatten(2).permute(0, 2, 1)) + 1.0


@pytest.mark.parametrize("kinds", [(), ("add",), ("reshape", "avg_pool"), ALL_WIRING])
def test_wiring_joins_as_block_ops_allows(kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model, x = Wired(), torch.randn(3, 2, 6, 6)
    hybrid = ffebm.convert(model, x, block_ops=kinds, feedback=0.2)
    if kinds == ALL_WIRING:
        assert len(hybrid.plan.blocks) == 1
    else:
        assert len(hybrid.plan.blocks) > 1
    for block in hybrid.plan.blocks:
        used = {hybrid.plan.graph[name].kind for name in block.operations if hybrid.plan.graph[name].role == "wiring"}
        assert used <= {*kinds, *ALWAYS_JOIN}
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-6)
    report = ffebm.check_gradients(hybrid, x, lambda output: output.square().mean())
    assert report.worst("ep")[1].cosine > 0.999, report
    for path, _ in model.named_modules():
        assert hybrid.plan.explain(path)


def test_layers_that_stay_digital_say_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 8)
            self.memory = nn.GRU(8, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.memory(self.words(tokens))[0])

    torch.manual_seed(0)
    model, tokens = Mixed(), torch.randint(0, 11, (2, 5))
    hybrid = ffebm.convert(model, tokens)
    torch.testing.assert_close(hybrid(tokens), model(tokens), rtol=1e-5, atol=1e-6)
    assert "table lookup" in hybrid.plan.weights["words.weight"].reason
    for name in ("head.weight", "memory.weight_ih_l0", "memory.weight_hh_l0"):
        assert hybrid.plan.weights[name].block, name


def test_sequence_length_may_be_free() -> None:
    from torch.export import Dim

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    hybrid = ffebm.convert(model, torch.randn(2, 5, 16), dynamic_shapes=(free,))
    for batch, length in ((1, 3), (4, 9)):
        x = torch.randn(batch, length, 16)
        with hybrid.feedforward_mode():
            torch.testing.assert_close(hybrid(x), model(x), rtol=1e-5, atol=1e-5)
        assert hybrid(x).shape == x.shape
