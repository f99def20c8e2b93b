"""Modules of a hybrid that others take the place of: followed if they are alike, refused otherwise."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from networks import noise, seeded
from torch import nn
from torch.optim.swa_utils import update_bn

import ffebm_compiler as ffebm

X = torch.randn(5, 6)


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.body = nn.Sequential(*layers)
        self.scaled = Scaled(0.5)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.scaled(self.body(x)))


def hybrid_of(model: nn.Module) -> ffebm.HybridModel:
    return ffebm.convert(model, X, feedback=0.1)


def put(path: str, module: nn.Module) -> Callable[[nn.Module], None]:
    return lambda hybrid: hybrid.set_submodule(path, module)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (put("body.1", nn.ReLU()), "body.1"),
        (put("body.0", Doubled(6, 8)), "body.0"),
        (put("body.3", nn.LeakyReLU(0.2)), "body.3"),
        (put("body.5", nn.Identity()), "body.5"),
        (put("scaled", Scaled(0.25)), "scaled"),
        (put("head", nn.Sequential(nn.Linear(8, 3))), "head"),
        (lambda hybrid: nn.SyncBatchNorm.convert_sync_batchnorm(hybrid), "body.4"),
        (lambda hybrid: setattr(hybrid, "scaled", None), "scaled"),
    ],
)
@pytest.mark.parametrize("copied", [False, True])
def test_a_module_of_another_kind_is_refused_by_its_path(
    change: Callable[[nn.Module], None], path: str, copied: bool
) -> None:
    hybrid = hybrid_of(Network())
    if copied:
        hybrid = copy.deepcopy(hybrid)
    hybrid(X)
    change(hybrid)
    with pytest.raises(ffebm.UnsupportedError, match=rf"module '{path}' of the hybrid was .* has taken its place"):
        hybrid(X)
    with pytest.raises(ffebm.UnsupportedError, match="change the source and convert it again"):
        hybrid(X)  # and again: it stays refused


@pytest.mark.parametrize("train", [False, True])
def test_modules_of_the_same_kind_are_followed(train: bool) -> None:
    torch.manual_seed(0)
    hybrid, other = hybrid_of(Network()), Network().train(train)
    hybrid.train(train)
    hybrid(X)
    for path in ("body", "head"):
        hybrid.set_submodule(path, copy.deepcopy(other.get_submodule(path)))
    # The successors' flags count from now on, not those of the modules that they replace.
    expected = hybrid_of(other).train(train)
    if not train:
        hybrid.recertify()
    torch.manual_seed(1)
    found = hybrid(X)
    torch.manual_seed(1)
    assert torch.allclose(found, expected(X), atol=1e-5)
    assert torch.allclose(hybrid.body[4].running_mean, expected.body[4].running_mean)
    assert int(hybrid.body[4].num_batches_tracked) == int(train)
    hybrid.body[5].eval()
    expected.body[5].eval()
    assert torch.allclose(hybrid(X), expected(X), atol=1e-5)


class Louder(nn.Module):
    """Another gain in train mode, which no code asks for by the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = 1.0

    def train(self, mode: bool = True) -> nn.Module:
        self.gain = 2.0 if mode else 1.0
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


def test_settings_that_train_itself_sets_are_those_of_both_modes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), Louder(), nn.Linear(5, 3))
    hybrid = ffebm.convert(model.eval(), X, block_ops=())
    for mode in (True, False, True):
        assert torch.allclose(hybrid.train(mode)(X), model.train(mode)(X), atol=1e-6)
    hybrid.get_submodule("1").eval()
    model[1].eval()
    assert torch.allclose(hybrid(X), model(X), atol=1e-6)


@pytest.mark.parametrize("copied", [False, True])
def test_a_setting_that_was_captured_is_named_when_it_changes(copied: bool) -> None:
    hybrid = hybrid_of(Network())
    if copied:
        hybrid = copy.deepcopy(hybrid)
    hybrid.eval()
    before = hybrid(X)
    hybrid.scaled.factor = 0.25
    hybrid.body[3].negative_slope = 0.2
    with pytest.warns(ffebm.FFEBMWarning) as caught:
        assert torch.equal(hybrid(X), before)
    assert len(caught) == 1
    assert "'factor' of 'scaled' from 0.5 to 0.25, 'negative_slope' of 'body.3' from 0.1" in str(caught[0].message)
    hybrid(X)  # said once
    hybrid.scaled.factor = 1.0
    with pytest.warns(ffebm.FFEBMWarning, match="set them on the source and convert again"):
        hybrid.train()


