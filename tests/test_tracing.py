"""What must hold while a forward is traced, and that everything is as before afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from same_as_source import assert_same
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer

import ffebm_compiler as ffebm
from ffebm_compiler.passes.tracing import UsersCalls, tracing

ONE = ffebm.Hardware(layers_per_block=1)


class Encoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padded)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_with_a_padding_mask(train: bool) -> None:
    model = seeded(lambda: Encoder(0.0)).train(train)
    padded = torch.zeros(3, 5, dtype=torch.bool)
    padded[1, 3:] = padded[2, 4:] = True
    hybrid = ffebm.convert(model, (noise(3, 5, 16), padded), hardware=ONE).train(train)
    x = noise(3, 5, 16, seed=1)
    torch.testing.assert_close(hybrid(x, padded), model(x, padded), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        # Without gradients torch's fused path returns zeros at padded places; elsewhere it is the same.
        found, expected = hybrid(x, padded), model(x, padded)
    torch.testing.assert_close(found[~padded], expected[~padded], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.2, 0.9])
def test_attention_that_drops_whatever_the_mode(rate: float) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(F.dropout(x, rate))[:, None].chunk(3, -1)
            return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=rate)[:, 0])

    model, x = seeded(Attention).eval(), noise(2, 5, 16)
    hybrid = ffebm.convert(copy.deepcopy(model), x, hardware=ONE).eval()
    for seed in range(3):
        torch.manual_seed(seed)
        found = hybrid(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)


class DroppedAtRandom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.tanh(self.linear(x))
        return x + branch * torch.bernoulli(torch.full((len(x), 1), 0.5)) if self.training else x + branch


class Shared(nn.Module):
    """Modules that have two names each, of which the forward asks which one it is."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DroppedAtRandom(), DroppedAtRandom(), DroppedAtRandom()])
        self.last, self.head = self.layers[-1], nn.Linear(6, 3)
        self.again = self.head

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.sigmoid(layer(x)) if layer is self.last else layer(x)
        return self.again(x) + self.head(self.last(x))


@pytest.mark.parametrize("train", [False, True])
def test_modules_with_two_names_are_themselves(train: bool) -> None:
    assert_same(seeded(Shared), noise(5, 6), train=train, calls=2)


class Teacher(nn.Module):
    """A forward that sets the flags of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.teacher = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.always = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.teacher.eval()
        self.always.train()
        return self.student(x), self.always(self.teacher(x))


@pytest.mark.parametrize("train", [False, True])
def test_flags_that_a_forward_sets_stay_set(train: bool) -> None:
    assert_same(seeded(Teacher), noise(5, 6), train=train, calls=2)


class Clipped(nn.Module):
    """Weights that shrink at every call in train mode."""

    def __init__(self, of_same_shape: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.of_same_shape = of_same_shape

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            data = self.linear.weight.data
            self.linear.weight.data = 0.9 * data if self.of_same_shape else 0.9 * data[:3]
        return self.linear(x)


@pytest.mark.parametrize("train", [False, True])
def test_data_that_a_forward_sets_is_written(train: bool) -> None:
    model = seeded(lambda: Clipped(True))
    before = model.linear.weight.detach().clone()
    hybrid = assert_same(model, noise(5, 6), train=train, calls=3)
    torch.testing.assert_close(hybrid.get_parameter("linear.weight").detach(), before * (0.9**3 if train else 1.0))


def test_data_of_another_shape_is_refused() -> None:
    hybrid = ffebm.convert(seeded(lambda: Clipped(False)), noise(5, 6)).train()
    with pytest.raises(ffebm.UnsupportedError, match=r"data is replaced here: .* of shape \(3, 6\) comes in place"):
        hybrid(noise(5, 6))


@pytest.mark.parametrize("registered", [True, False])
def test_a_sparse_tensor(registered: bool) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)
            neighbours = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 0, 0]]).to_sparse()
            if registered:
                self.register_buffer("neighbours", neighbours)
            else:
                self.neighbours = neighbours

        def forward(self, x: Tensor) -> Tensor:
            return torch.sparse.mm(self.neighbours, self.linear(x))

    assert_same(seeded(Graph), noise(3, 6))


def test_tracing_leaves_torch_as_it_was() -> None:
    model = nn.Linear(2, 2)
    apply, fast = nn.Module._apply, torch.backends.mha.get_fastpath_enabled()
    checked = torch.distributions.Distribution._validate_args
    with torch.no_grad(), torch.autocast("cpu"), tracing(model):
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), tracing(model):
        raise ZeroDivisionError
    assert nn.Module._apply is apply
    assert torch.backends.mha.get_fastpath_enabled() is fast
    assert torch.distributions.Distribution._validate_args is checked
    assert not hasattr(_ModuleStackTracer, "enable_attr_proxy")
    assert model.double().weight.dtype is torch.float64


def test_calls_are_seen_in_the_forward_and_its_hooks_alone() -> None:
    seen: list[str] = []
    original = UsersCalls.__torch_function__

    def noting(self: UsersCalls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        seen.append(getattr(func, "__name__", ""))
        return original(self, func, types, args, kwargs)

    class Twice(nn.Module):
        """Calls itself once, so that it is on the stack of calls twice."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, again: bool = True) -> Tensor:
            return self(self.linear(x), False) if again else torch.sin(x)

    model = seeded(Twice)
    model.register_forward_pre_hook(lambda _, args: (torch.cos(args[0]), *args[1:]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UsersCalls, "__torch_function__", noting)
        hybrid = ffebm.convert(model, noise(3, 4))
    x = noise(5, 4)
    assert torch.allclose(hybrid.to_digital()(x), model(x), atol=1e-6)
    assert sorted(name for name in seen if name in ("cos", "sin", "linear")) == ["cos", "cos", "linear", "sin"]
    assert "__get__" not in seen[: seen.index("cos")]  # the exporter reads properties of every parameter before
    assert torch.overrides._get_current_function_mode_stack() == []
