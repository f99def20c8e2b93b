"""Own generators: find the random generators that a model uses beside the default ones of the process.

Promise: every generator is found that the model's attributes hold or that its code reaches by name. After
`own_generators_unchanged` each has its former state.
"""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ffebm_compiler.passes.process import reachable

__all__ = ["OwnGenerators", "own_generators_unchanged"]


class OwnGenerators:
    """The generators of a model by name, with their states when this object was made."""

    def __init__(self, source: nn.Module, reached: list[Any] | None = None) -> None:
        numpy: Any = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (torch.Generator, random.Random)
        if numpy is not None:
            kinds += (numpy.random.Generator, numpy.random.RandomState)
        shared = [torch.default_generator, getattr(random.random, "__self__", None)]
        shared += [] if numpy is None else [numpy.random.random.__self__]
        found = reachable(source) if reached is None else reached
        own = [value for value in found if isinstance(value, kinds) and not any(value is known for known in shared)]
        names = _attributes_that_hold(source, own)
        self.found: dict[str, Any] = {}
        for value in own:
            kind = f"a {type(value).__module__.removesuffix('._C').removesuffix('._generator')}.{type(value).__name__}"
            name = f"{kind} ({names[id(value)]!r})" if id(value) in names else f"{kind} of the model's code"
            self.found[f"{name}, {len(self.found)}" if name in self.found else name] = value
        self.states = {name: _state_of(value) for name, value in self.found.items()}

    def drawn(self) -> Iterator[str]:
        """Names of the generators that have drawn since. torch's own are left out, since a trace sees their draws."""
        for name, value in self.found.items():
            if not isinstance(value, torch.Generator) and pickle.dumps(_state_of(value)) != pickle.dumps(
                self.states[name]
            ):
                yield name

    def restore(self) -> None:
        """Give every generator its former state."""
        for name, value in self.found.items():
            _set_state(value, self.states[name])


def _attributes_that_hold(source: nn.Module, values: list[Any]) -> dict[int, str]:
    """Id of each of these values that an attribute of a module holds -> the last such attribute's name."""
    wanted = {id(value) for value in values}
    return {
        id(value): f"{path}.{key}" if path else key
        for path, module in (source.named_modules() if wanted else ())
        for key, value in vars(module).items()
        if id(value) in wanted
    }


@contextmanager
def own_generators_unchanged(source: nn.Module, reached: list[Any] | None = None) -> Iterator[OwnGenerators]:
    """Restore the states of a model's own generators when the context ends."""
    generators = OwnGenerators(source, reached)
    try:
        yield generators
    finally:
        generators.restore()


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
