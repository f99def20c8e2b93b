"""Order of state: reads and writes of a norm's running statistics keep the source's order.

A batch norm or instance norm writes its statistics while it runs, so that its operands do not tell what has to run
before it. The order counts where the forward calls one norm several times, or reads or writes its statistics itself.

- A norm updates the buffer itself, even where the forward has written a value into it before.
- What reads a statistic after a norm reads it there (`ReadState`), and what reads it before reads a copy.
- All these operations carry a mark. `annotate` puts them into the chain of the operations that draw random numbers,
  and `lower` lets those that depend on parameters alone run first.

Promise: every operation reads the statistics that the source's reads. A graph whose norms are called once, and whose
statistics nothing else touches, is not changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable

import torch
from torch import fx, nn

from ffebm_compiler.errors import UnsupportedError
from ffebm_compiler.ir import Pass, Program
from ffebm_compiler.passes.static import static_nodes
from ffebm_compiler.runtime.feedforward.blocks import ReboundBatchNorm, ReboundInstanceNorm
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch
from ffebm_compiler.runtime.feedforward.state import ReadState, WriteState

__all__ = ["IN_ORDER", "RUNS_FIRST", "order_of_state"]

IN_ORDER = "ffebm_in_order"
"""Meta key of an operation that reads or writes state and must keep its place among those that do."""
RUNS_FIRST = "ffebm_runs_first"
"""Meta key of an operation that depends on parameters alone and must run before any norm."""

_STATISTICS = slice(3, 5)
"""The operands of a norm that are its running mean and variance."""
_BY_INPUT = 5
"""The operand of torch's own norms that says whether they update them."""


@Pass
def order_of_state(program: Program) -> Program:
    """Keep the order of what reads and writes the running statistics of the norms."""
    _Order(program).run()
    return program


class _Order:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.static = static_nodes(program)
        self.counters = self._counters()
        self.made = 0

    def _counters(self) -> dict[nn.Module, fx.Node]:
        """Norm of the source -> the placeholder of its counter of batches, if the forward reads or writes it."""
        places = {self.program.lifted[node.name]: node for node in self.graph.nodes if node.name in self.program.lifted}
        named = ((f"{path}.num_batches_tracked".lstrip("."), one) for path, one in self.program.source.named_modules())
        return {module: places[name] for name, module in named if name in places}

    def run(self) -> None:
        for graph_module in self._graphs():
            for node in graph_module.graph.nodes:
                if _is_norm(graph_module, node):
                    _write_to_the_state(graph_module, node)
        names: dict[fx.Node, list[fx.Node]] = {}
        for node in self.graph.nodes:
            for state in self._updated(node):
                names[state] = []
        for node in self.graph.nodes if names else ():
            behind = _state_behind(self.program.graph_module, node)
            if behind is not None and behind in names:
                names[behind].append(node)
        for state, handed_on in names.items():
            self._put_in_order(state, handed_on)
        self.graph.lint()
        self.program.graph_module.recompile()

    def _graphs(self) -> Iterable[fx.GraphModule]:
        yield self.program.graph_module
        for module in self.program.graph_module.children():
            if isinstance(module, ModeSwitch):
                yield from (module.evaluation, module.training_part)

    def _updated(self, node: fx.Node) -> list[fx.Node]:
        """The statistics that the norms of a node update."""
        module = self._module(node)
        given = [node.args[place] for place in _updated_operands(module)] if isinstance(module, ModeSwitch) else []
        if _is_norm(self.program.graph_module, node):
            given = list(node.args[_STATISTICS])
        parts = () if module is None else module.modules()
        norms = [one for one in parts if isinstance(one, ReboundBatchNorm) and one.counts]
        given += [self.counters[norm.owner] for norm in norms if norm.owner in self.counters]
        return [one for one in given if isinstance(one, fx.Node) and one.op == "placeholder"]

    def _put_in_order(self, state: fx.Node, names: list[fx.Node]) -> None:
        """Put everything that reads or writes one statistic in order. `names` are the nodes that hand it on."""
        users = {user for name in names for user in name.users if user not in names or self._writes(user, state)}
        norms = [node for node in self.graph.nodes if state in self._updated(node)]
        users.update(norms)
        if len(users) < 2:
            return
        self._refuse_pieces(state, users, norms)
        last: fx.Node | None = None
        read: fx.Node | None = None
        for user in sorted(users):
            if self._writes(user, state):
                self._put_write_in_order(user, state, last)
                last, read = user if user in norms or last is not None or user not in self.static else None, None
            elif last is None:
                self._read_first(user, state, norms)
            elif user not in self.static and [name for name in user.all_input_nodes if name in names] == [state]:
                user.meta[IN_ORDER] = True
            else:
                read = read or self._read_after(state, last)
                for name in names:
                    if name < last:
                        user.replace_input_with(name, read)

    def _refuse_pieces(self, state: fx.Node, users: Iterable[fx.Node], norms: list[fx.Node]) -> None:
        """Refuse a norm that one mode alone calls, and whose statistics one mode alone writes.

        They are pieces of a difference of the modes, whose order is that of their values.
        """
        switches = {user: module for user in users if isinstance(module := self._module(user), ModeSwitch)}
        called = [switch for switch in switches if switch in norms]
        wrote = [
            switch
            for switch, module in switches.items()
            if state in switch.args and switch.args.index(state) in _written_operands(module)
        ]
        if called and set(wrote) - set(called):
            name = self.program.lifted.get(state.name, state.name)
            raise UnsupportedError(
                f"one mode alone calls the norm {name.rpartition('.')[0]!r} and writes its statistic {name!r} besides, "
                "and their order is not kept: call it in both modes, or write its statistics outside of the forward"
            )

    def _module(self, node: fx.Node) -> nn.Module | None:
        return _module(self.program.graph_module, node)

    def _writes(self, node: fx.Node, state: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, WriteState):
            return _state_behind(self.program.graph_module, node) is state
        if isinstance(module, ModeSwitch) and module.writes and state in node.args:
            place = node.args.index(state)
            return place in _updated_operands(module) or place in _written_operands(module)
        return state in self._updated(node)

    def _put_write_in_order(self, node: fx.Node, state: fx.Node, last: fx.Node | None) -> None:
        node.meta[IN_ORDER] = True
        if last is None and node in self.static:
            node.meta[RUNS_FIRST] = True
        if last is None or node not in self.static:
            return
        if isinstance(self._module(node), WriteState):
            node.args = (*node.args, last)
        else:
            node.replace_input_with(state, self._read_after(state, last, live=True))
        self.static -= {node, *_static_followers(node, self.static)}

    def _read_first(self, user: fx.Node, state: fx.Node, norms: list[fx.Node]) -> None:
        """Let a read come before the norms."""
        if user not in self.static:
            user.meta[IN_ORDER] = True
        elif user.target is torch.ops.aten.clone.default:
            user.meta[RUNS_FIRST] = True
        elif any(user < norm for norm in norms) and state in user.all_input_nodes:
            with self.graph.inserting_before(user):
                copy = self.graph.call_function(torch.ops.aten.clone.default, (state,))
            copy.meta = {**state.meta, RUNS_FIRST: True}
            user.replace_input_with(state, copy)
            self.static.add(copy)

    def _read_after(self, state: fx.Node, last: fx.Node, live: bool = False) -> fx.Node:
        """The state after an operation: the state itself, or a copy of its value then."""
        name = f"read_state_{self.made}"
        self.made += 1
        self.program.graph_module.add_submodule(name, ReadState(self.program.lifted.get(state.name, state.name), live))
        with self.graph.inserting_after(last):
            fresh = self.graph.call_module(name, (state, last))
        fresh.meta = {"nn_module_stack": last.meta.get("nn_module_stack", {}), "val": state.meta["val"], IN_ORDER: True}
        return fresh


