"""Store and rebuild the example inputs of a hybrid: how they are nested, with shapes and dtypes instead of values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from ffebm_compiler.files.checked_json import AtLeast, Malformed, parse_json, short, typed
from ffebm_compiler.passes.containers import Form
from ffebm_compiler.stored_containers import recipe_from, stored_recipe

__all__ = ["MOST_VALUES", "check_described", "described", "example_inputs"]

MOST_VALUES = 1 << 28
"""The largest number of values in all example inputs together (1 GiB of float32). More are not built."""
_DEPTH = 64
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float16", "bfloat16", "float32", "float64", "complex64", "complex128",
        "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool",
    )
}  # fmt: skip


@dataclass(frozen=True)
class _Node:
    type: str | None
    context: Any
    children_spec: tuple[Any, ...]


def described(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of a tensor, the value of anything else."""
    if not isinstance(leaf, Tensor):
        return {"value": leaf}
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}


def _nesting_from(structure: str, place: str) -> pytree.TreeSpec:
    """The nesting of (args, kwargs) that `torch.utils._pytree.treespec_dumps` wrote.

    It may name containers that are registered with torch's pytree, but no class that would have to be imported.

    Raises:
        Malformed: the text has another form, or names a class that is not registered.
    """
    try:
        form = typed(tuple[int, _Node], parse_json(structure), place)
    except Malformed as error:
        raise Malformed(f"{place}: {error}") from error
    _check_node(form[1], place, 0)
    try:
        return pytree.treespec_loads(structure)
    except Exception as error:  # each container reads its context with its own code
        raise Malformed(f"{place} is no nesting of inputs ({type(error).__name__}, {error})") from error


def _check_node(node: _Node, place: str, depth: int) -> None:
    if depth > _DEPTH:
        raise Malformed(f"{place}: it is nested more than {_DEPTH} deep")
    if node.type is not None and node.type not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise Malformed(f"{place} names the container {short(node.type)}, which is not registered with torch's pytree")
    if node.type == "collections.defaultdict" or (isinstance(node.context, str) and "__enum__" in node.context):
        raise Malformed(f"{place} names a class to import, of a defaultdict or an enumeration: pass an ordinary dict")
    for index, child in enumerate(node.children_spec):
        inside = f"{place}.children_spec[{index}]"
        _check_node(typed(_Node, child, inside), inside, depth + 1)


def example_inputs(
    structure: str,
    leaves: tuple[Mapping[str, Any], ...],
    containers: Mapping[str, Any] | None,
    place: str,
    device: torch.device | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of zeros of the described shapes.

    Raises:
        Malformed: the first three arguments describe no inputs, or very large ones.
        InputError: the class of a container was not imported.
    """
    form = Form(check_described(structure, leaves, place), recipe_from(containers, f"{place}.containers"))
    values = [
        leaf["value"] if "value" in leaf else torch.zeros(leaf["shape"], dtype=_DTYPES[leaf["dtype"]], device=device)
        for leaf in leaves
    ]
    try:
        made = form.build(values)
        again = Form.of(made)[1]
        same = again.spec == form.spec and stored_recipe(again.recipe) == containers
    except Exception as error:  # each container is built by its own code
        raise Malformed(f"the inputs of {place} cannot be built ({type(error).__name__}, {error})") from error
    if not same or type(made) is not tuple or len(made) != 2:
        raise Malformed(f"{place}.structure: expected positional and named inputs, (args, kwargs)")
    args, kwargs = made
    if type(args) is not tuple or type(kwargs) is not dict or not all(isinstance(name, str) for name in kwargs):
        raise Malformed(f"{place}.structure: expected a tuple of positional inputs and a dict of named ones")
    return args, kwargs


def check_described(structure: str, leaves: tuple[Mapping[str, Any], ...], place: str) -> pytree.TreeSpec:
    """The nesting of described inputs, checked without building them.

    Raises:
        Malformed: the arguments describe no inputs, or very large ones.
    """
    spec = _nesting_from(structure, f"{place}.structure")
    if spec.num_leaves != len(leaves):
        raise Malformed(f"{place}.structure is of {spec.num_leaves} inputs, and {place}.leaves has {len(leaves)}")
    total = 0
    for index, leaf in enumerate(leaves):
        inside = f"{place}.leaves[{index}]"
        if set(leaf) == {"value"}:
            _check_plain(leaf["value"], f"{inside}.value")
            continue
        if set(leaf) != {"shape", "dtype"}:
            found = ", ".join(map(short, leaf)) or "nothing"
            raise Malformed(f"{inside}: expected shape and dtype, or value, got {found}")
        shape = typed(tuple[Annotated[int, AtLeast(0)], ...], leaf["shape"], f"{inside}.shape")
        if not isinstance(leaf["dtype"], str) or leaf["dtype"] not in _DTYPES:
            raise Malformed(f"{inside}.dtype: expected one of {', '.join(_DTYPES)}, got {short(leaf['dtype'])}")
        total += math.prod(max(1, size) for size in shape)
        if total > MOST_VALUES or len(shape) > _DEPTH:
            raise Malformed(f"{inside}.shape: expected at most 2^28 values in all and {_DEPTH} dimensions")
    return spec


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, str):
        typed(str, value, place)
    elif value is not None and not isinstance(value, bool | int | float):
        raise Malformed(f"{place}: expected a number, a text, true, false or null, got {short(value)}")
