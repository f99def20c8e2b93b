"""The source's own autograd functions, hooks and checkpoints keep what they do to gradients."""

import copy
import io
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from same_as_source import ONE_LAYER, assert_same, deviation
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import ffebm_compiler as ffebm


class Sign(torch.autograd.Function):
    """Straight through, clipped: the number is no tensor."""

    @staticmethod
    def forward(ctx, value, width):
        ctx.save_for_backward(value)
        ctx.width = width
        return torch.sign(value)

    @staticmethod
    def backward(ctx, gradient):
        (value,) = ctx.saved_tensors
        return gradient * (value.abs() < ctx.width), None


class Reverse(torch.autograd.Function):
    """Gradient reversal, in the newer style, without a change of values."""

    @staticmethod
    def forward(value, factor=1.0):
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None


class Two(torch.autograd.Function):
    """Two tensors and something else out, with a parameter in."""

    @staticmethod
    def forward(ctx, x, weight, names):
        ctx.save_for_backward(x, weight)
        return x @ weight, x.sum(1), names["kind"]

    @staticmethod
    def backward(ctx, first, second, _):
        x, weight = ctx.saved_tensors
        return 3 * first @ weight.T + second[:, None], 2 * x.T @ first, None


class Double(torch.autograd.Function):
    """In place, and says so."""

    @staticmethod
    def forward(ctx, value):
        ctx.mark_dirty(value)
        return value.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 5 * gradient


class Scaled(torch.autograd.Function):
    """Takes the size of the batch, which stays free."""

    @staticmethod
    def forward(ctx, value, size):
        ctx.size = size
        return value / size

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.size, None


sign = Sign.apply  # bound long before anything is captured


class Net(nn.Module):
    """Two layers, with what `form` does between them."""

    def __init__(self, form):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.form = form

    def forward(self, x):
        return self.c(self.form(self, self.a(x)))


def two(net, h):
    first, second, kind = Two.apply(h, net.weight, {"kind": "sum"})
    return first * second[:, None] if kind == "sum" else first


def hooked(net, h):
    y = torch.tanh(h)
    if y.requires_grad:
        y.register_hook(lambda gradient: 0.1 * gradient)
    return y + y.square()


def unhooked(net, h):
    y = torch.tanh(h)
    if y.requires_grad:
        y.register_hook(lambda gradient: 0.1 * gradient).remove()
    return y


def hook_after_sign(net, h):
    y = sign(h, 1.5)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    return y