def _is_norm(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may update running statistics: by a module's flag, or in both modes."""
    if node.target in (torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default):
        return bool(node.args[_BY_INPUT])
    return isinstance(_module(graph_module, node), ReboundBatchNorm | ReboundInstanceNorm)


def _module(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _static_followers(node: fx.Node, static: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(node.users)
    while pending:
        user = pending.pop()
        if user in static and user not in found:
            found.add(user)
            pending.extend(user.users)
    return found


def _write_to_the_state(graph_module: fx.GraphModule, norm: fx.Node) -> None:
    """Let a norm update the buffer itself, not the value that was written into it before."""
    statistics = [
        (_state_behind(graph_module, node) or node) if isinstance(node, fx.Node) else node
        for node in norm.args[_STATISTICS]
    ]
    norm.args = (*norm.args[: _STATISTICS.start], *statistics, *norm.args[_STATISTICS.stop :])


def _state_behind(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The placeholder of the state that a node hands on: as it is, or after a write to it."""
    if node.op == "placeholder":
        return node
    module = _module(graph_module, node)
    if isinstance(module, WriteState):
        return _state_behind(graph_module, node.args[0])  # type: ignore[arg-type]
    index, call = None, node
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        call, index = node.args[0], int(node.args[1])  # type: ignore[arg-type]
        module = _module(graph_module, call)
    if not isinstance(module, ModeSwitch):
        return None
    states = {_operand_behind(part, index, call) for part in (module.evaluation, module.training_part)}
    (state,) = states if len(states) == 1 else (None,)
    return None if state is None else _state_behind(graph_module, state)


def _operand_behind(part: fx.GraphModule, index: int | None, call: fx.Node) -> fx.Node | None:
    """The operand of a mode switch that one of its results hands on."""
    result = next(node for node in part.graph.nodes if node.op == "output").args[0]
    value = result if index is None else result[index]
    inner = _state_behind(part, value) if isinstance(value, fx.Node) else None
    return None if inner is None else call.args[_placeholders(part).index(inner)]  # type: ignore[return-value]


def _placeholders(part: fx.GraphModule) -> list[fx.Node]:
    return [node for node in part.graph.nodes if node.op == "placeholder"]


def _updated_operands(module: ModeSwitch) -> set[int]:
    """The operands of a mode switch that its norms update."""
    return _places(module, _is_norm, _STATISTICS)


def _written_operands(module: ModeSwitch) -> set[int]:
    """The operands of a mode switch that it writes to."""
    return _places(module, lambda part, node: isinstance(_module(part, node), WriteState), slice(0, 1))


def _places(module: ModeSwitch, writes: Callable[[fx.GraphModule, fx.Node], bool], written: slice) -> set[int]:
    found = set()
    for part in (module.evaluation, module.training_part):
        given = _placeholders(part)
        for node in part.graph.nodes:
            if writes(part, node):
                found |= {given.index(state) for state in node.args[written] if state in given}
    return found
