"""The intermediate representation, which every pass reads and writes.

Grammar. A captured network is a `Program`: a `torch.fx` graph in one dialect (ATen overloads
from `torch.export`, without in-place operations), whose placeholders are the source's
parameters, buffers, constants and inputs, in that order. Each node carries one typed record,
`NodeInfo`, under one meta key; `info(node)` reads it and `annotate` writes it.

    role        what the node is                                                 joins a block
    ----------  ---------------------------------------------------------------  --------------
    LIFTED      placeholder of a parameter, a buffer or a constant               no
    INPUT       placeholder of an input of the network                           no
    SHAPE       an integer computed from shapes; copied to where it is used      no
    STATIC      computed from parameters, buffers and constants alone            no
    WEIGHT      a map, linear in one dynamic value, by a static weight           starts or joins
    ACTIVATION  elementwise, with an energy potential                            joins
    WIRING      linear, sums no products (add, reshape, pooling, dropout, gain)  joins
    DIGITAL     everything else                                                  no
    OUTPUT      the output node                                                  no

The partition works on plain data, `OperationGraph`: the dynamic nodes (WEIGHT, ACTIVATION,
WIRING, DIGITAL) in topological order, each an `Operation` with its sizes. It knows nothing of
fx or torch, and is stored in the plan.

Invariants, checked by `verify`: nodes are in topological order, names are unique, every
operand of an operation is an input of the network or an earlier operation.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import torch
from torch import fx, nn

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.files.checked_json import AtLeast, Malformed, typed
from ffebm_compiler.module_paths import module_at

__all__ = [
    "KEY",
    "NodeInfo",
    "Operation",
    "OperationGraph",
    "Program",
    "Role",
    "info",
    "module_path",
    "set_info",
]

KEY = "ffebm"


class Role(enum.StrEnum):
    """The role of a node, as in the table at the top of this module."""

    LIFTED = "lifted"
    INPUT = "input"
    SHAPE = "shape"
    STATIC = "static"
    WEIGHT = "weight"
    ACTIVATION = "activation"
    WIRING = "wiring"
    DIGITAL = "digital"
    OUTPUT = "output"


@dataclass(frozen=True)
class NodeInfo:
    """The one record that every node of a captured graph carries."""

    role: Role
    path: str
    """Module path of the innermost module that ran the operation; `""` is the model itself."""
    reason: str
    """Why the node has its role, as a sentence fragment for people."""
    kind: str = ""
    """The kind within the role, such as linear or conv (WEIGHT), add or reshape (WIRING), relu (ACTIVATION)."""


def info(node: fx.Node) -> NodeInfo:
    """The record of an annotated node."""
    record = node.meta.get(KEY)
    if not isinstance(record, NodeInfo):
        raise FFEBMError(f"node {node.name!r} was not annotated: run the annotate pass first")
    return record


def set_info(node: fx.Node, record: NodeInfo) -> None:
    """Write a node's record."""
    node.meta[KEY] = record


def module_path(node: fx.Node) -> str:
    """Module path of the innermost module of a node, from `nn_module_stack`.

    A module that is called a second time is exported as `path@1`; the suffix is removed, since
    it is the same module.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for key, value in stack.items():
        if not key.startswith("L__self__"):
            continue
        name = value[0] if isinstance(value, tuple) else str(value)
        path = ".".join(part.split("@")[0] for part in str(name).split("."))
    return path


Count = Annotated[int, AtLeast(0)]

ALWAYS_JOIN = ("copy", "dropout", "gain")
"""Kinds of wiring that may always be inside a block, even if `block_ops` does not name them."""


@dataclass(frozen=True)
class Operation:
    """One dynamic operation of the network, as the partition sees it."""

    name: str
    role: Role
    path: str
    target: str
    """Name of the operation, e.g. `conv2d`."""
    inputs: tuple[str, ...]
    """Names of the inputs and operations that it reads, each once."""
    values: Count
    """Values per sample that it produces."""
    shape: tuple[Count | None, ...] = ()
    """Shape of its value, with None for the batch."""
    reason: str = ""
    kind: str = ""
    weights: tuple[str, ...] = ()
    """Names of the source's parameters that it reads, also through static operations."""
    rows: Count = 0
    """Rows of the weight matrix of one group."""
    cols: Count = 0
    """Columns of the weight matrix of one group."""
    groups: Count = 1
    positions: Count = 1
    """Applications of the matrix per sample: output positions of a convolution, tokens of a linear."""
    bias: bool = False
    computed: tuple[str, ...] = ()
    """Those of `weights` that it reads through a computation, not as they are."""
    product_macs: Count = 0
    """Multiply-accumulates per sample of a matrix product that is no layer, such as attention."""
    sizes: tuple[str, ...] = ()
    """Those of `inputs` of which it reads the sizes alone, not the values."""
    call: Count = 0
    """Which call of its module made it: 0 for the first."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample of a layer: rows · cols · groups · positions."""
        return self.rows * self.cols * self.groups * self.positions

    @property
    def data(self) -> tuple[str, ...]:
        """Those of `inputs` whose values it reads."""
        return tuple(name for name in self.inputs if name not in self.sizes)


