"""A layered layout from top to bottom, for pictures that Python alone draws.

The method of Sugiyama, Tagawa and Toda (1981): ranks by longest path, a dummy for every rank
that an edge passes, barycentre sweeps against crossings, then coordinates. networkx gives the
order of the nodes.

No library that pip installs does the rest under a permissive licence wherever torch runs (looked at
in November 2026). igraph and grandalf are GPL. fast-sugiyama (MIT) has Linux wheels only for glibc 2.34,
while torch's need 2.28, and it returns no bends or label positions. networkx's multipartite layout knows
neither sizes nor long edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx

__all__ = ["Layout", "Route", "layered"]

Key = tuple[str, ...]
"""A node `(name,)`, or the part of an edge on one rank, `(source, target, rank)`."""

_STEP = 20.0
"""Distance between ranks. Labels have ranks of their own."""

_LABEL_WEIGHT = 8.0
"""Weight between neighbouring parts of a long edge, against 1 for a node. It makes long edges straight."""


@dataclass(frozen=True)
class Route:
    """The path of one edge."""

    points: tuple[tuple[float, float], ...]
    """Points from source to target: in turn the bottom and the top of a node or bend."""
    label: tuple[float, float]
    """Centre of the edge's label."""


@dataclass(frozen=True)
class Layout:
    """The position of everything. The origin is the upper left corner."""

    centres: dict[str, tuple[float, float]]
    routes: dict[tuple[str, str], Route]
    width: float
    height: float


@dataclass
class _Item:
    """A node, or the part of an edge on one rank."""

    rank: int
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    dummy: bool = False


def layered(
    sizes: Mapping[str, tuple[float, float]],
    edges: Mapping[tuple[str, str], tuple[float, float]],
    gap: float = 26.0,
) -> Layout:
    """Lay out a directed acyclic graph.

    Args:
        sizes: width and height of each node.
        edges: width and height of the label of each edge.
        gap: distance between neighbours on a rank.
    """
    rank = _ranks(list(sizes), list(edges))
    items: dict[Key, _Item] = {(name,): _Item(2 * rank[name], *size) for name, size in sizes.items()}
    paths: dict[tuple[str, str], list[Key]] = {}
    for (source, target), size in edges.items():
        path: list[Key] = [(source,)]
        for level in range(2 * rank[source] + 1, 2 * rank[target]):
            labelled = level == 2 * rank[source] + 1
            key: Key = (source, target, str(level))
            items[key] = _Item(level, *(size if labelled else (4.0, 0.0)), dummy=True)
            path.append(key)
        path.append((target,))
        paths[source, target] = path
    links = [(a, b) for path in paths.values() for a, b in pairwise(path)]
    rows = _order_in_rows(items, links)
    _horizontal_places(items, rows, links, gap)
    height = _heights(items, rows)
    left = min((item.x - item.width / 2 for item in items.values()), default=0.0)
    for item in items.values():
        item.x -= left
    routes = {}
    for edge, path in paths.items():
        points = []
        for key in path:
            item = items[key]
            if key != path[0]:
                points.append((item.x, item.y - item.height / 2))
            if key != path[-1]:
                points.append((item.x, item.y + item.height / 2))
        label = items[path[1]]
        routes[edge] = Route(tuple(points), (label.x, label.y))
    width = max((item.x + item.width / 2 for item in items.values()), default=0.0)
    return Layout({name: (items[name,].x, items[name,].y) for name in sizes}, routes, width, height)


