"""Garbage: Python's collector of reference cycles runs rarely while a network is compiled.

A compiler makes many objects that live on, nodes and their metadata above all. The collector walks all of them again
and again, an eighth of the time that `torch.export` takes, and finds next to nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collected_rarely"]

_OBJECTS = 100_000
"""Number of new objects between two collections; Python's own is 700 to 2 000."""


@contextmanager
def collected_rarely() -> Iterator[None]:
    """While the context is open, collect reference cycles after every 100 000 new objects, not after a thousand.

    Collections stay off if the caller has turned them off, and a higher threshold of the caller's stays.
    """
    before = gc.get_threshold()
    if 0 < before[0] < _OBJECTS:
        gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