FORMS = {
    "straight through": lambda net, h: Sign.apply(h, 1.5),
    "bound": lambda net, h: sign(h, 0.7),
    "binary weight": lambda net, h: F.linear(h, Sign.apply(net.weight, 1.0)),
    "reversal": lambda net, h: Reverse.apply(h),
    "reversal with a factor": lambda net, h: Reverse.apply(torch.relu(h), 0.3),
    "two outputs": two,
    "in place": lambda net, h: (lambda y: Double.apply(y) + 3 * y)(h + 1.0),
    "size of the batch": lambda net, h: Scaled.apply(torch.tanh(h), h.shape[0]),
    "without gradient": lambda net, h: h + torch.no_grad()(lambda: Sign.apply(h, 1.0))(),
    "hook": hooked,
    "removed hook": unhooked,
    "hook on the output of a function": hook_after_sign,
    "reentrant checkpoint": lambda net, h: checkpoint(net.b, torch.tanh(h), use_reentrant=True),
    "checkpoint": lambda net, h: checkpoint(net.b, torch.tanh(h), use_reentrant=False),
    "function in a checkpoint": lambda net, h: checkpoint(lambda v: sign(net.b(v), 1.0), h, use_reentrant=True),
    "checkpoints in a row": lambda net, h: checkpoint_sequential([net.b, nn.Tanh()], 2, h, use_reentrant=True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_values_and_gradients_are_the_sources(form: str, train: bool) -> None:
    torch.manual_seed(0)
    model = Net(FORMS[form])
    hybrid = assert_same(model, torch.randn(5, 8), train=train)
    other = torch.randn(9, 8)  # the batch size stays free
    assert deviation(hybrid(other), model.train(train)(other)) < 1e-5


def test_a_function_is_digital_with_its_name() -> None:
    plan = ffebm.plan(Net(FORMS["straight through"]), torch.randn(5, 8))
    reasons = [operation.reason for operation in plan.graph.operations]
    assert any("Sign has a backward of its own" in reason for reason in reasons)


def test_a_binarised_weight_is_weight_stationary() -> None:
    plan = ffebm.plan(Net(FORMS["binary weight"]), torch.randn(5, 8))
    assert plan.weights["weight"].block


def test_hooks_of_parameters_are_kept() -> None:
    model = Net(FORMS["reversal"])
    model.a.weight.register_hook(lambda gradient: gradient * 0.5)
    inputs = torch.randn(5, 8)
    hybrid, plain = ffebm.convert(model, inputs, hardware=ONE_LAYER), copy.deepcopy(model)
    for network in (hybrid, plain):  # a deep copy has no hooks
        network(inputs).square().sum().backward()
    assert deviation(hybrid.get_submodule("a").weight.grad, 0.5 * plain.a.weight.grad) < 1e-5


def test_backward_hooks_of_modules_are_refused_by_name() -> None:
    model = Net(FORMS["reversal"])
    model.b.register_full_backward_hook(lambda module, given, got: None)
    with pytest.raises(ffebm.UnsupportedError, match="module 'b' has a backward hook"):
        ffebm.convert(model, torch.randn(5, 8))


def test_torch_is_left_as_it_was() -> None:
    before = torch.autograd.Function.__dict__["apply"], torch.Tensor.register_hook
    for form in FORMS.values():
        ffebm.plan(Net(form), torch.randn(5, 8))
    with pytest.raises(ffebm.FFEBMError):
        ffebm.convert(Net(lambda net, h: sign(h, 1.0)[: int(h.sum())]), torch.randn(5, 8))
    assert before == (torch.autograd.Function.__dict__["apply"], torch.Tensor.register_hook)
    assert not list(torch.ops.ffebm_capture)
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)
    value = torch.randn(3, requires_grad=True)
    Sign.apply(value, 10.0).sum().backward()
    assert torch.equal(value.grad, torch.ones(3))


class relu(torch.autograd.Function):
    """Named like an operation of torch."""

    @staticmethod
    def forward(ctx, value):
        return value.clamp_min(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    "form", [hooked, hook_after_sign, two, lambda net, h: torch.relu(net.b(torch.relu(relu.apply(h))))]
)
def test_plans_do_not_depend_on_what_was_captured_before(form) -> None:
    inputs = torch.randn(5, 8)
    plans = [ffebm.plan(Net(form), inputs) for _ in range(12)]  # of numbers of one figure and of two
    assert all(plan.fingerprint == plans[0].fingerprint for plan in plans)
    assert all(plan.to_dict() == plans[0].to_dict() for plan in plans)


def test_a_file_of_a_model_with_hooks_is_loaded_after_another_capture(tmp_path, monkeypatch) -> None:
    # as in a new process, in which the first capture differed from the second
    monkeypatch.setattr(sys.modules["ffebm_compiler.passes.custom_functions"], "_NUMBER", itertools.count())
    model, inputs = Net(hooked), torch.randn(5, 8)
    ffebm.convert(model, inputs, hardware=ONE_LAYER).save(tmp_path / "saved")
    assert_same(model, inputs, hybrid=ffebm.load(tmp_path / "saved", model))


@pytest.mark.parametrize("form", ["straight through", "two outputs", "binary weight"])
def test_copies_and_files_keep_the_function(form: str, tmp_path) -> None:
    global_form = FORMS[form]
    model, inputs = Net(None), torch.randn(5, 8)
    model.form = global_form
    hybrid = ffebm.convert(model, inputs, hardware=ONE_LAYER)
    hybrid.save(tmp_path / "saved")
    del hybrid.__dict__["_source"].form  # a lambda cannot be pickled, whoever holds it
    file = io.BytesIO()
    torch.save(hybrid, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(hybrid),
        ffebm.load(tmp_path / "saved", model),
        torch.load(file, weights_only=False),
    ):
        assert_same(model, inputs, hybrid=twin)
