"""In-place operations become functional ones: values and gradients are those of the eager model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from networks import noise, seeded
from running import run, targets
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Program, verify
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.explicit_casts import explicit_casts
from ffebm_compiler.passes.functionalize import functionalize
from ffebm_compiler.passes.inline_regions import inline_regions

# -- random programs -----------------------------------------------------------------------------

UNARY: dict[str, Callable[[Tensor], object]] = {
    "relu_": lambda a: a.relu_(),
    "sigmoid_": lambda a: a.sigmoid_(),
    "neg_": lambda a: a.neg_(),
    "clamp_": lambda a: a.clamp_(-0.5, 0.5),
    "+=": lambda a: a.add_(1.0),
    "zero_": lambda a: a[:, 0].zero_(),
    "fill_": lambda a: a[1].fill_(0.25),
    "masked_fill_": lambda a: a.masked_fill_(torch.eye(4, dtype=torch.bool), 0.5),
    "slice": lambda a: a[:, 1:3].relu_(),
    "every other": lambda a: a[::2].mul_(2.0),
    "diagonal": lambda a: a.diagonal().sigmoid_(),
    "index_put_": lambda a: a.index_put_((torch.tensor([0, 2]),), torch.ones(4), accumulate=True),
    "by index": lambda a: a.__setitem__((torch.tensor([3, 0]), torch.tensor([1, 1])), 0.125),
    "scatter_": lambda a: a.scatter_(1, torch.tensor([[0], [1], [2], [3]]), 2.0),
    "index_add_": lambda a: a.index_add_(0, torch.tensor([1, 1]), torch.ones(2, 4)),
    "unsqueezed": lambda a: a.view(2, 8).unsqueeze(0)[:, 1].add_(0.5),
    "unfold": lambda a: a.unfold(0, 2, 2).mul_(0.5),
    "permuted": lambda a: a.view(2, 2, 4).permute(2, 0, 1)[1:3].add_(0.25),
    "expanded": lambda a: a.expand(4, 4).add_(0.5),
    "split": lambda a: a.detach().split(2, 1)[1].add_(1.0),
}
BINARY: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add_": lambda a, b: a.add_(b),
    "mul_": lambda a, b: a.mul_(b),
    "select": lambda a, b: a[0].mul_(b[1]),
    "assign": lambda a, b: a.__setitem__((slice(None), 1), b[2] + 1),
    "copy_": lambda a, b: a[1:].copy_(b[0] * 1.0),
    "addcmul_": lambda a, b: a.addcmul_(b, b, value=0.5),
    "lerp_": lambda a, b: a.lerp_(b, 0.25),
    "out=": lambda a, b: torch.add(b.detach(), 1.0, out=torch.empty(4, 4)).add_(a),
}
MAKES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda a: a,
    "sin": torch.sin,
    "view": lambda a: a.view(2, 2, -1).view(a.shape),
    "transpose": lambda a: a.t(),
    "float": lambda a: a.float(),
    "contiguous": lambda a: a.contiguous(),
    "flattened": lambda a: a.flatten().reshape(4, 4),
    "topk": lambda a: a.topk(4, -1)[0],
    "sort": lambda a: a.sort(0)[0],
    "detached": lambda a: a.detach(),
    "unbound": lambda a: torch.stack(a.unbind(1)),
}


class Chain(nn.Module):
    """A random program of in-place and ordinary steps over a growing list of values."""

    def __init__(self, steps: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.steps = list(steps)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.linear(x)]
        for name, first, second in self.steps:
            a, b = values[first % len(values)], values[second % len(values)]
            if name in UNARY:
                UNARY[name](a)
            elif name in BINARY:
                BINARY[name](a, b)
            else:
                values.append(self.linear(a) if name == "linear" else MAKES[name](a))
        return torch.cat(values)


STEPS = st.lists(
    st.tuples(st.sampled_from([*UNARY, *BINARY, *MAKES]), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8
)


def passed(model: nn.Module, x: Tensor) -> Program:
    program = functionalize(explicit_casts(inline_regions(capture(model, (x,), {}, None))))
    verify(program)
    mutable = [
        target for target in targets(program) if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
    ]
    assert not mutable
    return program


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_functionalize_computes_what_in_place_steps_compute(steps: list[tuple[str, int, int]]) -> None:
    model, x = seeded(lambda: Chain(steps)), noise(4, 4)
    try:
        expected = model(x)
    except RuntimeError:  # torch refuses a value and its own transpose as operands of a write
        reject()
    program = passed(model, x)
    found = run(program, x)
    torch.testing.assert_close(found, expected)
    if not expected.requires_grad:
        return
    direction = noise(*expected.shape, seed=1)
    try:
        (expected * direction).sum().backward()
    except RuntimeError:  # the source overwrites what its own backward needs
        reject()
    (found * direction).sum().backward()
    assert model.linear.weight.grad is not None
    torch.testing.assert_close(program.source.linear.weight.grad, model.linear.weight.grad, rtol=1e-4, atol=1e-5)


# -- ordinary models -----------------------------------------------------------------------------


def sliced(self: nn.Module, x: Tensor) -> Tensor:
    y = torch.tanh(self.a(x)) * 1.0
    y[:, :1] += 0.5
    y[:, 2:4][:, ::2] *= 2.0
    return self.b(y)


def router(self: nn.Module, x: Tensor) -> Tensor:
    values, places = torch.softmax(self.a(x), -1).topk(2, -1)
    values /= values.sum(-1, keepdim=True)
    return self.b(torch.zeros_like(self.a(x)).scatter_(1, places, values.float().mul_(2.0)))


def flattened(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x).view(-1, 4, 4).transpose(1, 2)
    z = y.flatten(1)  # a copy, since y is not contiguous
    y.mul_(2.0)
    return self.b(z + y.flatten(1))


def recurrent(self: nn.Module, x: Tensor) -> Tensor:
    out, _ = self.rnn(self.a(x)[:, None])
    out += 0.5
    return self.b(out[:, 0])


def into_integers(self: nn.Module, x: Tensor) -> Tensor:
    counts = torch.zeros(x.shape[0], 16, dtype=torch.long)
    counts[:, ::2] += torch.ones(8, dtype=torch.int32)
    y = self.a(x) * 1.0
    y.gt_(0)
    return self.b(y + counts)


def without_gradient(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x) * 1.0
    with torch.no_grad():
        y[:, ::2] *= 0.5
        y.mul_(2.0)
    z = self.a(x) * 1.0
    z.data.clamp_(-0.5, 0.5)
    return self.b(y * z)


def moved(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x) * 1.0
    z = y.view(-1, 4, 4)
    z.transpose_(1, 2)
    z[:, 0] += 1.0
    z.unsqueeze_(1).mul_(2.0)
    return self.b(y)


def masks(self: nn.Module, x: Tensor) -> Tensor:
    y = self.a(x) * 1.0
    mask = torch.ones(16, dtype=torch.bool)
    mask &= torch.arange(16) > 3
    mask[5] = False
    y[:, mask] = 0.0
    y.masked_fill_(y > 1, 1.0)
    return self.b(y)


FORWARDS = (sliced, router, flattened, recurrent, into_integers, without_gradient, moved, masks)


class Layers(nn.Module):
    """Two layers, a recurrent one, and a forward from the table."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.rnn = nn.Linear(8, 16), nn.Linear(16, 4), nn.GRU(16, 16, batch_first=True)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_models_that_write_in_place_convert_and_train(forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = seeded(lambda: Layers(forward))
    hybrid = ffebm.convert(model, noise(5, 8), hardware=ffebm.Hardware(layers_per_block=1))
    x = noise(7, 8, seed=1)
    found, expected = hybrid(x), model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in hybrid.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found = gradients[name] if gradients[name] is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(found, parameter.grad, rtol=2e-3, atol=1e-4)


