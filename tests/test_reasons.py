"""No reason in a plan may be false: each is checked against what the operation computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ffebm_compiler as ffebm

X = (3, 6, 8)


class Around(nn.Module):
    """A layer, an operation on its result, a layer; with parameters that the operation may read."""

    def __init__(self, function: Callable[[Around, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(6), nn.AlphaDropout(0.3)
        self.w, self.table = (nn.Parameter(torch.randn(8, 8, generator=generator)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.first(x))


def operations(function: Callable[[Around, Tensor], Tensor]) -> list[ffebm.ir.Operation]:
    plan = ffebm.plan(Around(function).eval(), torch.randn(X), hardware=ffebm.Hardware(layers_per_block=1))
    return list(plan.graph.operations)


def is_linear(function: Callable[[Around, Tensor], Tensor]) -> bool:
    """Whether f(a + b) = f(a) + f(b), in float64."""
    model = Around(function).double().eval()
    a, b = torch.randn(2, *X, dtype=torch.float64)
    with torch.no_grad():
        return torch.allclose(function(model, a + b), function(model, a) + function(model, b))


LINEAR: dict[str, Callable[[Around, Tensor], Tensor]] = {
    "expand": lambda s, h: h[:, :1].expand(-1, 4, -1),
    "repeat": lambda s, h: h.repeat(1, 2, 1),
    "tile": lambda s, h: h.tile(1, 2, 1),
    "stack": lambda s, h: torch.stack([h, h], 1),
    "sum": lambda s, h: h.sum(-1),
    "cumsum": lambda s, h: h.cumsum(-1),
    "roll": lambda s, h: h.roll(1, -1),
    "flip": lambda s, h: h.flip(-1),
    "diagonal": lambda s, h: h.diagonal(0, 1, 2),
    "triu": lambda s, h: h.triu(),
    "tril": lambda s, h: h.tril(),
    "pixel_shuffle": lambda s, h: F.pixel_shuffle(h.unflatten(1, (6, 1))[:, :4], 2),
    "upsample_nearest1d": lambda s, h: F.interpolate(h, scale_factor=2),
    "upsample_linear1d": lambda s, h: F.interpolate(h, scale_factor=2, mode="linear"),
    "unfold": lambda s, h: h.unfold(2, 3, 1),
    "repeat_interleave": lambda s, h: h.repeat_interleave(2, dim=2),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_is_called_linear_is_linear(name: str) -> None:
    digital = [op for op in operations(LINEAR[name]) if op.role == "digital"]
    assert is_linear(LINEAR[name])
    assert not any("not linear" in op.reason for op in digital)
    assert any("is linear without weights" in op.reason for op in digital), [op.reason for op in digital]


NONLINEAR: dict[str, tuple[Callable[[Around, Tensor], Tensor], str]] = {
    "softmax": (lambda s, h: h.softmax(-1), "softmax is not among the operations that a block can hold"),
    "sin": (lambda s, h: h.sin(), "sin is not among the operations that a block can hold"),
    "vector norm": (lambda s, h: torch.linalg.vector_norm(h, dim=-1), "linalg_vector_norm is not among"),
    "layer norm": (lambda s, h: F.layer_norm(h, (8,)), "normalisation divides by statistics of its input"),
    "group norm": (lambda s, h: F.group_norm(h, 2), "normalisation divides by statistics of its input"),
    "rms norm": (lambda s, h: F.rms_norm(h, (8,)), "normalisation divides by statistics of its input"),
    "max pooling": (lambda s, h: F.adaptive_max_pool1d(h, 2), "max pooling is not linear"),
    "square": (lambda s, h: h * h, "the product of two activations is not weight-stationary"),
    "mul": (lambda s, h: h * h.flip(-1), "the product of two activations is not weight-stationary"),
    "random factor": (lambda s, h: h * torch.rand(8), "it multiplies by random numbers, which are no weights"),
    "matmul": (lambda s, h: h @ h.mT, "the product of two activations is not weight-stationary"),
    "einsum": (lambda s, h: torch.einsum("bij,bkj->bik", h, h), "the product of two activations"),
    "attention": (
        lambda s, h: F.scaled_dot_product_attention(h, h, h), "attention multiplies activations by activations"),
    "attention to parameters": (
        lambda s, h: F.scaled_dot_product_attention(h, s.w[None], s.table[None]),
        "attention has a softmax between its two products"),
    "alpha dropout": (lambda s, h: s.drop(h), "alpha dropout adds a shift to what it drops: it is not linear"),
    "kernel from the input": (
        lambda s, h: F.conv1d(h, h[:1, :, :3].expand(6, 6, 3)),
        "its kernel depends on the input, so that it is no weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONLINEAR)
def test_what_is_called_no_linear_map_is_none(name: str) -> None:
    function, reason = NONLINEAR[name]
    digital = [op.reason for op in operations(function) if op.role == "digital"]
    assert any(found.startswith(reason) for found in digital), digital
    if name == "alpha dropout":
        function = lambda s, h: F.alpha_dropout(h, 0.3, True)  # noqa: E731
    assert not is_linear(function)


def test_a_scale_by_parameters_sums_nothing() -> None:
    (op,) = [op for op in operations(lambda s, h: h * s.w[0]) if op.target == "mul"]
    assert op.reason == "it multiplies each value by a number of its own and sums none: a gain, no matrix product"
    (op,) = [op for op in operations(lambda s, h: h / s.w[0]) if op.target == "div"]
    assert op.role == "digital"
    (op,) = [op for op in operations(lambda s, h: torch.einsum("bij,j->bij", h, s.w[0])) if op.target == "einsum"]
    assert op.reason == "it multiplies each value by a number of its own and sums none: no matrix product"


def test_a_lookup_is_a_lookup_whatever_the_call() -> None:
    def places(h: Tensor) -> Tensor:
        return h[:, :, 0].argmax(1)

    for lookup in (
        lambda s, h: F.embedding(places(h), s.table),
        lambda s, h: s.table.index_select(0, places(h)),
        lambda s, h: s.table[places(h)],
        lambda s, h: s.table.gather(0, places(h)[:, None]),
    ):
        reasons = [op.reason for op in operations(lookup) if "table" in op.weights]
        assert reasons == ["a table lookup is not a matrix product"], lookup
    padded = operations(lambda s, h: F.pad(h, (1, 1), mode="reflect"))
    assert [op.reason for op in padded if op.target == "pad"] == ["of all padding a block can hold zeros alone"]
    (picked,) = [op for op in operations(lambda s, h: h.index_select(2, torch.tensor([1, 0]))) if "index" in op.target]
    assert picked.reason == "it picks values by their place"


class Parameters(nn.Module):
    """Parameters that no activation is multiplied by, read in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.position = nn.Linear(1, 8)
        for name in ("added", "token", "repeated", "unread", "looked_up"):
            self.register_parameter(name, nn.Parameter(torch.randn(1, 1, 8)))
        self.prompt, self.scale = nn.Parameter(torch.randn(1, 8)), nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        torch.tanh(x + self.unread)
        steps = torch.arange(x.shape[1], dtype=torch.float32)[:, None]
        x = self.body(x + self.position(steps)) + self.added
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.repeated.repeat(x.shape[0], 1, 1), x], 1)
        x = torch.cat([x.sum(1), self.prompt]) * self.scale.exp()
        return x + self.looked_up[0].index_select(0, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("added", "it is added, not multiplied: no matrix product"),
        ("token", "it is copied to every sample, not multiplied: no matrix product"),
        ("repeated", "it is copied to every sample, not multiplied: no matrix product"),
        ("prompt", "it is joined to other values, not multiplied: no matrix product"),
        ("unread", "no operation that the output depends on reads it"),
        ("looked_up", "it is added, not multiplied: no matrix product"),
        ("scale", "mul reads what is computed from it, which is no matrix product with an activation"),
        ("position.weight", "add reads what is computed from it, which is no matrix product with an activation"),
        ("position", "add reads what is computed from it, which is no matrix product with an activation"),
    ],
)
def test_reasons_of_parameters_that_no_activation_is_multiplied_by(name: str, reason: str) -> None:
    plan = ffebm.plan(Parameters(), torch.randn(3, 5, 8))
    assert plan.explain(name) == f"digital: {reason}"


