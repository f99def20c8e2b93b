"""Every class of torch.nn and every function of torch.nn.functional, in train and in eval mode, or refused by name."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from survey_cases import CLASSES, INPUTS, Survey
from survey_functions import FUNCTIONS
from survey_options import OPTIONS
from torch import Tensor, nn

import ffebm_compiler as ffebm

SINGLE = ffebm.Hardware(layers_per_block=1)
NAMES = {
    **{f"nn.{name}": case for name, case in CLASSES.items()},
    **{f"F.{name}": case for name, case in FUNCTIONS.items()},
}
ALL = {**NAMES, **OPTIONS}


REFUSED = {
    "nn.AdaptiveLogSoftmaxWithLoss": "AdaptiveLogSoftmaxWithLoss",
    "nn.CTCLoss": "CTCLoss",
    "nn.GaussianNLLLoss": "GaussianNLLLoss",
    "F.ctc_loss": "ctc_loss",
    "F.gaussian_nll_loss": "gaussian_nll_loss",
}
"""What is refused, and the part of the message that names it: all of these branch on the data."""

LEFT_OUT = {
    **dict.fromkeys(
        ("nn.Buffer", "nn.Parameter", "nn.UninitializedBuffer", "nn.UninitializedParameter"),
        "a tensor, no layer: every other case holds some",
    ),
    "nn.Container": "an empty class that torch has deprecated for Module",
    "nn.LinearCrossEntropyOptions": "a dataclass of settings",
    "nn.NLLLoss2d": "another name of NLLLoss, deprecated",
    **dict.fromkeys(("nn.RNNBase", "nn.RNNCellBase"), "a base class without a forward of its own"),
    "F.native_channel_shuffle": "has no derivative in torch: a network with it cannot be trained",
    **dict.fromkeys(("F.scaled_mm", "F.scaled_grouped_mm"), "products of 8-bit floats, without a derivative"),
    **dict.fromkeys(
        ("F.Callable", "F.DType", "F.Optional", "F.ScalingType", "F.SwizzleType", "F.Tensor"),
        "a type or an enumeration",
    ),
    **dict.fromkeys(
        (
            "F.assert_int_or_pair",
            "F.boolean_dispatch",
            "F.handle_torch_function",
            "F.has_torch_function",
            "F.has_torch_function_unary",
            "F.has_torch_function_variadic",
        ),
        "plumbing of torch's own, no operation on values",
    ),
}
"""Public names that are no layer of a network, each with its reason."""


def test_every_public_name_is_surveyed_or_left_out() -> None:
    names = {f"nn.{name}" for name, value in vars(nn).items() if inspect.isclass(value)}
    names |= {f"F.{name}" for name, value in vars(F).items() if callable(value)}
    public = {name for name in names if not name.split(".")[1].startswith("_")}
    assert public - set(NAMES) - set(LEFT_OUT) == set(), "new names: add a case, or a reason to leave them out"
    assert (set(NAMES) | set(LEFT_OUT)) - public == set(), "names that torch no longer has"
    assert set(NAMES) & set(LEFT_OUT) == set()
    assert set(REFUSED) - set(ALL) == set()


class Net(nn.Module):
    """before → middle → flatten → linear."""

    def __init__(self, case: Survey) -> None:
        super().__init__()
        before, _ = INPUTS[case.kind]
        self.before, self.middle = before(), case.build()
        self.after: nn.Module = nn.Identity()
        if case.inner:
            self.after = nn.Linear(self.middle(self.before(example(case, 0))).flatten(1).shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.before(x))
        return self.after(y.flatten(1)) if y.dim() > 1 else y


def example(case: Survey, seed: int) -> Tensor:
    shape = INPUTS[case.kind][1]
    draw = torch.Generator().manual_seed(seed)
    if case.kind == "tokens":
        return torch.randint(10, shape, generator=draw)
    return torch.randn(shape, generator=draw)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The value, and the gradients of everything that has one; equal seeds draw equal masks."""
    x = x.clone()
    if x.is_floating_point():
        x.requires_grad_()
    model.zero_grad()
    torch.manual_seed(5)
    y = model(x)
    slopes = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
    (y * slopes).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    if x.grad is not None:
        found["the input"] = x.grad
    return y.detach(), {name: value.clone() for name, value in found.items()}


def assert_close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert found.shape == expected.shape, what
    if torch.equal(found, expected):  # masks hold infinities
        return
    error, size = float((found - expected).norm()), float(expected.norm())
    assert error <= tolerance * size + 1e-6, f"{what}: off by {error:.2e} of {size:.2e}"


def check(case: Survey) -> None:
    torch.manual_seed(0)
    source = Net(case)
    hybrid = ffebm.convert(copy.deepcopy(source), example(case, 1), hardware=SINGLE)
    for train in (False, True):
        source.train(train)
        hybrid.train(train)
        mode = "train" if train else "eval"
        value, gradients = run(source, example(case, 2))
        found, slopes = run(hybrid, example(case, 2))
        assert_close(found, value, 1e-5, f"{mode}: value")
        assert set(slopes) == set(gradients), f"{mode}: gradients of {set(slopes) ^ set(gradients)}"
        for name, expected in gradients.items():
            assert_close(slopes[name], expected, 1e-4, f"{mode}: gradient of {name}")
        state = hybrid.state_dict()
        for name, expected in source.state_dict().items():
            assert_close(state[name].double(), expected.double(), 1e-5, f"{mode}: {name} afterwards")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in REFUSED])
@pytest.mark.filterwarnings(
    "ignore:.*is deprecated",
    "ignore:Using padding='same' with even kernel lengths:UserWarning",
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
)
def test_value_and_gradient(name: str) -> None:
    check(ALL[name])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named(name: str) -> None:
    torch.manual_seed(0)
    net = Net(ALL[name])
    with pytest.raises(ffebm.FFEBMError, match=REFUSED[name]):
        ffebm.convert(net, example(ALL[name], 1), hardware=SINGLE)
