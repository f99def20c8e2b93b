"""Calls: the operations of a block or part, in groups that are one call of a module each.

A module that is called twice is two groups, and so are the operations that a module runs before and after another
one. Then the groups of a block are a DAG, as its operations are, and no picture of them has a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from ffebm_compiler.ir import Operation

__all__ = ["calls_of"]


def calls_of(operations: Sequence[Operation]) -> list[int]:
    """The group of each operation, numbered from 0. The operations are in topological order."""
    groups: dict[str, int] = {}
    latest: dict[tuple[str, int], int] = {}
    above: list[set[int]] = []
    """For each group, the groups that it needs, directly or not."""
    result = []
    for operation in operations:
        read = {groups[name] for name in operation.inputs if name in groups}
        needed = read.union(*(above[group] for group in read))
        group = latest.get((operation.path, operation.call), -1)
        # It may join if none of the other groups that it reads needs the group that it joins.
        if group < 0 or any(group in above[other] for other in read if other != group):
            group = len(above)
            above.append(set())
            latest[operation.path, operation.call] = group
        new = needed - {group} - above[group]
        if new:
            above[group] |= new
            for others in above:
                if group in others:
                    others |= new
        groups[operation.name] = group
        result.append(group)
    return result