@dataclass(frozen=True)
class OperationGraph:
    """The dynamic operations of a network, in topological order, with its inputs and outputs."""

    inputs: Mapping[str, Count]
    """Name of each input tensor and its values per sample."""
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    draws: tuple[str, ...] = ()
    """Operations that draw random numbers in at least one mode, or share state, in the source's order."""
    _index: dict[str, Operation] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Check the invariants."""
        known = set(self.inputs)
        for operation in self.operations:
            if operation.name in known:
                raise FFEBMError(f"operation {operation.name!r} appears twice in the graph")
            missing = [name for name in operation.inputs if name not in known]
            if missing:
                raise FFEBMError(f"operation {operation.name!r} reads {missing[0]!r} before it exists")
            known.add(operation.name)
            self._index[operation.name] = operation
        missing = [name for name in self.outputs if name not in known]
        if missing:
            raise FFEBMError(f"the output reads {missing[0]!r}, which does not exist")
        place = {operation.name: index for index, operation in enumerate(self.operations)}
        missing = [name for name in self.draws if name not in place]
        if missing:
            raise FFEBMError(f"the graph's draws name {missing[0]!r}, which is no operation of it")
        for first, second in itertools.pairwise(self.draws):
            if place[first] >= place[second]:
                raise FFEBMError(f"the graph's draws name {first!r} before {second!r}, which comes first in the graph")

    def __getitem__(self, name: str) -> Operation:
        """The operation of that name."""
        return self._index[name]

    def __contains__(self, name: object) -> bool:
        """Whether there is an operation of that name."""
        return name in self._index

    def values(self, name: str) -> int:
        """Values per sample of an operation or an input."""
        return self._index[name].values if name in self._index else self.inputs[name]

    def users(self) -> dict[str, list[str]]:
        """For each input and operation, the operations that read it."""
        users: dict[str, list[str]] = {name: [] for name in self.inputs}
        for operation in self.operations:
            users[operation.name] = []
            for name in operation.inputs:
                users[name].append(operation.name)
        return users

    def needs(self, draws: bool) -> dict[str, tuple[str, ...]]:
        """For each operation, the inputs and operations that it reads. With `draws`, also the draw before it."""
        needs = {operation.name: operation.inputs for operation in self.operations}
        if draws:
            for before, name in itertools.pairwise(self.draws):
                needs[name] = tuple(dict.fromkeys((*needs[name], before)))
        return needs

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        names = [one.name for one in fields(Operation)]
        return {
            "inputs": dict(self.inputs),
            # `asdict` would copy every value
            "operations": [{name: getattr(one, name) for name in names} for one in self.operations],
            "outputs": list(self.outputs),
            "draws": list(self.draws),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> OperationGraph:
        """The inverse of `to_dict`.

        Raises:
            FFEBMError: something is missing or malformed; names the place.
        """
        try:
            graph: OperationGraph = typed(cls, data, "graph")
        except Malformed as error:
            raise FFEBMError(f"the graph is malformed ({error})") from error
        return graph


@dataclass
class Program:
    """A captured network: the graph, and the private copy of the source that owns its tensors."""

    graph_module: fx.GraphModule
    source: nn.Module
    """A copy of the source: its parameters, buffers, names and training flags."""
    lifted: dict[str, str]
    """Placeholder name -> name of the parameter or buffer in the source."""
    constants: dict[str, torch.Tensor]
    """Placeholder name -> tensor that the source holds outside its parameters and buffers."""
    inputs: tuple[str, ...]
    """Placeholder names of the flattened inputs, in order (tensors and others)."""
    in_spec: Any
    out_spec: Any
    batch_symbol: str | None
    """The symbol of the batch size; None if it is fixed."""
    batch_hint: int
    outside: dict[str, torch.Tensor] = field(default_factory=dict)
    """Those of `constants` that require a gradient in the source, but are registered by no module."""
    functions: Any = None
    """The calls of custom functions recorded while tracing. `passes.custom_functions` puts them back."""
    training: Program | None = None
    """The capture in train mode, if the model may compute something else in it. `merge_modes` merges it."""
    asks: frozenset[str] | None = None
    """Paths of the modules whose code reads their `training` flag; None if that is unknown."""
    flags: dict[str, str] = field(default_factory=dict)
    """Path of a module whose code reads one flag, that of another module -> path of that module."""
    in_one_mode: tuple[tuple[str, ...], ...] = ()
    """Paths of modules that must be in one mode, since some code reads the flags of all of them."""
    keywords_in_order: bool = False
    """Whether the source's forward reads the order of the keywords in its `**kwargs`."""
    outputs: int | None = None
    """Number of leading outputs that belong to eval mode, if train mode returns another structure; else None.

    The outputs after these belong to train mode.
    """
    out_spec_in_training: Any = None
    refused_in_training: str = ""
    """Why the model could not be captured in train mode, or an empty text."""
    decisions: tuple[Any, ...] = ()
    """What the forward decided by sizes that are free (`passes.size_decisions`)."""
    decisions_in_training: tuple[Any, ...] = ()
    """The same in train mode."""
    folded: set[str] = field(default_factory=set)
    """Paths of the modules whose batch norm is folded. They stay as in eval mode."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the report, about what the user should know."""
    operations: OperationGraph | None = None
    """The dynamic operations with their sizes, after `annotate`."""

    @property
    def graph(self) -> fx.Graph:
        """The fx graph."""
        return self.graph_module.graph

    def note(self, sentence: str) -> None:
        """Add a sentence to the report, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def asked(self, path: str) -> str:
        """Path of the module whose `training` flag the operations at a path follow; "" is the model itself.

        It is the one whose flag is read by the code of the innermost module, at or around the path, that reads one.
        """
        if self.asks is None:
            return path
        parts = path.split(".") if path else []
        paths = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
        name = next((name for name in paths if name in self.asks or name in self.flags), "")
        return self.flags.get(name, name)

    def runner(self, node: fx.Node) -> nn.Module:
        """The module of the private copy that ran a node."""
        try:
            return module_at(self.source, module_path(node))
        except AttributeError:
            return self.source

    def is_asked(self, module: nn.Module) -> bool:
        """Whether code other than torch's own dropout and norms reads the `training` flag of a module."""
        return any(module_at(self.source, path) is module for path in self.asks or ())

    def owner(self, node: fx.Node) -> nn.Module:
        """The module of the private copy whose flag a node follows."""
        path = self.asked(module_path(node))
        try:
            return module_at(self.source, path)
        except AttributeError:
            return self.source