def test_an_activation_without_a_layer_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Hardtanh(), nn.Linear(8, 4), nn.ReLU())
    plan = ffebm.plan(model, torch.randn(3, 8))
    assert plan.explain("2") == "digital: no layer's product reaches hardtanh alone within a block"
    assert plan.explain("1").startswith("analog")
    forced = ffebm.plan(model, torch.randn(3, 8), force_digital="4")
    assert forced.explain("4") == "digital: force_digital asks for it"


def test_an_explanation_belongs_to_the_module_that_runs_the_operation() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            return self.out(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)

    plan = ffebm.plan(Attention(), torch.randn(2, 5, 16))
    assert plan.explain("norm") == "digital: normalisation divides by statistics of its input"
    assert [op.path for op in plan.graph.operations if op.target == "matmul"] == ["", ""]


def test_a_tied_layer_belongs_to_the_module_that_runs_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.body(self.words(tokens))
            return self.head(self.attention(x, x, x)[0])

    model = Tied()
    nn.utils.parametrizations.weight_norm(model.body)
    plan = ffebm.plan(model, torch.randint(0, 11, (2, 5)))
    assert plan.explain("words") == "digital: a table lookup is not a matrix product"
    assert plan.explain("head").startswith("analog, ")
    assert plan.explain("body").startswith("analog, ")
    assert plan.explain("attention.out_proj").startswith("analog, ")
    assert "the weight of head in block" in plan.weights["words.weight"].reason


def test_a_plan_from_before_this_field_is_read() -> None:
    plan = ffebm.plan(Parameters(), torch.randn(3, 5, 8))
    data = plan.graph.to_dict()
    assert any(item.pop("computed") for item in data["operations"])
    assert len(ffebm.ir.OperationGraph.from_dict(data).operations) == len(plan.graph.operations)
