"""Inputs and outputs of any class go through: flattened to plain containers, built again as they were."""

from __future__ import annotations

import dataclasses
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.errors import ExportError, InputError
from ffebm_compiler.passes.containers import Form, plain

Pair = namedtuple("Pair", "left right")


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    name: str = "logits"


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float = 2.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError("scale")


@attrs.define
class Attrs:
    x: Tensor
    more: list[Tensor] = attrs.field(factory=list)


class Easy(dict):  # type: ignore[type-arg]
    """A dictionary whose items are attributes, with a constructor of its own."""

    def __init__(self, **items: Any) -> None:
        super().__init__(**items)
        self.__dict__.update(items)


class Cache:
    """An object that holds tensors in its attributes, some of them in lists."""

    __slots__ = ("keys", "step", "unused")

    def __init__(self, keys: list[Tensor], step: int) -> None:
        self.keys, self.step = keys, step


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in Form.of(value)[0] if isinstance(leaf, Tensor)]


# -- there and back --------------------------------------------------------------------------------

TENSORS = st.builds(lambda n: torch.full((2,), float(n)), st.integers(0, 9))
LEAVES = st.one_of(TENSORS, st.none(), st.integers(0, 3), st.text(max_size=2))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.builds(Pair, inner, inner),
        st.builds(Output, inner, inner),
        st.builds(Frozen, inner),
        st.builds(Attrs, inner, st.lists(inner, max_size=2)),
        st.builds(lambda a: Easy(a=a), inner),
        st.builds(lambda a: OrderedDict(b=a), inner),
        st.builds(lambda a: Cache([a], 3), inner),
    ),
    max_leaves=8,
)


