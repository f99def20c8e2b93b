"""`torch.compile` of a hybrid: the same numbers, and no compilation per step or per batch size."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator

import networks
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import ffebm_compiler as ffebm

# torch 2.13 reads `.grad` of what enters a graph after a graph break, and its inductor loads torch.jit classes.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
)

Gradients = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _hybrid(name: str, gradient: str = "ep") -> tuple[ffebm.HybridModel, Tensor]:
    model, x = networks.transformer() if name == "transformer" else networks.digits_cnn()
    # Folded, the CNN has blocks that settle; as it is, each convolution is a block of its own.
    return ffebm.convert(model, x, gradient=gradient, fold_batchnorm=name == "folded"), x


def _step(called: nn.Module, owner: nn.Module, x: Tensor) -> tuple[Tensor, Gradients]:
    owner.zero_grad(set_to_none=True)
    y = called(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in owner.named_parameters() if p.grad is not None}


def _agree(found: tuple[Tensor, Gradients], wanted: tuple[Tensor, Gradients]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, wanted[1][name], rtol=1e-3, atol=1e-4 * largest, msg=name)


def _batches(x: Tensor) -> list[Tensor]:
    return [networks.noise(size, *x.shape[1:], seed=size) for size in (4, 7, 3, 9)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "gradient", "backend"),
    [
        ("digits", "ep", "aot_eager"),
        ("folded", "ep", "aot_eager"),
        ("folded", "implicit", "eager"),
        ("transformer", "ep", "eager"),
        ("transformer", "implicit", "aot_eager"),
    ],
)
def test_compiled_is_eager(name: str, gradient: str, backend: str) -> None:
    hybrid, x = _hybrid(name, gradient)
    reference = copy.deepcopy(hybrid)
    compiled = torch.compile(hybrid, backend=backend)
    for train in (True, False):
        hybrid.train(train)
        reference.train(train)
        for batch in _batches(x)[:2]:
            _agree(_step(compiled, hybrid, batch), _step(reference, reference, batch))
    for key, value in reference.state_dict().items():  # running statistics, too
        torch.testing.assert_close(hybrid.state_dict()[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "folded"])
def test_steps_and_batch_sizes_compile_nothing_anew(name: str) -> None:
    hybrid, x = _hybrid(name)
    hybrid.train()
    hybrid.recertify_every = 2
    compiled = torch.compile(hybrid, backend="eager")
    for batch in _batches(x)[:2]:  # the second size makes the batch a symbol
        _step(compiled, hybrid, batch)
    frames = dict(counters["frames"])
    for batch in [*_batches(x), *_batches(x)]:
        with torch.no_grad():
            for parameter in hybrid.parameters():
                parameter.mul_(1.01)
        _step(compiled, hybrid, batch)
    assert counters["frames"] == frames
    assert all(block.module.gain.changes == 8 for block in hybrid.blocks if block.certificate is not None)


@pytest.mark.slow
def test_many_settling_blocks_stay_under_the_recompile_limit() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    x = networks.noise(3, 4)
    hybrid = ffebm.convert(networks.seeded(lambda: nn.Sequential(*(Layer() for _ in range(10)))), x)
    assert sum(block.module.program.coupled for block in hybrid.blocks) == 10 > torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        _agree(_step(torch.compile(hybrid, backend="eager"), hybrid, x), _step(hybrid, hybrid, x))


def test_blocks_without_feedback_are_compiled_with_the_digital_parts() -> None:
    hybrid, x = _hybrid("digits")
    assert not any(block.module.program.coupled for block in hybrid.blocks)
    torch.compile(hybrid, backend="eager")(x)
    assert counters["stats"]["unique_graphs"] == 1


def test_compile_in_place_keeps_the_interface() -> None:
    hybrid, x = _hybrid("folded")
    keys, before = list(hybrid.state_dict()), hybrid(x)
    hybrid.compile(backend="eager")
    torch.testing.assert_close(hybrid(x), before)
    assert list(hybrid.state_dict()) == keys
    states = [[state.clone() for state in block.states] for block in hybrid.blocks]
    again = copy.deepcopy(hybrid)
    again(x)
    torch.testing.assert_close(states, [list(block.states) for block in again.blocks])
    with pytest.raises(ffebm.InputError, match="holds NaN"):
        hybrid(torch.full_like(x, torch.nan))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["folded", "transformer"])
@pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler"
)
def test_inductor_is_eager(name: str) -> None:
    hybrid, x = _hybrid(name)
    reference = copy.deepcopy(hybrid)
    keys = list(hybrid.state_dict())
    hybrid.train().compile()
    reference.train()
    for batch in _batches(x)[:2]:
        _agree(_step(hybrid, hybrid, batch), _step(reference, reference, batch))
    assert list(hybrid.state_dict()) == keys