def test_whole_numbers_between_two_bounds_are_the_sources() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        h = self.a(x) + torch.empty(x.shape[0], 16).random_(2, 9)
        return self.b(h * torch.empty(16, dtype=torch.long).random_(-5, to=x.shape[1]))

    model = seeded(lambda: Layers(forward))
    hybrid = ffebm.convert(model, noise(5, 8))
    x = noise(7, 8, seed=1)
    with hybrid.feedforward_mode():
        torch.manual_seed(0)
        found = hybrid(x)
        torch.manual_seed(0)
        torch.testing.assert_close(found, model(x))


def test_a_write_to_what_relu_saved_trains_where_the_source_cannot() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y[:, :1] += 0.5
        return self.b(y)

    model, x = seeded(lambda: Layers(forward)), noise(5, 8)
    hybrid = ffebm.convert(model, x, hardware=ffebm.Hardware(layers_per_block=1))
    hybrid(x).sum().backward()
    functional = copy.deepcopy(model)
    y = F.relu(functional.a(x))
    functional.b(torch.cat([y[:, :1] + 0.5, y[:, 1:]], 1)).sum().backward()
    torch.testing.assert_close(hybrid.get_parameter("a.weight").grad, functional.a.weight.grad, rtol=1e-4, atol=1e-5)


# -- refusals ------------------------------------------------------------------------------------


def test_functionalize_refuses_a_write_that_it_cannot_put_back() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.a(x) * 1.0
        y.as_strided((2, 4), (8, 1)).mul_(2.0)
        return self.b(y)

    with pytest.raises(UnsupportedError, match=r"through aten\.as_strided.*out of place \(.*test_functionalize\.py, "):
        passed(seeded(lambda: Layers(forward)), noise(4, 8))


def test_functionalize_refuses_an_operation_without_a_functional_form() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.a(x).detach()
        y.resize_(2, 16)
        return self.b(y)

    with pytest.raises(UnsupportedError, match=r"aten\.resize_\.default, which has no functional form"):
        passed(seeded(lambda: Layers(forward)), noise(4, 8))


def test_functionalize_refuses_a_buffer_that_gets_other_memory() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        self.kept.set_(self.kept + 1)
        return self.b(self.a(x)) * self.kept[0]

    model = seeded(lambda: Layers(forward))
    model.register_buffer("kept", torch.zeros(8))
    with pytest.raises(
        UnsupportedError, match=r"aten\.set_\.source_Tensor, which has no functional form: write it out"
    ):
        passed(model, noise(4, 8))


class Returned(nn.Module):
    """A buffer is written and returned: before the write, after it, and through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.register_buffer("n", torch.zeros(6))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        before = self.n
        self.n.add_(1)
        return self.a(x) * self.n, self.n, before, self.n[:2]


def test_a_buffer_that_the_forward_writes_may_be_returned() -> None:
    model, x = Returned(), torch.randn(4, 6)
    hybrid = ffebm.convert(model, x)
    for training in (True, False):
        with hybrid.feedforward_mode():
            torch.testing.assert_close(hybrid.train(training)(x), model.train(training)(x))
        torch.testing.assert_close(hybrid.state_dict(), model.state_dict())
