"""Keep the memory that a step frees in the process, so that the next step need not fetch it from the system again.

A block that settles takes and frees many tensors in each step. glibc's allocator returns freed memory at the end of its
heap once that is more than twice the largest block that the process has ever freed (`M_TRIM_THRESHOLD` in mallopt(3)).
A process that has freed no large block so loses megabytes in every step. Each page that is fetched again is a page
fault and has to be cleared, which took 6 to 10 % of an EP step with states of 1 MiB. The source's own steps free in
another order and have no such faults.

So one block near the largest that the rule looks at, 32 MiB, is allocated and freed once. It is never written to, so
that it takes no memory. Where the thresholds were set by the user, in the environment or by mallopt, glibc leaves them
as they are. Other allocators are not affected.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

__all__ = ["keep_freed_memory"]

_BLOCK = 31 << 20
"""Bytes, slightly less than the 32 MiB up to which glibc adapts its thresholds."""


@lru_cache
def keep_freed_memory() -> None:
    """Let the allocator keep up to twice 31 MiB that is freed. It does something the first time only."""
    np.empty(_BLOCK, dtype=np.uint8)  # freed at once