@dataclass(frozen=True)
class Promise:
    """A property that a pass ensures for every node, and that every later pass preserves."""

    text: str
    """What is wrong with a node that breaks it, as the end of a sentence that begins with `node ...`."""
    broken: Callable[[Program, fx.Node], bool]


@dataclass(frozen=True)
class Pass:
    """A step from program to program, with its promises."""

    run: Callable[[Program], Program]
    promises: tuple[Promise, ...] = ()

    def __call__(self, program: Program) -> Program:
        """The program after the pass."""
        return self.run(program)


def ensures(text: str, broken: Callable[[Program, fx.Node], bool]) -> Callable[[Callable[[Program], Program]], Pass]:
    """Make a function a pass with a promise: `broken` is false for every node afterwards. `text` says what it means."""
    return lambda run: Pass(run, (Promise(text, broken),))


def verify(program: Program, promises: Sequence[Promise] = ()) -> None:
    """Check the invariants of a program, and the promises of the passes so far.

    Raises:
        FFEBMError: a node breaks one; names it.
    """
    seen: set[fx.Node] = set()
    names: set[str] = set()
    nodes = list(program.graph.nodes)
    for node in nodes:
        if node.name in names:
            raise _defect(node, "has the name of another")
        names.add(node.name)
        for operand in node.all_input_nodes:
            if operand not in seen:
                raise _defect(node, f"uses {operand.name!r} before it is computed")
        seen.add(node)
        if node.op in ("call_function", "call_module") and "val" not in node.meta:
            raise _defect(node, "has no captured value (meta 'val')")
        for promise in promises:
            if promise.broken(program, node):
                raise _defect(node, promise.text)
    if [node.op for node in nodes].count("output") != 1 or nodes[-1].op != "output":
        raise FFEBMError("the graph does not end with its one output: this is a defect of the compiler, please report")
    placeholders = [node.name for node in nodes if node.op == "placeholder"]
    expected = [*program.lifted, *program.constants, *program.inputs]
    if sorted(placeholders) != sorted(expected):
        raise FFEBMError(f"placeholders {placeholders} do not match the program's inputs {expected}")


def _defect(node: fx.Node, what: str) -> FFEBMError:
    path = module_path(node)
    where = f" of module {path!r}" if path else ""
    return FFEBMError(
        f"node {node.name!r} ({node.target}){where} {what}: this is a defect of the compiler, please report the model"
    )
