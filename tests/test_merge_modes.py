"""One hybrid, both modes: what a model does differently in train mode, it does there, draw for draw."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from same_as_source import ONE_LAYER, assert_same, deviation
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch, TrainingMask

Forward = Callable[["Net", torch.Tensor], object]


class Net(nn.Module):
    """Three layers of width 8, and a forward that may ask for the mode."""

    def __init__(self, form: Forward, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c, self.aux = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("codes", torch.randn(6, 8))
        for name, part in parts.items():
            setattr(self, name, part)
        self.form = form

    def forward(self, x: torch.Tensor) -> object:
        return self.form(self, x)


class DropPath(nn.Module):
    """Stochastic depth, as timm has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(0.5)
        keep.div_(0.5)
        return x * keep


class Older(nn.Module):
    """Stochastic depth, as it was written before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x.div(0.6) * (0.6 + torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device)).floor_()


def straight_through(net, x):
    z = net.a(x)
    quantised = torch.where(z > 0, 1.0, -1.0)
    return net.c(z + (quantised - z).detach() if net.training else quantised)


def layers_dropped(net, x):
    for layer in (net.a, net.b):
        keep = torch.rand(()) < 0.5 if net.training else torch.tensor(True)
        x = torch.where(keep, x + torch.tanh(layer(x)), x)
    return net.c(x)


def renormalised(net, x):
    if net.training:
        with torch.no_grad():
            net.a.weight.copy_(F.normalize(net.a.weight, dim=1))
    return net.c(torch.tanh(F.linear(x, F.normalize(net.a.weight, dim=1))))


def renormalised_data(net, x):
    if net.training:
        net.a.weight.data.copy_(F.normalize(net.a.weight.data, dim=1))
    return net.c(torch.tanh(net.a(x)))


def counted(net, x):
    net.calls += 1
    return net.c(torch.tanh(net.a(x))) * net.calls


def counted_afterwards(net, x):
    y = net.c(torch.tanh(net.a(x))) * (1 + net.calls)
    if net.training:
        net.calls.add_(1)
    return y


def assigned(net, x):
    if net.training:
        net.mean = 0.9 * net.mean + 0.1 * x.detach().mean(0)
    return net.c(torch.tanh(net.a(x - net.mean)))


def moving_mean(net, x):
    h = net.a(x)
    if net.training:
        with torch.no_grad():
            net.mean.lerp_(h.mean(0), 0.1)
    return net.c(torch.tanh(h - net.mean))


def codebook(net, x):
    h = net.a(x)
    nearest = torch.cdist(h, net.codes).argmin(1)
    quantised = F.embedding(nearest, net.codes)
    if net.training:
        chosen = F.one_hot(nearest, 6).to(h.dtype)
        net.codes.data.mul_(0.9).add_(0.1 * (chosen.T @ h.detach()) / chosen.sum(0).clamp_min(1)[:, None])
        loss = F.mse_loss(h, quantised.detach())
        return net.c(h + (quantised - h).detach()), loss
    return net.c(quantised)


def auxiliary(net, x):
    hidden = torch.relu(net.a(x))
    return (net.c(hidden), net.aux(hidden)) if net.training else net.c(hidden)


def named_outputs(net, x):
    hidden = torch.relu(net.a(x))
    out = {"logits": net.c(hidden)}
    if net.training:
        out["aux"] = net.aux(net.b(hidden))
    return out


def tokens_dropped(net, x):
    x = x.view(x.shape[0], 4, 2).repeat(1, 1, 4)
    if net.training:
        kept = torch.randn(x.shape[:2]).argsort(1)[:, :2]
        x = x.gather(1, kept[..., None].expand(-1, -1, 8))
    return net.c(torch.relu(net.a(x)) + net.b(x)).mean(1)


def other_layers(net, x):
    return net.c(torch.tanh(net.a(x) if net.training else net.b(x)))


def weight_dropout(net, x):
    return net.c(torch.tanh(F.linear(x, F.dropout(net.a.weight, 0.3, net.training), net.a.bias)))


def noise_and_dropouts(net, x):
    h = net.a(x)
    if net.training:
        h = h + 0.1 * torch.randn_like(h)
    left = F.dropout(torch.tanh(h), 0.2, net.training)
    right = F.dropout(torch.relu(net.b(x)), 0.3, net.training)
    return net.c(F.alpha_dropout(left, 0.1, net.training) + right)


def frozen_statistics(net, x):
    h = F.batch_norm(net.a(x), net.mean, torch.ones(8), training=False)
    return net.c(torch.tanh(h))


def functional_norm(net, x):
    variance = net.codes[0].square()
    return net.c(F.batch_norm(net.a(x), net.mean.clone(), variance.clone(), training=net.training))


def gumbel(net, x):
    logits = net.a(x)
    weights = F.gumbel_softmax(logits, tau=0.7) if net.training else logits.softmax(-1)
    return net.c(weights * net.b(x))


def auxiliary_with_norm(net, x):
    hidden = torch.relu(net.a(x))
    if net.training:
        return net.c(hidden), net.head(hidden)
    return net.c(hidden)


def normal_noise(net, x):
    h = net.a(x)
    return net.c(torch.tanh(h + 0.1 * torch.empty_like(h).normal_()) if net.training else torch.tanh(h))


FORMS: dict[str, Forward] = {
    "straight through": straight_through,
    "layers dropped": layers_dropped,
    "renormalised": renormalised,
    "renormalised data": renormalised_data,
    "counted": counted,
    "counted afterwards": counted_afterwards,
    "assigned": assigned,
    "moving mean": moving_mean,
    "codebook": codebook,
    "auxiliary": auxiliary,
    "named outputs": named_outputs,
    "tokens dropped": tokens_dropped,
    "other layers": other_layers,
    "weight dropout": weight_dropout,
    "noise and dropouts": noise_and_dropouts,
    "frozen statistics": frozen_statistics,
    "functional norm": functional_norm,
    "gumbel": gumbel,
    "norms and dropout in an auxiliary head": auxiliary_with_norm,
    "normal noise": normal_noise,
}


def plain(net, x):
    return net.c(net.part(net.b(torch.tanh(net.a(x)))) + x)[:, :4]


class FrozenNorm(nn.BatchNorm1d):
    """Stays in eval mode whatever is asked."""

    def train(self, mode: bool = True):
        return super().train(False)


class NormActivation(nn.BatchNorm1d):
    """A batch norm with a forward of its own, as timm has it."""

    def forward(self, x):
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps)
        return F.relu(y)


PARTS: dict[str, Callable[[], nn.Module]] = {
    "drop path": DropPath,
    "older drop path": Older,
    "random rectifier": nn.RReLU,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),
    "spectral norm by hooks": lambda: nn.utils.spectral_norm(nn.Linear(8, 8)),
    "batch norm": lambda: nn.BatchNorm1d(8),
    "cumulative batch norm": lambda: nn.BatchNorm1d(8, momentum=None),
    "batch norm without statistics": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "frozen batch norm": lambda: FrozenNorm(8),
    "norm and activation": lambda: NormActivation(8),
    "dropout": lambda: nn.Dropout(0.4),
    "dropout and drop path": lambda: nn.Sequential(nn.Dropout(0.2), DropPath(), nn.Dropout(0.3)),
    "alpha dropout": lambda: nn.AlphaDropout(0.4),
    "feature alpha dropout": lambda: nn.FeatureAlphaDropout(0.4),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_forward_that_asks_for_the_mode(form: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(5, 8)
    hybrid = None
    for train in (True, False):
        torch.manual_seed(1)
        head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), NormActivation(8), nn.Linear(8, 2))
        model = Net(FORMS[form], head=head)
        hybrid = assert_same(model, inputs, train=train, calls=3)
    assert not any("no capture in train mode" in note for note in hybrid.plan.notes)


@pytest.mark.parametrize("part", PARTS)
def test_a_module_that_asks_for_the_mode(part: str) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(6, 8)
    for train in (True, False):
        torch.manual_seed(1)
        model = Net(plain, c=nn.Linear(8, 8), part=PARTS[part]())
        assert_same(model, inputs, train=train, calls=3)


def test_both_modes_of_one_hybrid_and_another_batch_size() -> None:
    model = Net(auxiliary)
    hybrid = ffebm.convert(model, torch.randn(5, 8), hardware=ONE_LAYER)
    for inputs in (torch.randn(9, 8), torch.randn(2, 8)):
        for train in (True, False, True):
            found, wanted = hybrid.train(train)(inputs), model.train(train)(inputs)
            assert type(found) is type(wanted)
            for have, want in zip(found, wanted, strict=True):
                assert deviation(have, want) < 1e-5


def test_what_train_mode_alone_multiplies_by_stays_in_a_block() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), DropPath()

        def forward(self, x):
            return x + self.drop(self.b(torch.tanh(self.a(x))))

    inputs = torch.randn(4, 8)
    hybrid = ffebm.convert(Residual(), inputs)
    assert [len(block.layers) for block in hybrid.plan.blocks] == [2]
    assert any(isinstance(module, TrainingMask) for module in _switches(hybrid))
    hybrid.train()
    torch.manual_seed(0)
    dropped = DropPath().train()(torch.ones(4, 1))[:, 0] == 0
    torch.manual_seed(0)
    output = hybrid(inputs)
    assert 0 < int(dropped.sum()) < 4
    assert torch.equal(output[dropped], inputs[dropped])


def _switches(hybrid: ffebm.HybridModel) -> list[nn.Module]:
    drives = [
        getattr(instruction.operator, "source", None)
        for block in hybrid.blocks
        for layer in block.module.program.layers
        for instruction in (*layer.instructions, *block.module.program.readout)
    ]
    return [*hybrid.modules(), *(module for module in drives if isinstance(module, nn.Module))]


def test_modules_frozen_on_their_own() -> None:
    """A trained body in eval mode under a head that trains: each follows its own flag."""
    model = Net(plain, c=nn.Linear(8, 8), part=nn.Sequential(DropPath(), nn.BatchNorm1d(8), nn.RReLU()))
    inputs = torch.randn(6, 8)
    hybrid = ffebm.convert(model, inputs, hardware=ONE_LAYER)
    for frozen in ("0", "1", "2", ""):
        torch.manual_seed(3)
        source, twin = copy.deepcopy(model).train(), copy.deepcopy(hybrid).train()
        for network in (source, twin):
            network.get_submodule(f"part.{frozen}".strip(".")).eval()
        torch.manual_seed(7)
        found = twin(inputs)
        torch.manual_seed(7)
        assert deviation(found, source(inputs)) < 1e-5
        for name, tensor in source.state_dict().items():
            assert deviation(twin.state_dict()[name], tensor) < 1e-5


def test_the_roots_own_train_is_called() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True):
            super().train(mode)
            self.part.eval()
            return self

    model = Frozen(plain, c=nn.Linear(8, 8), part=nn.Sequential(nn.BatchNorm1d(8), DropPath()))
    assert_same(model, torch.randn(6, 8), calls=2)


@pytest.mark.parametrize("form", ["auxiliary", "codebook", "layers dropped"])
def test_copies_and_files_keep_both_modes(form: str, tmp_path) -> None:
    torch.manual_seed(0)
    model, inputs = Net(FORMS[form]), torch.randn(5, 8)
    hybrid = ffebm.convert(model, inputs, hardware=ONE_LAYER)
    hybrid.save(tmp_path / "saved")
    file = io.BytesIO()
    torch.save(hybrid, file)
    file.seek(0)
    for twin in (copy.deepcopy(hybrid), ffebm.load(tmp_path / "saved", model), torch.load(file, weights_only=False)):
        for train in (True, False):
            assert_same(model, inputs, train=train, calls=2, hybrid=copy.deepcopy(twin))


def test_converting_changes_no_state_and_no_generator() -> None:
    model = Net(codebook).train()
    before, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hybrid = ffebm.convert(model, torch.randn(5, 8, generator=torch.Generator().manual_seed(1)))
    hybrid.recertify()
    hybrid.compare(torch.ones(5, 8))
    assert torch.equal(torch.get_rng_state(), drawn)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        assert torch.equal(hybrid.state_dict()[name], tensor)


def test_a_model_that_asks_for_nothing_is_captured_once() -> None:
    hybrid = ffebm.convert(
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 4)),
        torch.randn(5, 8),
    )
    assert not any(isinstance(module, ModeSwitch) for module in hybrid.modules())
    assert not hybrid._differs_in_training


def test_train_mode_that_cannot_be_traced_is_refused_there() -> None:
    def form(net, x):
        h = net.a(x)
        return net.c(h * 2 if net.training and float(h.detach().sum()) > 0 else h)

    hybrid = ffebm.convert(Net(form), torch.randn(5, 8))
    assert any("no capture in train mode" in note for note in hybrid.plan.notes)
    hybrid.eval()(torch.randn(5, 8))
    with pytest.raises(ffebm.UnsupportedError, match="cannot run in train mode"):
        hybrid.train()(torch.randn(5, 8))


def test_operands_of_modules_in_different_modes() -> None:
    def form(net, x):
        hidden = net.a(x)
        early = net.outer(hidden) if net.training else None
        return net.c(hidden + net.inner(early if early is not None else hidden))

    class Inner(nn.Module):
        def forward(self, x):
            return x * 2 if self.training else x

    model = Net(form, outer=nn.Linear(8, 8), inner=Inner())
    hybrid = ffebm.convert(model, torch.randn(5, 8), hardware=ONE_LAYER)
    for network in (hybrid, model):
        network.train().get_submodule("inner").eval()
    assert deviation(hybrid(torch.ones(5, 8)), model(torch.ones(5, 8))) < 1e-5
    for network in (hybrid, model):
        network.eval().get_submodule("inner").train()
    assert deviation(hybrid(torch.ones(5, 8)), model(torch.ones(5, 8))) < 1e-5


def _norm_module(net: Net, x: torch.Tensor) -> torch.Tensor:
    h = torch.relu(net.norm(net.a(x)))
    return net.b(h * torch.bernoulli(torch.full((len(h), 1), 0.8)) / 0.8 if net.training else h)


def _norm_function(net: Net, x: torch.Tensor) -> torch.Tensor:
    norm = net.norm
    h = F.batch_norm(net.a(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, net.training)
    return net.b(torch.relu(h)) + (1.0 if net.training else 0.0)


@pytest.mark.parametrize("form", [_norm_module, _norm_function])
def test_folded_batch_norm_is_frozen_in_both_modes_and_the_rest_follows(form: Forward) -> None:
    torch.manual_seed(0)
    net = Net(form, norm=nn.BatchNorm1d(8))
    x = torch.randn(16, 8)
    for _ in range(5):
        net.norm(3 * x + 1)
    hybrid = ffebm.convert(net.eval(), x, fold_batchnorm=True, hardware=ONE_LAYER)
    assert any("batch norms are folded" in note for note in hybrid.plan.notes)
    torch.testing.assert_close(hybrid(x), net(x))
    hybrid.train()
    net.train()
    before = hybrid.state_dict()["norm.running_mean"].clone()
    torch.manual_seed(1)
    found = hybrid(x)
    torch.testing.assert_close(hybrid.state_dict()["norm.running_mean"], before)
    torch.manual_seed(1)
    if form is _norm_module:
        net.norm.eval()
        expected = net(x)
    else:
        net.eval()
        expected = net(x) + 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(5, 1), (5, 8), ()])
def test_a_mask_of_a_fixed_size_has_its_rate(shape: tuple[int, ...]) -> None:
    def form(net, x):
        h = net.a(x)
        assert len(x) == 5
        return net.c(h * h.new_empty(shape).bernoulli_(0.8) / 0.8 if net.training else h)

    assert_same(Net(form), torch.randn(5, 8), train=True)
    hybrid = ffebm.convert(Net(form), torch.randn(5, 8))
    masks = _masks(hybrid)
    assert [mask.rate for mask in masks] == pytest.approx([0.2], abs=1e-6)


def _masks(hybrid: ffebm.HybridModel) -> list[TrainingMask]:
    drives = [i for block in hybrid.blocks for layer in block.module.program.layers for i in layer.instructions]
    held = [getattr(instruction.operator, "source", None) for instruction in drives]
    return [module for module in (*held, *hybrid.modules()) if isinstance(module, TrainingMask)]