def _ranks(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The rank of each node: its longest path from a source. A node with fewer inputs than outputs moves down."""
    graph: networkx.DiGraph[str] = networkx.DiGraph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(edges)
    order = list(networkx.topological_sort(graph))
    rank: dict[str, int] = {}
    for node in order:
        rank[node] = max((rank[before] + 1 for before in graph.predecessors(node)), default=0)
    for node in reversed(order):
        if graph.in_degree(node) < graph.out_degree(node):
            rank[node] = min(rank[after] for after in graph.successors(node)) - 1
    return rank


def _order_in_rows(items: Mapping[Key, _Item], links: Sequence[tuple[Key, Key]]) -> list[list[Key]]:
    """Rows with few crossings, from barycentre sweeps. The best order that they reach is kept."""
    depth = max((item.rank for item in items.values()), default=-1) + 1
    rows: list[list[Key]] = [[] for _ in range(depth)]
    for key, item in items.items():
        rows[item.rank].append(key)
    above: dict[Key, list[Key]] = {key: [] for key in items}
    below: dict[Key, list[Key]] = {key: [] for key in items}
    for upper, lower in links:
        below[upper].append(lower)
        above[lower].append(upper)
    best, fewest = [list(row) for row in rows], _crossings(rows, below)
    for sweep in range(12):
        if not fewest:
            break
        downwards = sweep % 2 == 0
        beside = above if downwards else below
        for level in range(depth) if downwards else range(depth - 1, -1, -1):
            row = rows[level]
            place = {
                key: i for other in (level - 1, level + 1) if 0 <= other < depth for i, key in enumerate(rows[other])
            }
            wish = {
                key: sum(place[n] for n in beside[key]) / len(beside[key]) if beside[key] else float(i)
                for i, key in enumerate(row)
            }
            row.sort(key=wish.__getitem__)
        found = _crossings(rows, below)
        if found < fewest:
            best, fewest = [list(row) for row in rows], found
    return best


def _crossings(rows: Sequence[Sequence[Key]], below: Mapping[Key, list[Key]]) -> int:
    """The number of pairs of edges that cross, counted as inversions between neighbouring rows."""
    total = 0
    for upper, lower in pairwise(rows):
        place = {key: index for index, key in enumerate(lower)}
        ends: list[int] = []
        for key in upper:
            for end in sorted(place[other] for other in below[key]):
                total += sum(previous > end for previous in ends) if len(ends) < 400 else 0
                ends.append(end)
    return total


def _horizontal_places(
    items: Mapping[Key, _Item],
    rows: Sequence[Sequence[Key]],
    links: Sequence[tuple[Key, Key]],
    gap: float,
) -> None:
    """Horizontal coordinates. Every item comes near the mean of its neighbours, in order and without overlap."""
    beside: dict[Key, list[tuple[Key, float]]] = {key: [] for key in items}
    for upper, lower in links:
        weight = _LABEL_WEIGHT if items[upper].dummy and items[lower].dummy else 1.0
        beside[upper].append((lower, weight))
        beside[lower].append((upper, weight))
    for row in rows:
        _spread_out(items, row, [0.0] * len(row), [1.0] * len(row), gap)
    for sweep in range(24):
        for row in rows if sweep % 2 == 0 else reversed(rows):
            wishes, weights = [], []
            for key in row:
                total = sum(weight for _, weight in beside[key])
                wish = sum(items[other].x * weight for other, weight in beside[key])
                wishes.append(wish / total if total else items[key].x)
                weights.append(total or 0.1)
            _spread_out(items, row, wishes, weights, gap)


def _spread_out(
    items: Mapping[Key, _Item],
    row: Sequence[Key],
    wishes: Sequence[float],
    weights: Sequence[float],
    gap: float,
) -> None:
    """Minimise Σ w (x − wish)² with a gap between neighbours, by isotonic regression (pooling of violators)."""
    offsets = [0.0]
    for left, right in pairwise(row):
        offsets.append(offsets[-1] + (items[left].width + items[right].width) / 2 + gap)
    pools: list[tuple[float, float, int]] = []
    for wish, weight, offset in zip(wishes, weights, offsets, strict=False):
        mean, mass, size = wish - offset, weight, 1
        while pools and pools[-1][0] > mean:
            other, more, count = pools.pop()
            mean, mass, size = (mean * mass + other * more) / (mass + more), mass + more, size + count
        pools.append((mean, mass, size))
    values = [mean for mean, _, size in pools for _ in range(size)]
    for key, value, offset in zip(row, values, offsets, strict=False):
        items[key].x = value + offset


def _heights(items: Mapping[Key, _Item], rows: Sequence[Sequence[Key]]) -> float:
    """Vertical coordinates, and the height of the whole."""
    top = 0.0
    for row in rows:
        height = max((items[key].height for key in row), default=0.0)
        for key in row:
            items[key].y = top + height / 2
        top += height + _STEP
    return max(top - _STEP, 0.0)
