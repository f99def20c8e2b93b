"""What a forward keeps from an earlier call: tables are made again, and what it took from the inputs is refused."""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue

import networks
import pytest
import torch
from same_as_source import assert_same_step
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.passes.earlier_call import earlier_call

GLOBAL: dict[str, Tensor] = {}
SEEN: list[Tensor] = []
FIRST: Tensor | None = None


class Box:
    """An object that a module holds."""

    first: Tensor | None = None


BOX = Box()


class Keeps(nn.Module):
    """A module that keeps something between its calls."""

    of_class: Tensor | None = None

    def __init__(self, form: Callable[[Keeps, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.box, self.history = form, Box(), []
        self.mean: Tensor | None = None
        self.register_buffer("none", None)
        self.register_buffer("table", torch.zeros(0), persistent=False)
        self.register_buffer("narrow", torch.zeros(6, dtype=torch.int32))
        self.none: Tensor | None
        self.table: Tensor
        self.narrow: Tensor

    def forward(self, h: Tensor) -> Tensor:
        return self.form(self, h)


def mean_in_an_attribute(net: Keeps, h: Tensor) -> Tensor:
    mean = h.detach().mean(0)
    net.mean = mean if net.mean is None else 0.9 * net.mean + 0.1 * mean
    return h - net.mean


def first_in_an_attribute(net: Keeps, h: Tensor) -> Tensor:
    if net.mean is None:
        net.mean = h.detach().mean(0)
    return h - net.mean


def drawn_once(net: Keeps, h: Tensor) -> Tensor:
    if net.mean is None:
        net.mean = torch.randn(6)
    return h - net.mean


def first_in_an_object(net: Keeps, h: Tensor) -> Tensor:
    if net.box.first is None:
        net.box.first = h.detach().mean(0)
    return h - net.box.first


def all_in_a_list(net: Keeps, h: Tensor) -> Tensor:
    net.history.append(h.detach().mean(0))
    return h - torch.stack(net.history).mean(0)


def mean_in_an_empty_buffer(net: Keeps, h: Tensor) -> Tensor:
    mean = h.detach().mean(0)
    net.table = mean if not net.table.numel() else 0.9 * net.table + 0.1 * mean
    return h - net.table


def mean_in_no_buffer_yet(net: Keeps, h: Tensor) -> Tensor:
    mean = h.detach().mean(0)
    net.none = mean if net.none is None else 0.9 * net.none + 0.1 * mean
    return h - net.none


def first_in_a_new_dtype(net: Keeps, h: Tensor) -> Tensor:
    if net.narrow.dtype != h.dtype:
        net.narrow = h.detach().mean(0)
    return h - net.narrow


def first_in_a_global_dictionary(net: Keeps, h: Tensor) -> Tensor:
    return h - GLOBAL.setdefault("first", h.detach().mean(0))


def all_in_a_global_list(net: Keeps, h: Tensor) -> Tensor:
    SEEN.append(h.detach().mean(0))
    return h - SEEN[0]


def first_in_a_global_variable(net: Keeps, h: Tensor) -> Tensor:
    global FIRST
    if FIRST is None:
        FIRST = h.detach().mean(0)
    return h - FIRST


def first_in_the_class(net: Keeps, h: Tensor) -> Tensor:
    if Keeps.of_class is None:
        Keeps.of_class = h.detach().mean(0)
    return h - Keeps.of_class


class Base(Keeps):
    of_base: Tensor | None = None


class Derived(Base):
    """Its first call sets an attribute of its base class."""

    def forward(self, h: Tensor) -> Tensor:
        if Base.of_base is None:
            Base.of_base = h.detach().mean(0)
        return h - self.of_base


def first_in_a_default(net: Keeps, h: Tensor, kept: list[Tensor] = []) -> Tensor:  # noqa: B006
    if not kept:
        kept.append(h.detach().mean(0))
    return h - kept[0]


def first_in_a_global_object(net: Keeps, h: Tensor) -> Tensor:
    if BOX.first is None:
        BOX.first = h.detach().mean(0)
    return h - BOX.first


def _closure() -> Callable[[Keeps, Tensor], Tensor]:
    first: Tensor | None = None

    def first_in_a_closure(net: Keeps, h: Tensor) -> Tensor:
        nonlocal first
        if first is None:
            first = h.detach().mean(0)
        return h - first

    return first_in_a_closure


def only_after_the_first(net: Keeps, h: Tensor) -> Tensor:
    if not net.table.numel():
        net.table = torch.arange(6.0)
        return h
    return h - net.table


STATEFUL = {
    mean_in_an_attribute: "in the attribute '1.mean'",
    first_in_an_attribute: "in the attribute '1.mean'",
    drawn_once: "in the attribute '1.mean'",
    first_in_an_object: "in the attribute '1.box'",
    all_in_a_list: "in the attribute '1.history'",
    mean_in_an_empty_buffer: "in the buffer '1.table'",
    mean_in_no_buffer_yet: "in the buffer '1.none'",
    first_in_a_new_dtype: "in the buffer '1.narrow'",
    first_in_a_global_dictionary: "outside of parameters",
    all_in_a_global_list: "outside of parameters",
    first_in_a_global_variable: "outside of parameters",
    first_in_the_class: "outside of parameters",
    first_in_a_default: "outside of parameters",
    first_in_a_global_object: "outside of parameters",
    _closure(): "outside of parameters",
    only_after_the_first: "in the buffer '1.table'",
}


def _model(form: Callable[[Keeps, Tensor], Tensor]) -> nn.Module:
    return networks.seeded(lambda: nn.Sequential(nn.Linear(6, 6), Keeps(form), nn.Linear(6, 3)))


@pytest.mark.parametrize("form", STATEFUL, ids=lambda form: form.__name__)
def test_what_a_forward_has_seen_is_refused(form: Callable[[Keeps, Tensor], Tensor]) -> None:
    model = _model(form)
    with pytest.raises(ffebm.UnsupportedError, match=f"depends on what an earlier call left {STATEFUL[form]}"):
        ffebm.convert(model, torch.randn(4, 6))
    assert (GLOBAL, SEEN, FIRST, Keeps.of_class, BOX.first) == ({}, [], None, None, None)
    assert first_in_a_default.__defaults__ == ([],)


def test_what_a_forward_has_seen_in_a_base_class_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Derived(mean_in_an_attribute), nn.Linear(6, 3))
    with pytest.raises(ffebm.UnsupportedError, match="depends on what an earlier call left outside of parameters"):
        ffebm.convert(model, torch.randn(4, 6))
    assert Base.of_base is None


def table_in_an_empty_buffer(net: Keeps, h: Tensor) -> Tensor:
    if net.table.shape[0] < h.shape[1]:
        net.table = torch.arange(h.shape[1]).to(h)
    return h - net.table


def registered_again(net: Keeps, h: Tensor) -> Tensor:
    if net.table.shape[0] < h.shape[1]:
        net.register_buffer("table", torch.arange(h.shape[1]).to(h), persistent=False)
    return h - net.table


def table_in_no_buffer_yet(net: Keeps, h: Tensor) -> Tensor:
    if net.none is None:
        net.none = torch.arange(h.shape[1]).to(h)
    return h - net.none


def table_of_another_dtype(net: Keeps, h: Tensor) -> Tensor:
    net.narrow = net.narrow.to(h.dtype)
    return h - net.narrow


def looked_at_from_outside(net: Keeps, h: Tensor) -> Tensor:
    net.table = h.detach().softmax(1)
    return h * net.table


def table_of_the_batch(net: Keeps, h: Tensor) -> Tensor:
    if net.table.shape[0] != h.shape[0]:
        net.table = torch.linspace(0, 1, 6).expand(h.shape[0], 6)
    return h - net.table


TABLES = (
    table_in_an_empty_buffer,
    registered_again,
    table_in_no_buffer_yet,
    table_of_another_dtype,
    looked_at_from_outside,
    table_of_the_batch,
)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("form", TABLES, ids=lambda form: form.__name__)
def test_a_table_of_another_shape_is_made_in_every_call(
    form: Callable[[Keeps, Tensor], Tensor], training: bool
) -> None:
    model = _model(form).train(training)
    keys = list(model.state_dict())
    hybrid = ffebm.convert(model, torch.randn(4, 6))
    assert any("in the place of buffers ('1." in note for note in hybrid.plan.notes)
    assert list(hybrid.state_dict()) == keys
    with hybrid.feedforward_mode():
        for batch in (4, 4, 7, 1):
            assert_same_step(hybrid, model, torch.randn(batch, 6))
            assert all(parameter.grad is not None for parameter in model.parameters())


class ActivationNorm(nn.Module):
    """The layer of Kingma & Dhariwal (2018, section 3.1), whose first batch sets its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(6)), nn.Parameter(torch.zeros(6))
        self.initialised = False

    def forward(self, h: Tensor) -> Tensor:
        if self.training and not self.initialised:
            with torch.no_grad():
                self.shift.copy_(-h.mean(0))
                self.log_scale.copy_(-h.std(0).log())
            self.initialised = True
        return (h + self.shift) * self.log_scale.exp()


def test_parameters_that_the_first_batch_sets_are_refused_until_they_are_set() -> None:
    model = networks.seeded(lambda: nn.Sequential(nn.Linear(6, 6), ActivationNorm(), nn.Linear(6, 3)))
    x = torch.randn(16, 6)
    hybrid = ffebm.convert(model, x)
    refusal = r"first call writes '1\.shift', '1\.log_scale', and later calls do not.*call the model once"
    with pytest.raises(ffebm.UnsupportedError, match=f"cannot run in train mode.*{refusal}"):
        hybrid(x)
    model(x)
    hybrid = ffebm.convert(model, x)
    with hybrid.feedforward_mode():
        for _ in range(2):
            x = torch.randn(16, 6)
            torch.testing.assert_close(hybrid(x), model(x))


def test_a_buffer_that_the_first_call_alone_fills_is_refused() -> None:
    def filled(net: Keeps, h: Tensor) -> Tensor:
        if not net.history:
            net.narrow.copy_(torch.arange(6))
            net.history.append(1)
        return h - net.narrow

    model = _model(filled)
    with pytest.raises(ffebm.UnsupportedError, match=r"first call writes '1\.narrow', and later calls do not"):
        ffebm.convert(model, torch.randn(4, 6))
    x = torch.randn(4, 6)
    model(x)
    with (hybrid := ffebm.convert(model, x)).feedforward_mode():
        torch.testing.assert_close(hybrid(x), model(x))


INPUTS = {
    "floats": networks.noise(4, 6, seed=1),
    "zeros": torch.zeros(4, 6),
    "one-sided": networks.noise(4, 6, seed=1).sigmoid(),
    "equal": torch.full((4, 6), 3),
    "truth": torch.ones(4, 6, dtype=torch.bool),
    "whole": torch.tensor([[3, 9, 4, 4, 5, 8]] * 4),
    "bytes": torch.tensor([[3, 255, 4, 4, 5, 8]] * 4, dtype=torch.uint8),
    "complex": torch.polar(torch.ones(4, 6), networks.noise(4, 6, seed=1)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_the_earlier_call_has_other_inputs_of_the_same_range(kind: str) -> None:
    seen: SimpleQueue[Tensor] = SimpleQueue()  # lists that a forward names are restored

    class Sees(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.put(x.detach().clone())
            return x

    x = INPUTS[kind]
    assert earlier_call(Sees(), (x,), {}, ()) is not None
    other, same = seen.get_nowait(), seen.get_nowait()
    assert torch.equal(same, x)
    assert (other.shape, other.dtype) == (x.shape, x.dtype)
    assert not torch.equal(other, x)
    if kind in ("whole", "bytes"):
        assert torch.equal(other.aminmax().min, x.aminmax().min)
        assert torch.equal(other.aminmax().max, x.aminmax().max)
    if kind == "one-sided":
        assert 0 <= other.min() <= other.max() <= 1


def test_what_equal_numbers_and_truth_values_leave_is_refused() -> None:
    class KeepsBoth(nn.Module):
        def __init__(self, kept: str) -> None:
            super().__init__()
            self.embedding, self.linear, self.kept = nn.Embedding(9, 6), nn.Linear(6, 6), kept
            self.first: Tensor | None = None

        def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
            h: Tensor = self.linear(self.embedding(tokens))
            if self.first is None:
                self.first = mask if self.kept == "mask" else h.detach().mean((0, 1))
            return h + self.first

    inputs = (torch.zeros(4, 6, dtype=torch.long), torch.ones(4, 6, 6, dtype=torch.bool))
    for kept in ("mask", "tokens"):
        with pytest.raises(ffebm.UnsupportedError, match=r"an earlier call left in the attribute 'first'"):
            ffebm.convert(KeepsBoth(kept), inputs)


def first_in_a_new_global_variable(net: Keeps, h: Tensor) -> Tensor:
    global NEW
    if "NEW" not in globals():
        NEW = h.detach().mean(0)
    return h - NEW


def test_a_global_variable_that_the_first_call_makes_is_refused_and_gone() -> None:
    model = _model(first_in_a_new_global_variable)
    with pytest.raises(ffebm.UnsupportedError, match="depends on what an earlier call left outside of parameters"):
        ffebm.convert(model, torch.randn(4, 6))
    assert "NEW" not in globals()


def test_inputs_that_the_forward_does_not_take_are_not_its_failure() -> None:
    calls: SimpleQueue[list[int]] = SimpleQueue()

    class Sorted(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            calls.put(lengths.tolist())
            if lengths.tolist() != sorted(lengths.tolist(), reverse=True):
                raise ValueError("lengths are not sorted")
            return x

    found = earlier_call(Sorted(), (torch.randn(3, 2), torch.tensor([5, 4, 1])), {}, ())
    assert found is not None
    assert [calls.get_nowait() for _ in range(calls.qsize())] == [[1, 2, 5], [5, 4, 1], [5, 4, 1]]
    assert earlier_call(Sorted(), (torch.randn(3, 2), torch.tensor([1, 2, 5])), {}, ()) is None


def test_equal_numbers_stay_if_the_forward_takes_no_others() -> None:
    calls: SimpleQueue[list[list[float]]] = SimpleQueue()

    class Padded(nn.Module):
        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            calls.put([x[0].tolist(), lengths.tolist()])
            if max(lengths.tolist()) > 2:
                raise ValueError("longer than the input")
            return x

    x = torch.zeros(2, 2)
    assert earlier_call(Padded(), (x, torch.tensor([2, 2])), {}, ()) is not None
    assert [calls.get_nowait() for _ in range(calls.qsize())] == [
        [[0.25, 0.25], [3, 3]],
        [[0.25, 0.25], [2, 2]],
        [[0.0, 0.0], [2, 2]],
    ]
