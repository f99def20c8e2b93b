"""The state of a partition under improvement: the home of each operation, the cost, and a proof that it is acyclic.

Operations are integers here. Each has a home: a block (0, 1, ...) or `DIGITAL`. The cost is kept
up to date value by value. A value u costs

    values(u) · ( blocks other than its home that read it  +  1 if it leaves its home through ADCs )

With `prices` the cost is an energy: of these conversions, of the reads of layers and of digital work.
Moving one operation changes this only for the operation and its operands, in time
proportional to their number. The proof of acyclicity is `order`, a permutation of all operations
that is topological for the quotient graph and in which every block is contiguous. A change of
some blocks can make a cycle only between the first and the last position that it touches. So
only this window is sorted again.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable

from ffebm_compiler.errors import PlanError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import ALWAYS_JOIN, Operation, OperationGraph, Role
from ffebm_compiler.passes.partition.prices import Prices

__all__ = ["DIGITAL", "State"]

DIGITAL = -1


def tiles_of(operation: Operation, hardware: Hardware) -> int:
    """Tiles that one weight-stationary operation takes."""
    fabric = hardware.for_layer(operation.path)
    bias = operation.bias and fabric.bias_row
    return fabric.tiles(operation.rows, operation.cols, operation.groups, operation.positions, bias)


class State:
    """Homes, loads, cost and order of a partition. `attempt` changes it, or leaves it as it was."""

    def __init__(
        self,
        graph: OperationGraph,
        hardware: Hardware,
        kinds: Collection[str],
        rejected: Collection[str],
        draws: bool = True,
        digital_drive: bool = False,
        prices: Prices | None = None,
    ) -> None:
        operations = graph.operations
        number = {op.name: index for index, op in enumerate(operations)}
        sources = {**number, **{name: len(number) + index for index, name in enumerate(graph.inputs)}}
        count = len(operations)
        self.size = count
        self.prices = prices
        """Energies whose sum is the cost; None counts conversions."""
        self.digital_drive = digital_drive
        """Whether an activation of a value from outside of its block may be a state of it (see `rules`)."""
        self.values = [op.values for op in operations] + list(graph.inputs.values())
        self.reads = [tuple(sources[name] for name in dict.fromkeys(op.inputs)) for op in operations]
        self.operands = [tuple(u for u in reads if u < count) for reads in self.reads]
        self.readers: list[list[int]] = [[] for _ in sources]
        for index, reads in enumerate(self.reads):
            for u in reads:
                self.readers[u].append(index)
        needs = graph.needs(draws)
        self.needs = [tuple(number[name] for name in needs[op.name] if name in number) for op in operations]
        """Operation -> the operations that run before it: its operands, and with `draws` the draw before it."""
        self.followers: list[list[int]] = [[] for _ in operations]
        """The inverse of `needs`."""
        for index, before in enumerate(self.needs):
            for u in before:
                self.followers[u].append(index)
        leaving = {number[name] for name in graph.outputs if name in number}
        self.output = [index in leaving for index in range(count)]
        self.layer = [op.role is Role.WEIGHT and op.name not in rejected for op in operations]
        self.joins = [
            op.name not in rejected and (op.role is Role.ACTIVATION or (op.role is Role.WIRING and op.kind in kinds))
            for op in operations
        ]
        self.activation = [op.role is Role.ACTIVATION for op in operations]
        self.read_once = [len(self.readers[index]) == 1 and not self.output[index] for index in range(count)]
        """Operations whose value only one operation reads. A layer's product must reach an activation through these."""
        self.passes_on = [op.kind in ("reshape", *ALWAYS_JOIN) for op in operations]
        """Operations at the edge of a block that save it nothing."""
        self.weight = [
            (1, tiles_of(op, hardware), op.values) if self.layer[index] else (0, 0, 0)
            for index, op in enumerate(operations)
        ]
        self.capacity = tuple(
            float("inf") if limit is None else limit
            for limit in (hardware.layers_per_block, hardware.tiles_per_core, hardware.neurons_per_block)
        )
        self.home = [DIGITAL] * count
        self.count: list[dict[int, int]] = [{DIGITAL: len(r)} if r else {} for r in self.readers]
        self.load: dict[int, tuple[int, int, int]] = {}
        self.total = 0 if prices is None else sum(prices.digital)
        self.order = list(range(count))
        self.position = list(range(count))
        self.activations: dict[int, set[int]] = {}
        """The activations of each block, if some may be driven."""
        self.span: dict[int, tuple[int, int]] = {}
        """First and last position of each block in the order."""
        self.journal: list[tuple[int, int]] = []
        """(operation, home before) of every accepted change, for `rollback`."""
        self.unused = 0
        self.work = 0
        """Number of operations visited since the start, a clock that is the same on every machine."""

    # -- reading -----------------------------------------------------------------------------

    def price(self, u: int) -> int:
        """Conversions of one value, or the energy of them and of the operation."""
        readers = self.count[u]
        home = self.home[u] if u < self.size else DIGITAL
        entering, leaving = len(readers) - (DIGITAL in readers), 0
        if home != DIGITAL:
            within = readers.get(home, 0)
            leaving = int(self.output[u] or within < len(self.readers[u]))
            entering -= within > 0
        if self.prices is None:
            return (entering + leaving) * self.values[u]
        own = self._own_price(u, home, self.prices) if u < self.size else 0
        return (entering * self.prices.dac + leaving * self.prices.adc) * self.values[u] + own

    def _own_price(self, u: int, home: int, prices: Prices) -> int:
        """Energy of an operation in its home."""
        if home == DIGITAL:
            return prices.digital[u]
        if not self.layer[u]:
            return 0
        reads_states = any(self.home[w] == home for w in self.operands[u])
        return prices.inner[u] if reads_states else prices.outer[u]

    def members(self, block: int) -> list[int]:
        """Operations of a block, in the order."""
        first, last = self.span[block]
        return self.order[first : last + 1]

    def objective(self) -> tuple[int, int]:
        """(conversions or energy, blocks)."""
        return self.total, len(self.load)

    def fits(self, block: int) -> bool:
        """Whether a block is within capacity. A single layer always is, since larger ones were refused before."""
        load = self.load.get(block)
        if load is None:
            return True
        driven = self._driven_values(block)
        if load[0] <= 1 and not driven:
            return True
        neurons = load[2] + driven
        return load[0] <= self.capacity[0] and load[1] <= self.capacity[1] and neurons <= self.capacity[2]

    def _driven_values(self, block: int) -> int:
        """Neurons of a block that a digital value drives. They are counted only if neurons are limited."""
        if not self.digital_drive or self.capacity[2] == float("inf"):
            return 0
        return sum(self.values[v] for v in self.activations.get(block, ()) if self.driven(v))

    def may_merge(self, first: int, second: int) -> bool:
        """Whether two blocks are within capacity together."""
        a, b = self.load[first], self.load[second]
        return all(x + y <= limit for x, y, limit in zip(a, b, self.capacity, strict=True))

    def fed(self, v: int) -> bool:
        """Whether an operation may be in its block: a layer, a state that `rules` allow, or wiring after one."""
        home = self.home[v]
        if self.layer[v]:
            return True
        if self.activation[v]:
            return self._owns_layer(v) or self.driven(v)
        return any(self.home[u] == home for u in self.operands[v])

    def _owns_layer(self, v: int) -> bool:
        """Whether a layer of the block reaches this activation of it and nothing else (see `rules`)."""
        home, stack = self.home[v], list(self.operands[v])
        self.work += 1
        while stack:
            u = stack.pop()
            if self.home[u] != home or not self.read_once[u] or self.activation[u]:
                continue
            if self.layer[u]:
                return True
            stack.extend(self.operands[u])
        return False

    def driven(self, v: int) -> bool:
        """Whether an activation is a state that a digital value drives and that only layers of its block read."""
        home = self.home[v]
        if not self.digital_drive or any(self.home[u] == home for u in self.operands[v]):
            return False
        stack = [v]
        self.work += 1
        while stack:
            inside = [w for w in self.readers[stack.pop()] if self.home[w] == home]
            if not inside:
                return False
            for w in inside:
                if self.layer[w]:
                    continue
                if self.activation[w] or len(self.reads[w]) != 1:
                    return False
                stack.append(w)
        return True

    def states_behind(self, v: int) -> list[int]:
        """The activations of blocks whose values reach an operation directly, or through wiring of blocks alone."""
        found: dict[int, None] = {}
        seen, stack = {v}, [v]
        while stack:
            for u in self.operands[stack.pop()]:
                if self.home[u] == DIGITAL or self.layer[u] or u in seen:
                    continue
                seen.add(u)
                if self.activation[u]:
                    found[u] = None
                else:
                    stack.append(u)
        return list(found)

    def new_block(self) -> int:
        """A number that no block has."""
        self.unused += 1
        return self.unused - 1

    def start(self) -> None:
        """After the first homes were `put`, make operations digital that no layer feeds, and order everything."""
        done = [(v, DIGITAL) for v in range(self.size) if self.home[v] != DIGITAL]
        self._drop_unfed(done, {})
        if self.size and not self._sort(0, self.size - 1):
            raise PlanError("the construction made a cycle: this is a defect of the compiler, please report the model")

    # -- changing ----------------------------------------------------------------------------

    def put(self, v: int, home: int) -> None:
        """Change one home, and the cost and loads with it, but not the order."""
        old = self.home[v]
        self.work += 1
        reads = self.reads[v]
        behind = [] if self.prices is None else [w for w in self.readers[v] if self.layer[w]]
        total = self.total - self.price(v) - sum(map(self.price, behind))
        for u in reads:
            total -= self.price(u)
            readers = self.count[u]
            left = readers[old] - 1
            if left:
                readers[old] = left
            else:
                del readers[old]
            readers[home] = readers.get(home, 0) + 1
        self.home[v] = home
        for u in reads:
            total += self.price(u)
        self.total = total + self.price(v) + sum(map(self.price, behind))
        if self.digital_drive and self.activation[v]:
            self.activations.get(old, set()).discard(v)
            self.activations.setdefault(home, set()).add(v)
        if self.layer[v]:
            one, tiles, neurons = self.weight[v]
            if old != DIGITAL:
                load = self.load[old]
                if load[0] == 1:
                    del self.load[old]
                else:
                    self.load[old] = (load[0] - one, load[1] - tiles, load[2] - neurons)
            if home != DIGITAL:
                load = self.load.get(home, (0, 0, 0))
                self.load[home] = (load[0] + one, load[1] + tiles, load[2] + neurons)

    def attempt(
        self,
        changes: Iterable[tuple[int, int]],
        slack: int | None = None,
        close: bool = False,
        worst_window: int = 1 << 62,
    ) -> bool:
        """Change homes if the result is sound and better. Otherwise change nothing.

        Args:
            changes: (operation, new home).
            slack: accept up to this many conversions more, with any number of blocks. None accepts only
                improvements: fewer conversions, or equally many in fewer blocks.
            close: let operations join a changed block that lie on a path out of it and back into it.
            worst_window: give up if more operations than this would have to be sorted again.

        Returns:
            Whether it was done. The changes are at the end of `journal`.
        """
        before = self.objective()
        done: list[tuple[int, int]] = []
        touched: dict[int, None] = {}
        self._apply(changes, done, touched)
        self._drop_unfed(done, touched)
        if not all(self.fits(block) for block in touched) or not self._is_accepted(before, slack):
            return self._undo(done)
        window = self._window(done, touched)
        if window is None:
            return self._undo(done)
        if window[1] - window[0] >= worst_window:
            return self._undo(done)
        if not self._sort(*window):
            if not close or not self._close_cycles(done, touched, window) or not self._is_accepted(before, slack):
                return self._undo(done)
            window = self._window(done, touched) or window
            if not all(self.fits(block) for block in touched) or not self._sort(*window):
                return self._undo(done)
        self._forget(touched)
        self.journal.extend(done)
        return True

    def rollback(self, mark: int) -> None:
        """Undo every change since the journal had this length."""
        done = self.journal[mark:]
        if not done:
            return
        touched = {home: None for v, old in done for home in (old, self.home[v])}
        window = self._window(done, touched)
        self._undo(done)
        del self.journal[mark:]
        if window is None or not self._sort(*window):
            raise AssertionError("the partition that is returned to was acyclic")
        self._forget(touched)

    def _forget(self, touched: Iterable[int]) -> None:
        for block in touched:
            if block not in self.load:
                self.span.pop(block, None)

    def _apply(self, changes: Iterable[tuple[int, int]], done: list[tuple[int, int]], touched: dict[int, None]) -> None:
        for v, home in changes:
            old = self.home[v]
            if old != home:
                touched[old] = touched[home] = None
                done.append((v, old))
                self.put(v, home)

    def _undo(self, done: list[tuple[int, int]]) -> bool:
        for v, old in reversed(done):
            self.put(v, old)
        return False

    def _is_accepted(self, before: tuple[int, int], slack: int | None) -> bool:
        return self.objective() < before if slack is None else self.total <= before[0] + slack

    def _drop_unfed(self, done: list[tuple[int, int]], touched: dict[int, None]) -> None:
        """Make operations digital that have lost the layer which fed them."""
        stack = [v for changed, _ in done for v in (changed, *self.readers[changed])]
        if self.digital_drive:  # a driven state depends on its readers, too
            stack += [v for changed, _ in done for v in self.states_behind(changed)]
        while stack:
            v = stack.pop()
            if self.home[v] == DIGITAL:
                continue
            if not self.fed(v):
                behind = self.states_behind(v) if self.digital_drive else []
                self._apply([(v, DIGITAL)], done, touched)
                stack.extend((*self.readers[v], *behind))
            elif self.read_once[v] and not self.layer[v] and not self.activation[v]:
                stack.extend(self.readers[v])  # the activation after the wiring may have lost its layer

    def _window(self, done: list[tuple[int, int]], touched: dict[int, None]) -> tuple[int, int] | None:
        if not done:
            return None
        places = [self.position[v] for v, _ in done]
        for block in touched:
            if block in self.span:
                places.extend(self.span[block])
        return min(places), max(places)

    def _graph(self, window: list[int], low: int, high: int) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
        """The operations of each place in a window, and the places that follow each one (with repetitions)."""
        home, position = self.home, self.position
        groups: dict[int, list[int]] = {}
        followers: dict[int, list[int]] = {}
        for v in window:
            place = home[v] if home[v] != DIGITAL else -2 - v
            groups.setdefault(place, []).append(v)
            for u in self.needs[v]:
                if low <= position[u] <= high:
                    origin = home[u] if home[u] != DIGITAL else -2 - u
                    if origin != place:
                        followers.setdefault(origin, []).append(place)
        self.work += len(window)
        return groups, followers

    def _sort(self, low: int, high: int) -> bool:
        """Sort a window of the order again; False if it holds a cycle."""
        window = self.order[low : high + 1]
        groups, followers = self._graph(window, low, high)
        missing = dict.fromkeys(groups, 0)
        for places in followers.values():
            for place in places:
                missing[place] += 1
        heap = [(self.position[group[0]], place) for place, group in groups.items() if not missing[place]]
        heapq.heapify(heap)
        result: list[int] = []
        spans = {}
        while heap:
            _, place = heapq.heappop(heap)
            spans[place] = (low + len(result), low + len(result) + len(groups[place]) - 1)
            result.extend(groups[place])
            for follower in followers.get(place, ()):
                missing[follower] -= 1
                if not missing[follower]:
                    heapq.heappush(heap, (self.position[groups[follower][0]], follower))
        if len(result) < len(window):
            return False
        self.order[low : high + 1] = result
        for index, v in enumerate(result, low):
            self.position[v] = index
        for place, span in spans.items():
            if place >= 0:
                self.span[place] = span
        return True

    def _close_cycles(self, done: list[tuple[int, int]], touched: dict[int, None], window: tuple[int, int]) -> bool:
        """Let the operations on a cycle through a changed block join it; False if one may not join."""
        low, high = window
        groups, followers = self._graph(self.order[low : high + 1], low, high)
        back: dict[int, list[int]] = {}
        for origin, places in followers.items():
            for place in places:
                back.setdefault(place, []).append(origin)
        for block in [b for b in touched if b >= 0 and b in groups]:
            between = _reached(block, followers) & _reached(block, back)
            for place in sorted(between, reverse=True):
                if place >= 0 or not self.joins[-2 - place]:
                    return False
                self._apply([(-2 - place, block)], done, touched)
            if between:
                self._drop_unfed(done, touched)
        return True


def _reached(start: int, edges: dict[int, list[int]]) -> set[int]:
    found: set[int] = set()
    stack = list(edges.get(start, ()))
    while stack:
        place = stack.pop()
        if place != start and place not in found:
            found.add(place)
            stack.extend(edges.get(place, ()))
    return found