def test_rates_and_momentums_are_followed() -> None:
    model = Network().train()
    hybrid = hybrid_of(model)
    for each in (model, hybrid):
        each.body[5].p = 0.0
        each.body[4].momentum = 0.7
    hybrid.body[4].reset_running_stats()
    model.body[4].reset_running_stats()
    with hybrid.feedforward_mode():
        assert torch.allclose(hybrid(X), model(X), atol=1e-6)
    assert torch.allclose(hybrid.body[4].running_mean, model.body[4].running_mean, atol=1e-6)
    assert torch.allclose(hybrid.body[4].running_var, model.body[4].running_var, atol=1e-6)


def test_what_takes_a_place_below_a_successor_is_seen_too() -> None:
    hybrid = hybrid_of(Network())
    hybrid.body = copy.deepcopy(hybrid.body)
    hybrid(X)
    hybrid.body[1] = nn.ReLU()
    with pytest.raises(ffebm.UnsupportedError, match=r"module 'body\.1' of the hybrid was Tanh\(\)"):
        hybrid(X)


class Adapted(nn.Linear):
    """A layer with an adapter of rank 2, which `eval` merges into the weight and `train` takes out again."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> nn.Module:
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.up.data @ self.down.data
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


def test_adapters_that_train_takes_out_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(6, 8), nn.LayerNorm(8), Adapted(8, 3))
    hybrid = ffebm.convert(model, X)
    for mode in (False, True):
        assert torch.allclose(hybrid.train(mode)(X), model.train(mode)(X), atol=1e-5)
    hybrid(X).square().sum().backward()
    model(X).square().sum().backward()
    for (name, found), expected in zip(hybrid.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(found.grad, expected.grad, atol=1e-4), name


def test_reset_statistics_of_a_folded_norm_are_warned_of() -> None:
    """`update_bn` resets them, and no forward of a folded norm gathers new ones."""
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4)))
    batches = [3 * noise(32, 8, seed=index) + 1 for index in range(3)]
    for x in batches:
        model(x)
    model.eval()
    kept = ffebm.convert(model, batches[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        update_bn(batches, kept)
    assert not torch.equal(kept.get_buffer("1.running_var"), torch.ones(16))
    folded = ffebm.convert(model, batches[0], fold_batchnorm=True)
    state = copy.deepcopy(folded.state_dict())
    with pytest.warns(ffebm.FFEBMWarning) as seen:
        update_bn(batches, folded)
    assert sum("the running statistics of '1' were reset" in str(each.message) for each in seen) == 1
    folded.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folded(batches[0])
        folded.load_state_dict({**state, "1.running_mean": state["1.running_mean"] + 1})
        folded(batches[0])
        untrained = ffebm.convert(nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16)), batches[0], fold_batchnorm=True)
        untrained.double()(batches[0].double())  # moved, and not reset
    folded.get_submodule("1").reset_running_stats()
    with pytest.warns(ffebm.FFEBMWarning, match="were reset"):
        folded(batches[0])


@pytest.mark.parametrize("train", [True, False])
def test_a_setting_that_changes_before_the_first_call_is_named_whatever_the_mode_at_conversion(train: bool) -> None:
    hybrid = ffebm.convert(nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.1), nn.Linear(8, 3)).train(train), X)
    hybrid.get_submodule("1").negative_slope = 0.5
    with pytest.warns(ffebm.FFEBMWarning, match=r"'negative_slope' of '1' from 0\.1 to 0\.5"):
        hybrid(X)
    layer = hybrid.get_submodule("1")
    hybrid.eval()
    layer.negative_slope = 0.2
    with pytest.warns(ffebm.FFEBMWarning, match=r"'negative_slope' of '1' from 0\.5 to 0\.2"):
        hybrid(X)


def _outputs(layer: nn.Module) -> None:
    layer.weight, layer.bias = nn.Parameter(noise(6, 16)), nn.Parameter(torch.zeros(6))


def _double(layer: nn.Module) -> None:
    layer.weight, layer.bias = nn.Parameter(noise(4, 16).double()), nn.Parameter(torch.zeros(4).double())


def _inputs(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(noise(4, 15))


@pytest.mark.parametrize(
    ("replace", "training", "message"),
    [
        (_outputs, True, r"'2.weight' is of shape \(6, 16\) and was \(4, 16\) at conversion"),
        (_inputs, True, r"'2.weight' is of shape \(4, 15\) and was \(4, 16\) at conversion"),
        (_inputs, False, r"'2.weight' is of shape \(4, 15\) and was \(4, 16\) at conversion"),
        (_double, True, r"'2.weight' is torch.float64 and '0.weight' is torch.float32, and both were torch.float32"),
        (_double, False, r"'2.weight' is torch.float64 and '0.weight' is torch.float32, and both were torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_the_places_of_others_are_refused_by_name(
    replace: Callable[[nn.Module], None], training: bool, message: str
) -> None:
    source = seeded(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)))
    hybrid = ffebm.convert(source, X).train(training)
    replace(hybrid.get_submodule("2"))
    with pytest.raises(ffebm.UnsupportedError, match=message):
        hybrid(X)
