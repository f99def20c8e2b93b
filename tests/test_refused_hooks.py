"""Hooks in autograd's graph, on modules and on all modules: kept, refused with their line, or told."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from same_as_source import ONE_LAYER, assert_same, deviation
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.nn.modules import module as modules

import ffebm_compiler as ffebm

Compute = Callable[[nn.Module, Tensor], Tensor]


def between(net: nn.Module, h: Tensor) -> Tensor:
    return torch.tanh(h)


class Net(nn.Module):
    """Two layers, and what the case computes between them."""

    def __init__(self, compute: Compute = between) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.compute(self, self.a(x)))


def of_node(net: nn.Module, h: Tensor) -> Tensor:
    y = torch.tanh(h)
    if y.grad_fn is not None:
        y.grad_fn.register_hook(lambda given, got: tuple(2 * g for g in given))
    return y


def before_node(net: nn.Module, h: Tensor) -> Tensor:
    y = torch.tanh(h)
    if y.grad_fn is not None:
        y.grad_fn.register_prehook(lambda got: tuple(2 * g for g in got))
    return y


def of_several(net: nn.Module, h: Tensor) -> Tensor:
    y, z = torch.tanh(h), 2 * h
    register_multi_grad_hook([y, z], lambda gradients: None)
    return y + z


def of_saved(net: nn.Module, h: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: 2 * t, lambda t: t):
        return torch.tanh(h)


class Halved(saved_tensors_hooks):
    """Hooks of the user's own class."""

    def __init__(self) -> None:
        super().__init__(lambda t: t / 2, lambda t: t)


def of_saved_in_a_class(net: nn.Module, h: Tensor) -> Tensor:
    with Halved():
        return torch.tanh(h)


def of_accumulated(net: nn.Module, h: Tensor) -> Tensor:
    inner = h.detach().requires_grad_()
    inner.register_post_accumulate_grad_hook(lambda leaf: None)
    return torch.tanh(h) * inner


def of_a_module(net: nn.Module, h: Tensor) -> Tensor:
    if not net.b._backward_hooks:
        net.b.register_full_backward_hook(lambda module, given, got: None)
    return torch.tanh(h)


