"""Garbage: Python's collector of reference cycles runs rarely while a network is compiled.

A compiler makes many objects that live on, nodes and their metadata above all. The collector walks all of them again
and again, an eighth of the time that `torch.export` takes, and finds next to nothing. Young objects are still collected
in small numbers, while they are in the processor's caches. What survives that is walked after a million new objects,
and what survives that too is left to the caller's next collection.

`torch.export` remembers by weak references which tensors the values of its graph stand for. It needs them no more once
the graph is there, and `torch.utils.swap_tensors` refuses tensors that have any.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

from torch import fx

__all__ = ["collected_rarely", "forget_traced"]

_THRESHOLDS = (2_000, 500, 1_000)
"""New objects between two collections, and collections of one generation between two of the next.

Python's own are 700 to 2 000, 10 and 10.
"""


@contextmanager
def collected_rarely() -> Iterator[None]:
    """While the context is open, look for reference cycles among older objects after a million new ones.

    Collections stay off if the caller has turned them off, and higher thresholds of the caller's stay.
    """
    before = gc.get_threshold()
    if before[0]:
        gc.set_threshold(*map(max, before, _THRESHOLDS))
    try:
        yield
    finally:
        gc.set_threshold(*before)


def forget_traced(graph: fx.Graph) -> None:
    """Let the values of a captured graph forget the tensors that they were made from."""
    for mode in {getattr(node.meta.get("val"), "fake_mode", None) for node in graph.nodes} - {None}:
        known: object = mode
        for name in ("fake_tensor_converter", "meta_converter", "describer", "lookup_tensor"):  # none of them public
            known = getattr(known, name, None)
        if isinstance(known, MutableMapping):
            known.clear()
