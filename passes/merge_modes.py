"""Merge modes: the captures in eval and in train mode become one graph, with one plan.

Where the captures agree there is one operation. Where they differ, a `ModeSwitch` runs the
operations of one or the other, by the flag of the module whose code reads it. A random factor
that only train mode has and that depends only on a shape (stochastic depth) is a `TrainingMask`.

Promise: for each mode, the graph computes what that mode's capture computes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import fx, nn

from ffebm_compiler.ir import Pass, Program, module_path
from ffebm_compiler.module_paths import module_at
from ffebm_compiler.passes.align_modes import FLAGS, align, is_size, operands
from ffebm_compiler.passes.mode_parts import Piece, Side, is_effect, is_write, pieces_of, tensors_read
from ffebm_compiler.passes.training_mask import mask_of, rate_of
from ffebm_compiler.passes.unite_placeholders import unite_placeholders
from ffebm_compiler.runtime.feedforward.modes import ModeSwitch, TrainingMask

__all__ = ["TRAINING", "merge_modes"]

TRAINING = "ffebm_training"
"""Meta key of an operation that `rebind` handles. Its value is {index: argument in the train-mode capture}."""

Value = tuple[fx.Node | None, fx.Node | None]


@Pass
def merge_modes(program: Program) -> Program:
    """Merge `program.training`, the capture in train mode, into the graph."""
    training, program.training = program.training, None
    if training is None:
        return program
    for one in (program, training):
        one.graph.eliminate_dead_code()
    for note in training.notes:
        program.note(note)
    return _Merge(program, training).run()


class _Merge:
    def __init__(self, program: Program, training: Program) -> None:
        self.program, self.training = program, training
        self.graph = program.graph
        alignment = align(program, training, unite_placeholders(program, training))
        self.twin, self.pairs, self.differences = alignment.twin, alignment.pairs, alignment.differences
        self.index = {our: place for place, (our, _) in enumerate(self.pairs)}
        self.outputs = [next(node for node in one.graph.nodes if node.op == "output") for one in (program, training)]
        self.home: dict[fx.Node, Piece] = {}
        self.order: dict[Piece, int] = {}
        self.value: dict[Value, fx.Node] = {}
        self.crossing: dict[tuple[Piece, fx.Node], Value] = {}
        """A piece, and a value of one mode that it reads -> the value of both modes to read instead."""
        self.static: dict[fx.Node, bool] = {}
        self.made = 0

    def run(self) -> Program:
        for our, their in self.pairs:
            if our.target in FLAGS:
                our.meta[TRAINING] = {i: their.args[i] if i < len(their.args) else None for i in FLAGS[our.target]}
        same_outputs = self._same_outputs()
        joins = self._joins(same_outputs)
        pieces = self._pieces(joins)
        self._results(pieces, joins)
        if not same_outputs:
            self._read_outputs()
        ordered = sorted(self.order, key=lambda piece: (piece.place, self.order[piece]))
        for piece in ordered:
            self._build(piece)
        self._rewrite_pairs()
        self._rewrite_outputs(same_outputs)
        for difference in reversed(self.differences):
            for node in reversed(difference.evaluation):
                if not node.users:
                    self.graph.erase_node(node)
        self.graph.lint()
        return self.program

    # -- what differs --------------------------------------------------------------------------

    def _same_outputs(self) -> bool:
        """Whether both modes return the same structure, so that each leaf is one output of the graph."""
        ours, theirs = (list(node.args[0]) for node in self.outputs)
        return (
            self.program.out_spec.matches(self.training.out_spec)
            and len(ours) == len(theirs)
            and all(self._same_kind(a, b) for a, b in zip(ours, theirs, strict=True))
        )

    def _same_kind(self, ours: object, theirs: object) -> bool:
        """Whether two leaves of the outputs can be one output of the graph."""
        if not isinstance(ours, fx.Node) or not isinstance(theirs, fx.Node):
            return not isinstance(ours, fx.Node) and not isinstance(theirs, fx.Node) and ours == theirs
        return self.twin.get(theirs) is ours or (not is_size(ours) and not is_size(theirs))

    def _joins(self, same_outputs: bool) -> dict[tuple[fx.Node, fx.Node], int]:
        """Values that the modes compute differently and one pair reads -> index of the first such pair."""
        joins: dict[tuple[fx.Node, fx.Node], int] = {}
        readers = list(self.pairs)
        if same_outputs:
            readers.append((self.outputs[0], self.outputs[1]))
        for place, (our, their) in enumerate(readers):
            for a, b in zip(operands(our), operands(their), strict=True):
                if self.twin.get(b) is not a:
                    joins.setdefault((a, b), place)
        return joins

    def _is_pair(self, node: fx.Node) -> bool:
        return node in self.index or node in self.twin or node.op == "placeholder"

    def _pieces(self, joins: Iterable[tuple[fx.Node, fx.Node]]) -> list[Piece]:
        for one in (self.program, self.training):
            for node in one.graph.nodes:
                self.static[node] = (
                    node.name not in one.inputs
                    if node.op == "placeholder"
                    else not is_size(node)
                    and not _draws(node)
                    and all(self.static[operand] for operand in node.all_input_nodes)
                )
        pieces = [
            piece
            for difference in self.differences
            for piece in pieces_of(difference, list(joins), self.static, self._flag_path, self._is_pair)
        ]
        for piece in pieces:
            self.order[piece] = len(self.order)
            self.home.update(dict.fromkeys([*piece.evaluation, *piece.training], piece))
        return pieces

    def _results(self, pieces: list[Piece], joins: dict[tuple[fx.Node, fx.Node], int]) -> None:
        """Decide which values each piece hands out."""
        for (a, b), place in joins.items():
            host = max((self.home[n] for n in (a, b) if n in self.home), key=self.order.__getitem__, default=None)
            if host is None or not self._is_computed_before(a, host) or not self._is_computed_before(b, host):
                host = Piece(place, [], [])
                self.order[host] = len(self.order)
            host.results.append((a, b))
        for piece in sorted(self.order, key=lambda piece: (piece.place, self.order[piece]), reverse=True):
            self._share_read_value(piece)  # the last piece first, since what it reads an earlier one hands out
        for piece in self.order:
            for node in self._reads_from_outside(piece, 0):
                if (piece, node) not in self.crossing:
                    self._hand_out(node, None, piece)
            for node in self._reads_from_outside(piece, 1):
                if (piece, node) not in self.crossing:
                    self._hand_out(None, node, piece)

    def _reads_from_outside(self, piece: Piece, side: int) -> list[fx.Node]:
        """The values from outside that a piece reads in one mode, each once."""
        nodes = (piece.evaluation, piece.training)[side]
        wanted = [operand for node in nodes for operand in tensors_read(node, self._is_pair)]
        wanted += [value for result in piece.results if (value := result[side]) is not None]
        return [node for node in dict.fromkeys(wanted) if self.home.get(node) is not piece]

    def _share_read_value(self, piece: Piece) -> None:
        """Merge the two values that a piece reads of another piece, if each mode reads one.

        This is what one module hands to the next. Each module may then follow its own flag. `mixed_modes` tests
        whether the two are really one value.
        """
        ours, theirs = self._reads_from_outside(piece, 0), self._reads_from_outside(piece, 1)
        alone = [node for node in ours if not any(self.twin.get(other) is node for other in theirs)]
        others = [node for node in theirs if self.twin.get(node) not in ours]
        if len(alone) != 1 or len(others) != 1 or not _same_shape_and_dtype(alone[0], others[0]):
            return
        a, b = alone[0], others[0]
        homes = [self.home[node] for node in (a, b) if node in self.home]
        host = max(homes, key=lambda home: (home.place, self.order[home]), default=None)
        if (
            host is None
            or self.static[a] != self.static[b]
            or self._flag_path_of_piece(host) == self._flag_path_of_piece(piece)
        ):
            return
        if not self._is_computed_before(a, host) or not self._is_computed_before(b, host):
            return
        if (a, b) not in host.results:
            host.results.append((a, b))
        self.crossing[piece, a] = self.crossing[piece, b] = (a, b)

    def _is_computed_before(self, node: fx.Node, piece: Piece) -> bool:
        """Whether a value is computed before a piece runs."""
        if node in self.home:
            home = self.home[node]
            return home is piece or (home.place, self.order[home]) < (piece.place, self.order[piece])
        our = self.twin.get(node, node)
        return our.op == "placeholder" or self.index[our] < piece.place

    def _hand_out(self, a: fx.Node | None, b: fx.Node | None, reader: Piece | None) -> None:
        """Make a value of one mode a result of its piece if another piece reads it."""
        node = a if a is not None else b
        assert node is not None
        home = self.home.get(node)
        if home is not None and home is not reader and (a, b) not in home.results:
            home.results.append((a, b))

    def _read_outputs(self) -> None:
        for a in operands(self.outputs[0]):
            self._hand_out(a, None, None)
        for b in operands(self.outputs[1]):
            self._hand_out(None, b, None)

    # -- building ------------------------------------------------------------------------------

    def _from_evaluation(self, node: fx.Node) -> fx.Node:
        """The node of the merged graph for a value of the eval-mode capture."""
        return self.value[node, None] if node in self.home else node

    def _from_training(self, node: fx.Node) -> fx.Node:
        """The node of the merged graph for a value of the train-mode capture."""
        return self.value[None, node] if node in self.home else self.twin[node]

    def _build(self, piece: Piece) -> None:
        if not piece.results and not any(
            is_effect(one, node)
            for one, nodes in ((self.program, piece.evaluation), (self.training, piece.training))
            for node in nodes
        ):
            return
        reads = [self._operands_of(piece, 0, self._from_evaluation), self._operands_of(piece, 1, self._from_training)]
        owner = self._flag_path_of_piece(piece)
        anchor = self.pairs[piece.place][0] if piece.place < len(self.pairs) else self.outputs[0]
        masked = mask_of(piece, reads, self.training)
        given = list(dict.fromkeys(merged for side in reads for _, merged in side))
        module: nn.Module
        if masked is not None:
            rate = rate_of(masked, reads[0][0][0].meta["val"])
            module = TrainingMask(module_at(self.program.source, owner), masked, self._reason(piece), rate)
            given = [reads[0][0][1]]
        else:
            module = self._mode_switch(piece, owner, reads, given)
        name = f"mode_{self.made}"
        self.made += 1
        self.program.graph_module.add_submodule(name, module)
        with self.graph.inserting_before(anchor):
            self._call(piece, name, given)

    def _operands_of(
        self, piece: Piece, side: int, merged: Callable[[fx.Node], fx.Node]
    ) -> list[tuple[fx.Node, fx.Node]]:
        """The values that a piece reads in one mode: the node in that mode's capture, and the merged node."""
        found = []
        for node in self._reads_from_outside(piece, side):
            crossing = self.crossing.get((piece, node))
            found.append((node, merged(node) if crossing is None else self.value[crossing]))
        return found

    def _mode_switch(
        self, piece: Piece, owner: str, reads: list[list[tuple[fx.Node, fx.Node]]], given: list[fx.Node]
    ) -> ModeSwitch:
        parts, random, writes = [], False, False
        for index, (program, nodes) in enumerate(((self.program, piece.evaluation), (self.training, piece.training))):
            side = Side(program, len(given))
            for node, merged in reads[index]:
                side.bind(node, given.index(merged))
            parts.append(side.finish(nodes, [result[index] for result in piece.results], len(piece.results) == 1))
            random = random or any(_draws(node) for node in nodes)
            writes = writes or any(is_write(program, node) for node in nodes)
        linked, joined = self._other_flag_paths(piece, owner)
        owners = {path: module_at(self.program.source, path) for path in (owner, *linked)}
        others = {path: module_at(self.program.source, path) for path in joined}
        return ModeSwitch(owners, parts[0], parts[1], self._reason(piece), random, writes, others)

    def _call(self, piece: Piece, name: str, given: list[fx.Node]) -> None:
        """Call a piece's module, and note the node of each of its results."""
        call = self.graph.call_module(name, tuple(given))
        stack, values = self._module_stack(piece), [_value_of_either(result) for result in piece.results]
        if len(values) == 1:
            call.meta = {"val": values[0], "nn_module_stack": stack}
            self.value[piece.results[0]] = call
            return
        call.meta = {"val": tuple(values), "nn_module_stack": stack}
        for index, result in enumerate(piece.results):
            node = self.graph.call_function(operator.getitem, (call, index))
            node.meta = {"val": values[index], "nn_module_stack": stack}
            self.value[result] = node

    def _flag_path(self, node: fx.Node) -> str:
        """Path of the module whose flag an operation follows: the innermost one whose flag the model's code reads."""
        return self.program.asked(module_path(node))

    def _flag_path_of_piece(self, piece: Piece) -> str:
        """Path of the module whose flag a piece follows."""
        nodes = [*piece.training, *piece.evaluation]
        values = [n for result in piece.results for n in result if n is not None]
        nodes = nodes or [n for n in values if n.op != "placeholder"] or values
        return self.program.asked(_common_path([module_path(node) for node in nodes]))

    def _other_flag_paths(self, piece: Piece, owner: str) -> tuple[list[str], list[str]]:
        """Paths of the modules with other flags that a piece reads values of.

        The first list holds those whose flags must equal the piece's: each capture shows both in one mode only. The
        second list holds those whose flags are free, since only values of both modes are read of them.
        """
        homes: tuple[list[Piece], list[Piece]] = ([piece], [])
        for node in (*self._reads_from_outside(piece, 0), *self._reads_from_outside(piece, 1)):
            if node in self.home:
                homes[(piece, node) in self.crossing].append(self.home[node])
        linked, joined = (
            [self._flag_path(node) for home in held for node in (*home.evaluation, *home.training)] for held in homes
        )
        linked = [path for path in dict.fromkeys(linked) if path != owner]
        return linked, [path for path in dict.fromkeys(joined) if path != owner and path not in linked]

    def _module_stack(self, piece: Piece) -> object:
        nodes = [*piece.training, *piece.evaluation, *(n for result in piece.results for n in result if n is not None)]
        return nodes[0].meta.get("nn_module_stack", {})

    def _reason(self, piece: Piece) -> str:
        names = [_names(piece.evaluation), _names(piece.training)]
        if not any(names):
            return "it reads another value in train mode than in eval mode"
        if not names[0]:
            return f"train mode alone computes {names[1]}"
        if not names[1]:
            return f"eval mode alone computes {names[0]}"
        return f"eval mode computes {names[0]}, train mode {names[1]}"

    # -- rewriting -----------------------------------------------------------------------------

    def _rewrite_pairs(self) -> None:
        for our, their in self.pairs:
            merged = iter([self._merged_operand(a, b) for a, b in zip(operands(our), operands(their), strict=True)])
            our.args, our.kwargs = fx.map_arg((our.args, our.kwargs), _next_of(merged))

    def _merged_operand(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return a if self.twin.get(b) is a else self.value[a, b]

    def _rewrite_outputs(self, same_outputs: bool) -> None:
        ours, theirs = self.outputs
        if same_outputs:
            merged = iter([self._merged_operand(a, b) for a, b in zip(operands(ours), operands(theirs), strict=True)])
            ours.args = fx.map_arg(ours.args, lambda _: next(merged))
            return
        leaves = [fx.map_arg(leaf, self._from_evaluation) for leaf in ours.args[0]]
        later = [fx.map_arg(leaf, self._from_training) for leaf in theirs.args[0]]
        ours.args = ((*leaves, *later),)
        self.program.outputs = len(leaves)
        self.program.out_spec_in_training = self.training.out_spec


def _next_of(nodes: Iterator[fx.Node]) -> Callable[[fx.Node], fx.Node]:
    return lambda _: next(nodes)


def _same_shape_and_dtype(ours: fx.Node, theirs: fx.Node) -> bool:
    """Whether two values have the same shape and dtype."""
    a, b = ours.meta.get("val"), theirs.meta.get("val")
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and str(a.shape) == str(b.shape)
        and a.dtype is b.dtype
    )


def _draws(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _value_of_either(result: Value) -> object:
    node = result[0] if result[0] is not None else result[1]
    assert node is not None
    return node.meta.get("val")


def _names(nodes: list[fx.Node]) -> str:
    names = [
        str(node.target).split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else node.name
        for node in nodes
        if node.target is not operator.getitem
    ]
    kept = list(dict.fromkeys(names))
    return ", ".join(kept[:4]) + (", ..." if len(kept) > 4 else "")


def _common_path(paths: list[str]) -> str:
    """The innermost module path that contains all of these."""
    split = [path.split(".") if path else [] for path in paths]
    common: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)
