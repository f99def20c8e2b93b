"""Own generators: random generators that a model keeps, or that its code names, beside the process's default ones.

Promise: each is found that the model's attributes hold, or that its code reaches by name; after
`own_generators_unchanged` each is in the state in which it was.
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
    """The generators of a model, by name, and the states in which they are now."""

    def __init__(self, source: nn.Module, reached: list[Any] | None = None) -> None:
        numpy: Any = sys.modules.get("numpy")
        kinds: tuple[type, ...] = (torch.Generator, random.Random)
        if numpy is not None:
            kinds += (numpy.random.Generator, numpy.random.RandomState)
        names = {
            id(value): f"{path}.{key}" if path else key
            for path, module in source.named_modules()
            for key, value in vars(module).items()
        }
        shared = [torch.default_generator, getattr(random.random, "__self__", None)]
        shared += [] if numpy is None else [numpy.random.random.__self__]
        self.found: dict[str, Any] = {}
        for value in reachable(source) if reached is None else reached:
            if isinstance(value, kinds) and not any(value is known for known in shared):
                kind = (
                    f"a {type(value).__module__.removesuffix('._C').removesuffix('._generator')}.{type(value).__name__}"
                )
                name = f"{kind} ({names[id(value)]!r})" if id(value) in names else f"{kind} of the model's code"
                self.found[f"{name}, {len(self.found)}" if name in self.found else name] = value
        self.states = {name: _state(value) for name, value in self.found.items()}

    def drawn(self) -> Iterator[str]:
        """Names of the generators that are in another state now, those of torch aside, whose draws a trace sees."""
        for name, value in self.found.items():
            if not isinstance(value, torch.Generator) and pickle.dumps(_state(value)) != pickle.dumps(
                self.states[name]
            ):
                yield name

    def restore(self) -> None:
        """Put every generator back into its state."""
        for name, value in self.found.items():
            _set(value, self.states[name])


@contextmanager
def own_generators_unchanged(source: nn.Module, reached: list[Any] | None = None) -> Iterator[OwnGenerators]:
    """The states of a model's own generators."""
    generators = OwnGenerators(source, reached)
    try:
        yield generators
    finally:
        generators.restore()


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if hasattr(generator, "bit_generator") else generator.get_state()


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
