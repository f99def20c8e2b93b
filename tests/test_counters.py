"""A forward that counts its calls: refused where the count decides, left alone where it does not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import networks
import pytest
import torch
from same_as_source import assert_same_step
from torch import Tensor, nn

import ffebm_compiler as ffebm

CALLS = 0


class Box:
    """An object that a module holds."""

    calls = 0

    def __init__(self) -> None:
        self.heat = 4.0


class History(list[int]):
    """A list that also has attributes."""

    name = "history"


class Counts(nn.Module):
    """A module that counts its calls somewhere."""

    of_class = 0

    def __init__(self, form: Callable[[Counts], float]) -> None:
        super().__init__()
        self.form, self.box = form, Box()
        self.calls, self.history, self.table, self.last = 0, History([0]), {"calls": 0}, deque([0])

    def forward(self, h: Tensor) -> Tensor:
        return h if self.form(self) < 50 else h.tanh()


def in_an_attribute(net: Counts) -> float:
    net.calls += 1
    return net.calls


def falling_in_an_object(net: Counts) -> float:
    net.box.heat -= 0.125
    return 50 - max(net.box.heat, 0.0)


def in_a_list(net: Counts) -> float:
    net.history[0] += 1
    return net.history[0]


def in_a_dictionary(net: Counts) -> float:
    net.table["calls"] += 2
    return net.table["calls"]


def in_a_queue(net: Counts) -> float:
    net.last[0] += 1
    return net.last[0]


def in_the_class(net: Counts) -> float:
    type(net).of_class += 1
    return net.of_class


def in_a_global_variable(net: Counts) -> float:
    global CALLS
    CALLS += 1
    return CALLS


def _closure() -> Callable[[Counts], float]:
    calls = 0

    def in_a_closure(net: Counts) -> float:
        nonlocal calls
        calls += 1
        return calls

    return in_a_closure


def in_train_mode_alone(net: Counts) -> float:
    net.calls += net.training
    return net.calls


COUNTED = {
    in_an_attribute: "in the attribute '1.calls'",
    falling_in_an_object: "in the attribute '1.box'",
    in_a_list: "in the attribute '1.history'",
    in_a_dictionary: "in the attribute '1.table'",
    in_a_queue: "in the attribute '1.last'",
    in_the_class: "outside of parameters",
    in_a_global_variable: "outside of parameters",
    _closure(): "outside of parameters",
}


def _model(form: Callable[[Counts], float]) -> nn.Module:
    return networks.seeded(lambda: nn.Sequential(nn.Linear(6, 6), Counts(form), nn.Linear(6, 3)))


@pytest.mark.parametrize("form", COUNTED, ids=lambda form: form.__name__)
def test_a_count_that_decides_is_refused(form: Callable[[Counts], float]) -> None:
    model = _model(form)
    refusal = rf"depends on a number that every call changes {COUNTED[form]}.*\(100000 calls later it differs\): keep"
    with pytest.raises(ffebm.UnsupportedError, match=refusal):
        ffebm.convert(model, torch.randn(4, 6))
    counts = model[1]
    assert isinstance(counts, Counts)
    assert (CALLS, Counts.of_class, counts.calls, counts.box.heat) == (0, 0, 0, 4.0)
    assert (counts.history, counts.table, counts.last) == ([0], {"calls": 0}, deque([0]))


def test_a_count_that_decides_while_training_is_refused_there() -> None:
    model, x = _model(in_train_mode_alone), torch.randn(4, 6)
    hybrid = ffebm.convert(model.eval(), x)
    with hybrid.feedforward_mode():
        torch.testing.assert_close(hybrid.eval()(x), model(x))
    with pytest.raises(ffebm.UnsupportedError, match=r"cannot run in train mode.*number that every call changes in"):
        hybrid.train()(x)


def counts_everywhere(net: Counts) -> float:
    for form in COUNTED:
        form(net)
    return 0


def ends_its_list(net: Counts) -> float:
    net.calls += 1
    return ([0.0] * 90)[net.calls]


@pytest.mark.parametrize("form", [counts_everywhere, ends_its_list], ids=lambda form: form.__name__)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_count_without_effect_is_left_alone(form: Callable[[Counts], float], training: bool) -> None:
    global CALLS
    model = _model(form).train(training)
    try:
        hybrid = ffebm.convert(model, torch.randn(4, 6))
        counts = model[1]
        assert isinstance(counts, Counts)
        assert (counts.calls, counts.history, counts.table) == (0, [0], {"calls": 0})
        assert max(CALLS, Counts.of_class) < 100
        with hybrid.feedforward_mode():
            assert_same_step(hybrid, model, torch.randn(4, 6))
    finally:
        CALLS = Counts.of_class = 0