def shown(value: Any) -> Any:
    """A value as text, with classes and tensors."""
    if isinstance(value, Tensor):
        return ("tensor", value.tolist())
    if isinstance(value, dict):
        return (type(value), [(key, shown(item)) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return (type(value), [shown(item) for item in value])
    names = getattr(type(value), "__slots__", None) or getattr(value, "__dict__", ())
    return (type(value), [(n, shown(getattr(value, n, None))) for n in names if n != "__weakref__"] or value)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_every_container_comes_back_as_it_was(value: Any) -> None:
    found, form = Form.of(value)
    assert shown(form.build(found)) == shown(value)
    assert form.matches(Form.of(value)[1])
    assert form.num_leaves == len(found)


def test_plain_values_are_themselves() -> None:
    value = (torch.ones(1), [{"a": torch.ones(1)}], None, 3, defaultdict(list, a=torch.ones(1)))
    found, recipe = plain(value)
    assert recipe.trivial
    assert found == value


# -- models ----------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any], read: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.make, self.read = make, read

    def forward(self, value: Any) -> Any:
        return self.make(self.b(torch.tanh(self.a(self.read(value)))))


CASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "namedtuple": (lambda y: Pair(y, y * 2), lambda v: v.left + v.right),
    "dataclass": (lambda y: Output(y, (y * 2,)), lambda v: v.logits),
    "frozen dataclass": (lambda y: Frozen(y, 3.0), lambda v: v.x * v.scale),
    "attrs": (lambda y: Attrs(y, [y]), lambda v: v.x + v.more[0]),
    "dict subclass": (lambda y: Easy(y=y), lambda v: v.y),
    "ordered dict": (lambda y: OrderedDict(y=y), lambda v: v["y"]),
    "object": (lambda y: Cache([y, y + 1], 2), lambda v: v.keys[0] + v.keys[1]),
    "nested": (lambda y: {"o": [Output(Pair(y, None))]}, lambda v: v["o"][0].logits.left),
    "distribution": (lambda y: torch.distributions.Normal(y, y.exp()), lambda v: v.loc),
    "sorted": (lambda y: y.sort(-1), lambda v: v.values),
}


@pytest.mark.parametrize("case", CASES)
def test_models_take_and_return_their_own_classes(case: str) -> None:
    make, read = CASES[case]
    model = seeded(lambda: Model(make, read))
    hybrid = ffebm.convert(model, (make(noise(3, 8)),), feedback=1e-6)
    value = make(noise(3, 8, seed=1))
    found, expected = hybrid(value), model(value)
    assert type(found) is type(expected)
    for have, want in zip(leaves(found), leaves(expected), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    sum(leaf.sum() for leaf in leaves(found) if leaf.is_floating_point()).backward()
    assert hybrid.get_parameter("a.weight").grad is not None


def test_another_class_or_another_setting_is_refused() -> None:
    make, read = CASES["frozen dataclass"]
    hybrid = ffebm.convert(seeded(lambda: Model(make, read)), (Frozen(noise(3, 8)),))
    with pytest.raises(InputError, match="do not have the captured structure: got Pair"):
        hybrid(Pair(noise(3, 8), None))
    with pytest.raises(InputError, match=r"captured with 2\.0, which became a constant"):
        hybrid(Frozen(noise(3, 8), 4.0))


def test_saved_hybrids_build_their_inputs_from_imported_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, read = CASES["dataclass"]
    model = seeded(lambda: Model(make, read))
    hybrid = ffebm.convert(model, (Output(noise(3, 8)),), feedback=1e-6)
    hybrid.save(tmp_path / "saved")
    again = ffebm.load(tmp_path / "saved", model)
    value = Output(noise(5, 8))
    torch.testing.assert_close(again(value).logits, hybrid(value).logits)
    monkeypatch.delattr(sys.modules[__name__], "Output")
    with pytest.raises(InputError, match=r"inputs of class .*test_containers\.Output, which is not there: import"):
        ffebm.load(tmp_path / "saved", model)


def test_an_input_that_no_file_can_hold_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    class Setting:
        pass

    model = seeded(lambda: Model(lambda y: y, lambda v: v[0]))
    hybrid = ffebm.convert(model, ((noise(3, 8), Setting()),))
    with pytest.raises(ExportError, match="an object of type Setting among the example inputs"):
        hybrid.save(tmp_path / "saved")


# -- calls -----------------------------------------------------------------------------------------


class AnyArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, *inputs: Tensor, **more: Tensor) -> Tensor:
        return self.a(sum(inputs)) + more["shift"] * more.get("scale", 1.0)


def test_any_number_of_arguments_and_any_names_leave_the_batch_free() -> None:
    model = seeded(AnyArguments)
    hybrid = ffebm.convert(model, (noise(3, 8), noise(3, 8)), {"shift": noise(3, 4), "scale": 2.0})
    x, shift = noise(5, 8), noise(5, 4)
    torch.testing.assert_close(hybrid(x, x, scale=2.0, shift=shift), model(x, x, scale=2.0, shift=shift))


class Options(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 4)

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None, *, flip: bool = False) -> Tensor:
        y = self.a(x) * scale
        y = y if shift is None else y + shift
        return -y if flip else y


def test_arguments_may_be_given_by_place_by_name_or_with_their_defaults() -> None:
    model, x = seeded(Options), noise(3, 8)
    hybrid = ffebm.convert(model, x)
    expected = model(x)
    for call in (
        lambda m: m(x),
        lambda m: m(x=x),
        lambda m: m(x, 1.0),
        lambda m: m(x, scale=1.0, shift=None, flip=False),
    ):
        torch.testing.assert_close(call(hybrid), expected)
    scaled = ffebm.convert(model, (x, 1.0), {"flip": True})
    torch.testing.assert_close(scaled(flip=True, x=x), -expected)
    with pytest.raises(InputError, match=r"argument 'shift' is a tensor of shape .*captured without it: convert again"):
        hybrid(x, shift=x)
    with pytest.raises(InputError, match=r"argument 'scale' is 2\.0, but the model was captured without it"):
        hybrid(x, 2.0)
    with pytest.raises(InputError, match="do not have the captured structure"):
        hybrid(x, nothing=1)