REFUSED = {
    "node": (of_node, r"grad_fn\.register_hook.*use Tensor\.register_hook"),
    "before a node": (before_node, r"grad_fn\.register_prehook.*use Tensor\.register_hook"),
    "name of a node": (lambda net, h: h if "Mul" in (2 * h).grad_fn.name() else 2 * h, r"grad_fn\.name"),
    "several gradients": (of_several, "hook on several gradients"),
    "saved tensors": (of_saved, "hooks on saved tensors.*around the call of the hybrid"),
    "saved tensors, own class": (of_saved_in_a_class, "hooks on saved tensors"),
    "accumulated": (of_accumulated, "hook on an accumulated gradient"),
    "module": (of_a_module, r"grad_fn\..*backward pass of a module"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_hooks_that_a_forward_sets_in_autograds_graph_are_refused_with_their_line(form: str) -> None:
    compute, reason = REFUSED[form]
    before = saved_tensors_hooks.__enter__, Tensor.register_post_accumulate_grad_hook
    with pytest.raises(ffebm.CaptureError, match=rf"\(.*test_refused_hooks\.py, line \d+\).*{reason}"):
        ffebm.convert(Net(compute), torch.randn(5, 8))
    assert before == (saved_tensors_hooks.__enter__, Tensor.register_post_accumulate_grad_hook)


def offloaded(net: nn.Module, h: Tensor) -> Tensor:
    with save_on_cpu():
        return torch.tanh(h)


def hooked_with_gradients(net: nn.Module, h: Tensor) -> Tensor:
    with torch.enable_grad():
        y = torch.tanh(h)
        y.register_hook(lambda gradient: 2 * gradient)
    return y


def hooked_whatever(net: nn.Module, h: Tensor) -> Tensor:
    y = torch.tanh(h)
    y.register_hook(lambda gradient: 2 * gradient)
    return y


def any_of_several(net: nn.Module, h: Tensor) -> Tensor:
    y, z = torch.tanh(h), 2 * h
    if y.requires_grad:
        register_multi_grad_hook([y, z], lambda gradient: net.called.append(gradient), mode="any")
    return y + z


def retained(net: nn.Module, h: Tensor) -> Tensor:
    h.retain_grad()
    return torch.tanh(h)


KEPT = {
    "whether there is a node": lambda net, h: torch.tanh(h) if h.grad_fn is not None else h.tanh(),
    "on the CPU": offloaded,
    "in a region with gradients": hooked_with_gradients,
    "that needs gradients": hooked_whatever,
    "that needs gradients, without effect": retained,
}


@pytest.mark.parametrize("form", KEPT)
def test_what_does_no_harm_or_is_known_is_kept(form: str) -> None:
    assert_same(Net(KEPT[form]), torch.randn(5, 8))


def test_a_hook_on_the_first_of_several_gradients_is_called() -> None:
    model = Net(any_of_several)
    model.called = []
    hybrid = assert_same(model, torch.randn(5, 8))
    hybrid.called.clear()
    hybrid(torch.randn(5, 8)).sum().backward()
    assert len(hybrid.called) == 1


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_are_refused(kind: str) -> None:
    handle = getattr(modules, f"register_module_{kind}_hook")(lambda *_: None)
    try:
        with pytest.raises(ffebm.UnsupportedError, match=r"hook for all modules of the process.*remove it"):
            ffebm.convert(Net(), torch.randn(5, 8))
    finally:
        handle.remove()


def triple(parameter: Tensor) -> None:
    parameter.grad *= 3


def test_hooks_on_accumulated_gradients_of_parameters_are_kept() -> None:
    model, x = Net(), torch.randn(5, 8)
    model.a.weight.register_post_accumulate_grad_hook(triple)
    plain = copy.deepcopy(model)  # without hooks
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER)
    for network in (hybrid, plain):
        network(x).square().sum().backward()
    assert deviation(hybrid.get_submodule("a").weight.grad, 3 * plain.a.weight.grad) < 1e-5
    assert deviation(hybrid.get_submodule("b").weight.grad, plain.b.weight.grad) < 1e-5


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.parametrize("form", ["hybrid", "copy", "file"])
def test_a_hook_that_is_set_after_conversion_is_told_once(kind: str, form: str) -> None:
    model, x = Net(), torch.randn(5, 8)
    model.b.register_forward_hook(double)
    hybrid = ffebm.convert(model, x, hardware=ONE_LAYER)
    if form == "copy":
        hybrid = copy.deepcopy(hybrid)
    if form == "file":
        file = io.BytesIO()
        torch.save(hybrid, file)
        file.seek(0)
        hybrid = torch.load(file, weights_only=False)
    assert deviation(hybrid(x), model(x)) < 1e-5  # those of the source are captured, and no news
    handle = getattr(hybrid.b, f"register_{kind}_hook")(lambda *_: None)
    with pytest.warns(ffebm.FFEBMWarning, match=r"module 'b' of the hybrid has a .* hook.*never called"):
        hybrid(x)
    hybrid(x)
    handle.remove()
    hybrid(x)


def double(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return 2 * output


class Versioned(Net):
    """Keeps something beside its tensors, and renames a key of old files."""

    def __init__(self) -> None:
        super().__init__()
        self.note = torch.zeros(2)
        self._register_load_state_dict_pre_hook(self._renamed)
        self.register_state_dict_post_hook(_marked)

    def get_extra_state(self) -> Tensor:
        return self.note

    def set_extra_state(self, state: Tensor) -> None:
        self.note = state

    def _renamed(self, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        if prefix + "old.weight" in state:
            state[prefix + "a.weight"] = state.pop(prefix + "old.weight")


def _marked(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    state[prefix + "b.bias"] = state[prefix + "b.bias"] + 0.0


def test_the_state_of_a_source_with_extra_state_and_hooks_is_the_hybrids(tmp_path) -> None:
    model, x = Versioned(), torch.randn(5, 8)
    model.note = torch.ones(2)
    hybrid = ffebm.convert(model, x)
    mine, theirs = hybrid.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert mine["b.bias"].data_ptr() != hybrid.b.bias.data_ptr()  # the hook ran
    other = Versioned()
    theirs = other.state_dict()
    theirs["old.weight"] = theirs.pop("a.weight")
    hybrid.load_state_dict(theirs)
    assert torch.equal(hybrid.a.weight, other.a.weight)
    assert torch.equal(hybrid.state_dict()["_extra_state"], torch.zeros(2))
    hybrid.save(tmp_path / "hybrid")
    loaded = ffebm.load(tmp_path / "hybrid", Versioned())
    assert torch.equal(loaded(x), hybrid(x))
    assert torch.equal(loaded.state_dict()["_extra_state"], torch.zeros(2))


class Counting(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: object) -> None:
        pass


def test_extra_state_that_is_no_tensor_is_refused_by_name_where_it_cannot_be_stored(tmp_path) -> None:
    hybrid = ffebm.convert(nn.Sequential(Counting(8, 8)), torch.randn(5, 8))
    with pytest.raises(
        ffebm.ExportError, match=r"'0\._extra_state' of the state is a dict.*let get_extra_state return"
    ):
        hybrid.save(tmp_path / "hybrid")
    file = io.BytesIO()
    torch.save(hybrid.state_dict(), file)
    file.seek(0)
    hybrid.load_state_dict(torch.load(file, weights_only=False))


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("mask", torch.eye(8).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.mask, super().forward(x).t()).t()


def test_a_sparse_buffer_is_refused_by_name_where_it_cannot_be_stored(tmp_path) -> None:
    hybrid = ffebm.convert(nn.Sequential(Masked()), torch.randn(5, 8))
    with pytest.raises(ffebm.ExportError, match=r"'0\.mask' of the state is a tensor of layout torch\.sparse_coo"):
        hybrid.save(tmp_path / "hybrid")
