"""Unchanged: contexts that undo what a forward changes besides its result.

Promise: however a context ends, it restores what its name says.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ffebm_compiler.passes.held import containers_in, content_of, own_attributes, refill

__all__ = [
    "Attributes",
    "attributes_unchanged",
    "draws_of_this_thread",
    "generator_states",
    "generators_unchanged",
    "same_content",
    "tensors_unchanged",
]


@contextmanager
def generators_unchanged() -> Iterator[None]:
    """Restore the states of torch's, Python's and numpy's default random generators afterwards."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    numpy: Any = sys.modules.get("numpy")
    ours, theirs = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(ours)
        if numpy is not None:
            numpy.random.set_state(theirs)


_PYTHONS = "Python's own generator (random)"
_NUMPYS = "numpy's generator (numpy.random)"


def generator_states() -> dict[str, str]:
    """The states of Python's and numpy's default random generators, in a form that compares."""
    numpy: Any = sys.modules.get("numpy")
    states = {_PYTHONS: repr(random.getstate())}
    if numpy is not None:
        kind, keys, *position = numpy.random.get_state()
        states[_NUMPYS] = repr((kind, keys.tobytes(), position))
    return states


@contextmanager
def draws_of_this_thread() -> Iterator[set[str]]:
    """Names of the default generators, of those in `generator_states`, that this thread may draw from.

    Other threads draw from Python's too, and change its state: those of dask do when they pause. So it counts if this
    thread calls one of its functions. Numpy's functions cannot be seen when they are called, so that numpy's always
    counts. If this is the only thread, both do.
    """
    if threading.active_count() == 1:
        yield {_PYTHONS, _NUMPYS}
        return
    found = {_NUMPYS}
    generator = getattr(random.random, "__self__", None)

    def note(frame: FrameType, event: str, called: Any) -> None:
        if (event == "c_call" and generator is not None and getattr(called, "__self__", None) is generator) or (
            event == "call" and frame.f_globals.get("__name__") == "random"
        ):
            found.add(_PYTHONS)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(before)


@contextmanager
def tensors_unchanged(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Restore the contents of tensors that are written in place, and make them leaves of autograd's graph again.

    The list has those whose contents had changed, afterwards.
    """
    changed: list[Tensor] = []
    before = [(tensor, tensor.detach().clone(), tensor.is_leaf) for tensor in tensors if not tensor.is_meta]
    try:
        yield changed
    finally:
        with torch.no_grad():
            for tensor, content, leaf in before:
                if leaf and not tensor.is_leaf:
                    tensor.detach_()  # a value with a gradient was written into it
                if (tensor.dtype, tensor.device, tensor.shape) != (content.dtype, content.device, content.shape):
                    tensor.data = content  # the forward moved its module
                elif tensor.layout is not torch.strided or not torch.equal(
                    tensor, content
                ):  # versions do not tell, since batch norm does not count its writes to the statistics
                    tensor.copy_(content)
                    changed.append(tensor)


class Attributes:
    """The Python attributes of a module and its submodules when this object was made."""

    def __init__(self, source: nn.Module) -> None:
        self.modules = dict(source.named_modules())
        self.before = {name: own_attributes(module) for name, module in self.modules.items()}
        self.registered = {
            name: (dict(module._parameters), dict(module._buffers)) for name, module in self.modules.items()
        }
        modules = {id(module) for module in self.modules.values()}
        self.contents: dict[str, dict[str, list[tuple[Any, Any]]]] = {
            name: {
                key: [(container, content_of(container)) for container in containers_in(value, modules)]
                for key, value in own.items()
            }
            for name, own in self.before.items()
        }

    def changed(self) -> list[str]:
        """Names of the attributes that have been replaced, or whose contents have changed."""
        found = []
        for name, module in self.modules.items():
            now, before = own_attributes(module), self.before[name]
            for key in dict.fromkeys([*before, *now]):
                same = key in now and key in before and _same(before[key], now[key])
                kept = self.contents[name].get(key, ())
                if not same or not all(same_content(content, content_of(container)) for container, content in kept):
                    found.append(f"{name}.{key}" if name else key)
        return found

    def restore(self) -> None:
        """Restore all attributes, parameters and buffers, and the contents of containers."""
        for name, module in self.modules.items():
            for present, known in zip((module._parameters, module._buffers), self.registered[name], strict=True):
                if list(present) != list(known) or any(present[key] is not known[key] for key in known):
                    present.clear()  # the forward assigned a buffer, or made one
                    present.update(known)
            now, before = own_attributes(module), self.before[name]
            for key in now:
                if key not in before:
                    del module.__dict__[key]
            for key, value in before.items():
                if now.get(key) is not value:
                    module.__dict__[key] = value
                for container, content in self.contents[name][key]:
                    if not same_content(content, content_of(container)):
                        refill(container, content)

    def forget(self, unwanted: Callable[[Any], bool]) -> None:
        """Restore the attributes that now hold something unwanted. Other changes stay."""
        for name, module in self.modules.items():
            before = self.before[name]
            for key, value in own_attributes(module).items():
                if unwanted(value) and not (key in before and before[key] is value):
                    if key in before:
                        module.__dict__[key] = before[key]
                    else:
                        del module.__dict__[key]
                elif isinstance(value, dict) and key in before and before[key] is value:
                    known = dict(self.contents[name][key][0][1])
                    _delete_keys(value, [part for part, item in value.items() if unwanted(item) and part not in known])


@contextmanager
def attributes_unchanged(source: nn.Module) -> Iterator[Attributes]:
    """Restore the Python attributes of a module, and the contents of their containers, afterwards."""
    attributes = Attributes(source)
    try:
        yield attributes
    finally:
        attributes.restore()


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    plain = (int, float, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, tuple)
    return type(one) is type(other) and isinstance(one, plain) and _equal(one, other)


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # a tuple of tensors has no truth value
        return False


def same_content(one: Any, other: Any) -> bool:
    """Whether two results of `content_of` hold the same objects, or equal numbers and texts."""
    if one is None or other is None:
        return one is other
    if len(one) != len(other):
        return False
    pairs = zip(one, other, strict=True)
    return all(_same(a[1], b[1]) if isinstance(a, tuple) and len(a) == 2 else _same(a, b) for a, b in pairs)


def _delete_keys(container: dict[Any, Any], keys: list[Any]) -> None:
    for key in keys:
        del container[key]
