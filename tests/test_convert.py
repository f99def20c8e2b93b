"""One call turns a module into a hybrid that behaves as the source: values, flags, names, dtypes, shapes."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import CASES, MLP, DigitsCNN, digits_cnn, mlp, noise, seeded, transformer, warmed
from same_as_source import relative
from torch import Tensor, nn

import ffebm_compiler as ffebm

SINGLE = ffebm.Hardware(layers_per_block=1)
ALL_WIRING = ("add", "reshape", "concat", "scale", "avg_pool")


# -- networks in every way that PyTorch lets one write them --------------------------------------


class FunctionalLinears(nn.Module):
    """Weights as bare parameters: F.linear, x @ W.T, x @ W and addmm."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(7, 6) / 3)
        self.w2 = nn.Parameter(torch.randn(5, 7) / 3)
        self.w3 = nn.Parameter(torch.randn(5, 8) / 3)
        self.w4 = nn.Parameter(torch.randn(8, 4) / 3)
        self.b1, self.b4 = nn.Parameter(torch.randn(7)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x, self.w1, self.b1))
        x = torch.tanh(x @ self.w2.T)
        x = torch.sigmoid(x @ self.w3)
        return torch.addmm(self.b4, x, self.w4)


class Conv1D(nn.Module):
    """The linear of GPT-2: a transposed weight, applied by addmm to flattened tokens."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs) / 3), nn.Parameter(torch.zeros(outputs))
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.outputs)


class GPTBlock(nn.Module):
    """Causal attention with one projection for q, k, v; an MLP of two Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.proj = Conv1D(8, 24), Conv1D(8, 8)
        self.fc, self.out = Conv1D(8, 16), Conv1D(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.proj(attended)
        return x + self.out(F.gelu(self.fc(self.norm2(x)), approximate="tanh"))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` with a subclass of Linear after it."""

    class Scaled(nn.Linear):
        """A subclass with its own forward."""

        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = self.Scaled(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class CalledTwice(nn.Module):
    """One module in two places, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(6, 6), nn.Linear(6, 6)
        self.alias = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.twice(torch.relu(self.first(x))))
        return self.alias(torch.relu(self.twice(x)))


class TiedAutoencoder(nn.Module):
    """Two linears that share one parameter, as language models tie embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle, self.decoder = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.middle(torch.tanh(self.encoder(x)))))


class InPlace(nn.Module):
    """In-place activations and additions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x), inplace=True)
        z = self.b(y)
        z += y
        z = z.mul_(0.5).relu_()
        return self.c(z.mean((2, 3)))


class Depthwise(nn.Module):
    """Depthwise and pointwise convolutions, string padding, adaptive pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(4, 8, 3, padding="same", groups=4)
        self.point = nn.Conv2d(8, 5, 1)
        self.line = nn.Conv1d(5, 3, 3, padding="valid", stride=2)
        self.up = nn.ConvTranspose1d(3, 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.point(F.relu6(self.depth(x))))
        return self.up(F.hardswish(self.line(x.flatten(2))))


class Mapping(nn.Module):
    """Several inputs, keyword arguments with defaults, a dictionary with a tuple as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.table = nn.Linear(6, 5), nn.Linear(4, 5), nn.Embedding(9, 5)

    def forward(
        self, x: Tensor, other: Tensor, index: Tensor | None = None, *, gain: float = 1.0
    ) -> dict[str, Tensor | tuple[Tensor, ...]]:
        y = torch.relu(self.a(x)) * gain + self.b(other)
        if index is not None:
            y = y + self.table(index)
        return {"sum": y, "parts": (y[:, :2], y[:, 2:]), "count": index}


class Lists(nn.Module):
    """Inputs in a list and a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 5)

    def forward(self, items: list[Tensor], named: dict[str, Tensor]) -> list[Tensor]:
        return [torch.relu(self.a(item)) + named["shift"] for item in items]


class Named(nn.Module):
    """Children with the names of the hybrid's own attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        self.plan = nn.Linear(6, 6)
        self.energy = nn.Linear(6, 6)
        self.summary = nn.Linear(6, 3)
        self.register_buffer("states", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x)) * self.states
        return self.summary(torch.tanh(self.energy(torch.relu(self.plan(x)))))


class PositionAndMask(nn.Module):
    """A parameter added to the input, a constant tensor, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)), persistent=False)
        self.scale = torch.tensor(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        x = self.mask @ x * self.scale
        return self.b(F.gelu(self.a(x))) + self.position


SOURCES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...]]] = {
    "functional": (FunctionalLinears, (noise(5, 6),)),
    "gpt": (GPTBlock, (noise(2, 5, 8),)),
    "attention": (SelfAttention, (noise(3, 4, 8),)),
    "called twice": (CalledTwice, (noise(5, 6),)),
    "tied": (TiedAutoencoder, (noise(5, 6),)),
    "in place": (InPlace, (noise(3, 2, 6, 6),)),
    "depthwise": (Depthwise, (noise(3, 4, 4, 4),)),
    "names": (Named, (noise(5, 6),)),
    "position": (PositionAndMask, (noise(3, 5, 8),)),
    "cnn": (lambda: DigitsCNN(4), (noise(5, 1, 8, 8),)),
    "mlp": (MLP, (noise(6, 8),)),
}
every_source = pytest.mark.parametrize("name", SOURCES)


def source_of(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    build, args = SOURCES[name]
    return warmed(seeded(build), *args), args


# -- values --------------------------------------------------------------------------------------


@every_source
def test_single_layer_blocks_are_the_source(name: str) -> None:
    model, args = source_of(name)
    hybrid = ffebm.convert(model, args, hardware=SINGLE, block_ops=ALL_WIRING)
    assert all(len(block.layers) == 1 for block in hybrid.blocks)
    assert relative(hybrid(*args), model(*args)) <= 1e-5
    model.zero_grad()
    hybrid(*args).square().mean().backward()
    model(*args).square().mean().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert {n for n, p in hybrid.named_parameters() if p.grad is not None} == set(expected)
    for parameter, gradient in expected.items():
        found = hybrid.get_parameter(parameter).grad
        assert (found - gradient).norm() <= 1e-5 * max(1e-3, float(gradient.norm())), parameter


@every_source
def test_without_feedback_every_block_is_the_source(name: str) -> None:
    model, args = source_of(name)
    options = {"hardware": ffebm.Hardware(layers_per_block=4), "block_ops": ALL_WIRING, "fold_batchnorm": True}
    hybrid = ffebm.convert(model, args, **options)
    strong = hybrid.compare(*args)
    assert set(strong.blocks) == {block.name for block in hybrid.blocks}
    coupled = [block.name for block in hybrid.blocks if block.module.program.coupled]
    assert all(strong.blocks[block] > 1e-4 for block in coupled[:1])
    hybrid.set_feedback(1e-6)
    weak = hybrid.compare(*args)
    assert all(deviation <= 1e-5 for deviation in weak.blocks.values()), weak
    assert weak.output <= 1e-5
    assert relative(hybrid(*args), model(*args)) <= 1e-5


def test_compare_measures_the_deviation_from_the_source() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, feedback=0.4).eval()
    comparison = hybrid.compare(x)
    assert comparison.output == pytest.approx(relative(hybrid(x), model(x)), rel=1e-4)
    assert comparison.output > 1e-3
    assert comparison.blocks == {"block_1": pytest.approx(comparison.output)}
    assert comparison.sweeps["block_1"] > 1
    assert "block_1" in str(comparison)


def test_every_weight_is_placed() -> None:
    """What other converters leave out without a word: functional, tied, subclassed and twice-called layers."""
    expected = {
        "functional": ["w1", "w2", "w3", "w4"],
        "gpt": ["qkv.weight", "proj.weight", "fc.weight", "out.weight"],
        "attention": ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"],
        "called twice": ["first.weight", "twice.weight"],
        "tied": ["encoder.weight", "middle.weight"],
        "depthwise": ["depth.weight", "point.weight", "line.weight", "up.weight"],
    }
    for name, weights in expected.items():
        model, args = source_of(name)
        plan = ffebm.plan(model, args)
        analog = [weight for weight, placement in plan.weights.items() if placement.block is not None]
        assert sorted(analog) == sorted(weights), name
        assert not plan.rejected, name


@pytest.mark.parametrize("batch", [0, 1, 2, 11])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt", "names"])
def test_any_batch_size(name: str, batch: int) -> None:
    model, (example,) = source_of(name)
    hybrid = ffebm.convert(model, example, fold_batchnorm=True)
    hybrid.set_feedback(1e-6)
    x = noise(batch, *example.shape[1:], seed=8)
    output = hybrid(x)
    expected = model(x)
    assert output.shape == expected.shape
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in hybrid.parameters())


def test_example_batch_of_one_leaves_the_batch_free() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x[:1])
    torch.testing.assert_close(hybrid(x)[:1], hybrid(x[:1]), rtol=1e-4, atol=1e-5)


class Length(nn.Module):
    """Reads the batch by len(), which the exporter takes for a constant; a second input of a fixed size."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        y = torch.relu(self.linear(x)).reshape(len(x), -1)
        return y if table is None else y + table.sum(0)


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_that_cannot_be_free_is_fixed_with_a_note(batch: int) -> None:
    model = seeded(Length)
    x = noise(batch, 4)
    hybrid = ffebm.convert(model, x)
    assert f"the batch size is fixed at {batch}: the model does not trace with a free one" in hybrid.plan.notes
    torch.testing.assert_close(hybrid(x), model(x))
    with pytest.raises(ffebm.InputError, match=rf"shape \(6, 4\), expected \({batch}, 4\)"):
        hybrid(noise(6, 4))


def test_input_that_only_happens_to_have_the_size_of_the_batch() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)) @ mask)

    model = seeded(Masked)
    hybrid = ffebm.convert(model, (noise(4, 4), noise(4, 4, seed=6)), hardware=SINGLE)
    x, mask = noise(7, 4), noise(4, 4, seed=8)
    torch.testing.assert_close(hybrid(x, mask), model(x, mask))
    with pytest.raises(ffebm.InputError, match=r"shape \(5, 4\), expected \(4, 4\)"):
        hybrid(x, noise(5, 4))


def test_several_inputs_keywords_and_dictionaries() -> None:
    model = seeded(Mapping)
    x, other, index = noise(4, 6), noise(4, 4, seed=6), torch.tensor([1, 0, 8, 3])
    hybrid = ffebm.convert(model, (x, other), {"index": index, "gain": 2.0}, hardware=SINGLE)
    expected = model(x, other, index=index, gain=2.0)
    for call in (
        lambda: hybrid(x, other, index=index, gain=2.0),
        lambda: hybrid(x, other, index, gain=2.0),
        lambda: hybrid(x=x, other=other, gain=2.0, index=index),
        lambda: hybrid(other=other, x=x, index=index, gain=2.0),
    ):
        found = call()
        assert list(found) == list(expected)
        torch.testing.assert_close(found["sum"], expected["sum"])
        assert isinstance(found["parts"], tuple)
        torch.testing.assert_close(found["parts"], expected["parts"])
        assert torch.equal(found["count"], index)
    assert inspect.signature(hybrid) == inspect.signature(model.forward)


def test_inputs_in_lists_and_dictionaries() -> None:
    model = seeded(Lists)
    args = ([noise(4, 6), noise(4, 6, seed=6)], {"shift": noise(4, 5)})
    hybrid = ffebm.convert(model, args, hardware=SINGLE)
    torch.testing.assert_close(hybrid(*args), model(*args))
    smaller = ([noise(2, 6), noise(2, 6, seed=6)], {"shift": noise(2, 5)})
    torch.testing.assert_close(hybrid(*smaller), model(*smaller))


def test_exported_program_and_graph_module_are_models_too() -> None:
    model, x = mlp()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    traced = torch.fx.symbolic_trace(model)
    expected = ffebm.convert(model, x)
    for other in (exported, traced):
        hybrid = ffebm.convert(other, x)
        assert hybrid.plan.blocks[0].weights == expected.plan.blocks[0].weights
        torch.testing.assert_close(hybrid(x), expected(x))
        assert list(hybrid.state_dict()) == list(model.state_dict())


def test_an_exported_program_is_left_as_it_is() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 3))).eval()
    x = noise(2, 4)
    exported = torch.export.export(model, (x,), strict=False)
    before = str(exported.graph)
    hybrids = [ffebm.convert(exported, x) for _ in range(2)]
    assert str(exported.graph) == before
    torch.testing.assert_close(exported.module()(x), model(x))
    assert hybrids[0].plan == hybrids[1].plan


# -- names and state -----------------------------------------------------------------------------


@every_source
def test_state_dict_has_the_keys_and_tensors_of_the_source(name: str) -> None:
    model, args = source_of(name)
    hybrid = ffebm.convert(model, args)
    assert list(hybrid.state_dict()) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(hybrid.state_dict()[key], value)
    assert list(copy.deepcopy(hybrid).state_dict()) == list(model.state_dict())
    hybrid.load_state_dict(model.state_dict())
    assert [n for n, _ in hybrid.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in hybrid.named_buffers()][: len(list(model.buffers()))] == [n for n, _ in model.named_buffers()]


def test_load_state_dict_before_and_after() -> None:
    first, x = digits_cnn()
    other = warmed(seeded(lambda: DigitsCNN(4), seed=7), 3 * x)
    before = copy.deepcopy(first)
    before.load_state_dict(other.state_dict())
    expected = ffebm.convert(before, x, fold_batchnorm=True)
    hybrid = ffebm.convert(first, x, fold_batchnorm=True)
    stale = hybrid.blocks[0].certificate
    result = hybrid.load_state_dict(other.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(hybrid(x), expected(x))
    assert hybrid.blocks[0].certificate != stale
    for block, want in zip(hybrid.blocks, expected.blocks, strict=True):
        assert block.certificate == want.certificate
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        hybrid.load_state_dict({k: v for k, v in other.state_dict().items() if k != "head.weight"})


def test_state_survives_a_file(tmp_path: Any) -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(1.1)
    torch.save(hybrid.state_dict(), tmp_path / "state.pt")
    fresh = ffebm.convert(model, x, fold_batchnorm=True)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), hybrid(x))  # with the feedback that was set, whatever these weights would need
    fresh.recertify()
    hybrid.recertify()
    assert torch.equal(fresh(x), hybrid(x))
    buffer = io.BytesIO()
    torch.save(hybrid.state_dict(), buffer)
    assert buffer.tell() > 0


@every_source
def test_source_is_never_changed(name: str) -> None:
    model, args = source_of(name)
    model.train()
    for module in list(model.modules())[1::2]:
        module.eval()  # a mixture of flags
    next(model.parameters()).requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    needs = [parameter.requires_grad for parameter in model.parameters()]
    keys = [set(vars(module)) for module in model.modules()]
    identity = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    versions = [tensor._version for tensor in [*model.parameters(), *model.buffers(), *args]]
    random = torch.get_rng_state()

    hybrid = ffebm.convert(model, args, fold_batchnorm=name == "mlp")
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in hybrid.to_digital().modules()] == flags
    assert [parameter.requires_grad for parameter in hybrid.parameters()] == needs
    hybrid.train()
    optimizer = torch.optim.SGD(hybrid.parameters(), 0.1)
    hybrid(*args).square().mean().backward()
    optimizer.step()
    hybrid.eval()
    hybrid.compare(*args)
    hybrid.double()

    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == needs
    assert [set(vars(module)) for module in model.modules()] == keys
    assert [id(tensor) for tensor in [*model.parameters(), *model.buffers()]] == identity
    assert [tensor._version for tensor in [*model.parameters(), *model.buffers(), *args]] == versions
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_deepcopy_is_independent() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x)
    expected = hybrid(x).detach()
    other = copy.deepcopy(hybrid)
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    other.set_gradient("implicit")
    assert hybrid.blocks[0].module.estimator.name == "ep"
    other.train()
    for _ in range(2):
        other(x).sum().backward()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    torch.testing.assert_close(hybrid(x), expected, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in hybrid.parameters())
    for (name, mine), theirs in zip(hybrid.named_buffers(), other.buffers(), strict=True):
        if "running" in name or "tracked" in name:
            assert not torch.equal(mine, theirs), name


@pytest.mark.parametrize("name", ["tied", "called twice"])
def test_tied_weights_stay_tied(name: str) -> None:
    model, args = source_of(name)
    hybrid = ffebm.convert(model, args, hardware=SINGLE)
    if name == "tied":
        assert hybrid.get_parameter("encoder.weight") is hybrid.get_parameter("decoder.weight")
    else:
        assert hybrid.get_submodule("first") is hybrid.get_submodule("alias")
    assert len(list(hybrid.parameters())) == len(list(model.parameters()))
    # The gradient is the sum over both uses: that of an untied copy, added up.
    untied = copy.deepcopy(model)
    if name == "tied":
        untied.decoder.weight = nn.Parameter(untied.decoder.weight.detach().clone())
        untied(*args).square().sum().backward()
        expected = untied.encoder.weight.grad + untied.decoder.weight.grad
        hybrid(*args).square().sum().backward()
        torch.testing.assert_close(hybrid.get_parameter("encoder.weight").grad, expected)
    report = ffebm.check_gradients(ffebm.convert(model, args), args, lambda y: y.square().sum())
    assert report.worst("ep")[1].cosine >= 0.9999


# -- train and eval ------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_batch_norm_statistics_follow_the_source(momentum: float | None) -> None:
    model, x = digits_cnn()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum
    hybrid = ffebm.convert(model, x, hardware=SINGLE)
    for step in range(3):
        model.train()
        hybrid.train()
        batch = noise(6, 1, 8, 8, seed=step) * (1 + step)
        torch.testing.assert_close(hybrid(batch), model(batch), rtol=1e-4, atol=1e-5)
        for (name, mine), theirs in zip(hybrid.named_buffers(), model.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
        model.eval()
        hybrid.eval()
        torch.testing.assert_close(hybrid(batch), model(batch), rtol=1e-4, atol=1e-5)
    assert int(hybrid.get_buffer("bn.num_batches_tracked")) == 4  # one from `warmed`
    # The gradients in train mode are those through the batch's statistics.
    model.train()
    hybrid.train()
    model.zero_grad()
    model(x).square().sum().backward()
    hybrid(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert relative(hybrid.get_parameter(name).grad, parameter.grad) <= 1e-3, name


def test_one_batch_norm_can_be_frozen() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, hardware=SINGLE)
    for network in (hybrid, model):
        network.train()
        network.get_submodule("block1.bn1").eval()
        network(2 * x)
    assert int(hybrid.get_buffer("block1.bn1.num_batches_tracked")) == 1
    assert int(hybrid.get_buffer("block1.bn2.num_batches_tracked")) == 2
    for (name, mine), theirs in zip(hybrid.named_buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


def test_batch_norm_without_statistics_normalises_by_the_batch_in_eval_mode() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, track_running_stats=False), nn.ReLU()))
    x = noise(7, 6)
    for mode in (True, False):
        hybrid = ffebm.convert(model.eval(), x)
        torch.testing.assert_close(hybrid.train(mode)(3 * x), model.train(mode)(3 * x))


def test_conversion_keeps_the_mode_of_the_source() -> None:
    model, x = digits_cnn()
    assert not ffebm.convert(model, x).training
    model.train()
    hybrid = ffebm.convert(model, x)
    assert hybrid.training
    assert hybrid.get_submodule("bn").training
    assert torch.equal(hybrid.get_buffer("bn.running_mean"), model.bn.running_mean)
    assert hybrid.eval() is hybrid
    assert not hybrid.get_submodule("bn").training


class Dropping(nn.Module):
    """Dropout between two layers, as a module, a function and a method of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 40), nn.Linear(40, 40), nn.Linear(40, 4)
        self.drop = nn.Dropout(0.4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.relu(self.a(x)))
        x = F.dropout(torch.tanh(self.b(x)), 0.3, self.training)
        return self.c(x)


@pytest.mark.parametrize("layers", [1, 3])
def test_dropout_draws_the_masks_of_the_source_in_train_mode_only(layers: int) -> None:
    model = seeded(Dropping)
    x = noise(5, 6)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=layers), feedback=1e-6)
    assert len(hybrid.blocks) == (1 if layers == 3 else 3)
    for network in (model, hybrid):
        network.train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        torch.testing.assert_close(hybrid(x), expected, rtol=1e-4, atol=1e-5)
        outputs.append(hybrid(x).detach())
    assert not torch.allclose(outputs[0], hybrid(x), rtol=1e-2)
    for network in (model, hybrid):
        network.eval()
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hybrid(x), hybrid(x), rtol=0, atol=0)
    hybrid.get_submodule("drop").train()  # only this one
    assert not torch.allclose(hybrid(x), model(x), rtol=1e-2)
    hybrid.get_submodule("drop").p = 0.0
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["ep", "implicit"])
def test_dropout_in_a_block_is_one_mask_for_all_phases(estimator: str) -> None:
    model = seeded(Dropping).double()
    x = noise(5, 6).double()
    hybrid = ffebm.convert(model, x, feedback=0.3).train()
    assert len(hybrid.blocks) == 1

    def gradients(name: str) -> dict[str, Tensor]:
        hybrid.set_gradient(name)
        hybrid.zero_grad()
        torch.manual_seed(5)
        hybrid(x).square().sum().backward()
        return {n: p.grad.clone() for n, p in hybrid.named_parameters()}

    expected = gradients("unrolled")
    for name, gradient in gradients(estimator).items():
        limit = 1e-8 if estimator == "implicit" else 1e-2
        assert relative(gradient, expected[name]) <= limit, name


def test_attention_dropout_is_active_in_train_mode_only() -> None:
    model, x = transformer(dropout=0.5)
    hybrid = ffebm.convert(model, x, hardware=SINGLE)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-4, atol=1e-5)
    hybrid.train()
    assert not torch.allclose(hybrid(x), hybrid(x), rtol=1e-2)
    for module in hybrid.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert not torch.allclose(hybrid(x), hybrid(x), rtol=1e-2)  # what is left is the attention's own


# -- dtypes, autocast, training ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_before_and_after_conversion(name: str, dtype: torch.dtype) -> None:
    model, (x,) = source_of(name)
    reference = ffebm.convert(model, x, fold_batchnorm=True)(x)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    before = ffebm.convert(copy.deepcopy(model).to(dtype), x.to(dtype), fold_batchnorm=True)
    after = ffebm.convert(model, x, fold_batchnorm=True).to(dtype)
    for hybrid in (before, after):
        output = hybrid(x.to(dtype))
        assert output.dtype == dtype
        assert relative(output.float(), reference) <= tolerance
        output.sum().backward()
        for key, parameter in hybrid.named_parameters():
            assert parameter.dtype == dtype
            assert parameter.grad is None or (parameter.grad.dtype == dtype and parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
def test_autocast_in_bfloat16(estimator: str) -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True, gradient=estimator)
    expected = hybrid(x)
    expected.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in hybrid.named_parameters()}
    hybrid.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = hybrid(x)
        loss = output.square().mean()
    loss.backward()
    assert relative(output.float(), expected) <= 0.05
    for name, parameter in hybrid.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert F.cosine_similarity(parameter.grad.flatten(), plain[name].flatten(), dim=0) >= 0.98, name


@pytest.mark.parametrize("estimator", ["ep", "implicit", "unrolled"])
@pytest.mark.parametrize("network", [digits_cnn, transformer, mlp])
def test_training_lowers_the_loss(network: Callable[[], tuple[nn.Module, Tensor]], estimator: str) -> None:
    model, x = network()
    hybrid = ffebm.convert(model, x, gradient=estimator).train()
    target = noise(*hybrid(x).shape, seed=9)
    optimizer = torch.optim.Adam(hybrid.parameters(), 0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.mse_loss(hybrid(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0], losses
    hybrid.recertify()
    assert all(block.certificate is None or block.certificate.certified for block in hybrid.blocks)


def test_to_digital_is_the_source_class_with_the_trained_weights() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x)
    with torch.no_grad():
        hybrid.get_parameter("head.bias").add_(3)
    digital = hybrid.to_digital()
    assert type(digital) is DigitsCNN
    torch.testing.assert_close(digital(x), model(x) + 3)
    with torch.no_grad():
        digital.head.bias.zero_()
    assert hybrid.get_parameter("head.bias").abs().sum() > 1
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x) + 3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_functional_call_uses_the_given_parameters(name: str) -> None:
    model, (x,) = source_of(name)
    hybrid = ffebm.convert(model, x, hardware=SINGLE)
    scaled = {key: 0.5 * value.detach() for key, value in model.named_parameters()}
    found = torch.func.functional_call(hybrid, scaled, (x,))
    torch.testing.assert_close(found, torch.func.functional_call(model, scaled, (x,)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hybrid(x), model(x), rtol=1e-4, atol=1e-5)


def test_replacing_a_parameter_object_is_seen() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, hardware=SINGLE)
    hybrid.get_submodule("layers.3").bias = nn.Parameter(torch.full((5,), 2.0))
    model.layers[3].bias = nn.Parameter(torch.full((5,), 2.0))
    torch.testing.assert_close(hybrid(x), model(x))


def test_inference_mode_and_no_grad() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    expected = hybrid(x)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            output = hybrid(x)
        assert not output.requires_grad
        assert torch.equal(output, expected)


# -- blocks --------------------------------------------------------------------------------------


def test_children_named_like_the_hybrids_own_attributes() -> None:
    model, args = source_of("names")
    hybrid = ffebm.convert(model, args)
    assert isinstance(hybrid.plan, ffebm.Plan)
    assert all(block.layers for block in hybrid.blocks)
    assert "block_1" in hybrid.summary()
    assert list(hybrid.state_dict()) == list(model.state_dict())
    hybrid.train()
    hybrid.load_state_dict(model.state_dict())
    hybrid.set_feedback(1e-6)
    hybrid(*args).sum().backward()
    for name, _ in model.named_parameters():
        assert hybrid.get_parameter(name).grad is not None, name
    torch.testing.assert_close(hybrid(*args), model(*args), rtol=1e-4, atol=1e-5)


def test_blocks_have_states_names_and_settle() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, feedback=0.3).eval()
    (block,) = hybrid.blocks
    output = hybrid(x)
    assert block.state_names == ("layers.0", "layers.1", "layers.2", "layers.3")
    assert [tuple(state.shape) for state in block.states] == [(6, 12), (6, 10), (6, 9), (6, 5)]
    assert torch.equal(block.states[-1], output)
    settled = block.settle(x)
    assert settled.converged
    assert settled.sweeps > 1
    torch.testing.assert_close(settled.states, block.states)
    for state, h in zip(settled.states[:-1], settled.preactivations[:-1], strict=True):
        torch.testing.assert_close(state, h.relu())
    assert block.loop_gain == pytest.approx(0.3, rel=1e-3)


def test_settings_change_what_runs() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, feedback=0.1)
    weak = hybrid(x)
    hybrid.set_feedback(0.6)
    strong = hybrid(x)
    assert relative(strong, model(x)) > 2 * relative(weak, model(x))
    fresh = ffebm.convert(model, x, feedback=0.6)
    torch.testing.assert_close(strong, fresh(x))
    hybrid.set_gradient(ffebm.EquilibriumPropagation(beta=0.1, variant="centered"))
    assert hybrid.blocks[0].module.estimator == ffebm.EquilibriumPropagation(0.1, "centered")


def test_same_model_gives_the_same_plan_and_bits() -> None:
    model, x = digits_cnn()
    first, second = (ffebm.convert(model, x, fold_batchnorm=True) for _ in range(2))
    assert first.plan == second.plan
    assert torch.equal(first(x), second(x))
    again = ffebm.convert(model, x, plan=first.plan)
    assert torch.equal(again(x), first(x))
    assert ffebm.plan(model, x, fold_batchnorm=True) == first.plan


@pytest.mark.parametrize("name", CASES)
def test_conversion_under_no_grad_is_the_same(name: str) -> None:
    model, x = CASES[name].make(nn.ReLU)
    expected = ffebm.convert(model, x, **CASES[name].options)
    with torch.no_grad():
        hybrid = ffebm.convert(model, x, **CASES[name].options)
    assert hybrid.plan == expected.plan
    hybrid(x).sum().backward()
    assert all(parameter.grad is not None for parameter in hybrid.parameters())
