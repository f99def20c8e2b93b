"""Split: make one ONNX model per part of a joint model that holds independent parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ffebm_compiler.onnx.packages import IR_VERSION, package
from ffebm_compiler.onnx.steps import Value

__all__ = ["Port", "part_of"]

Port = tuple[str, Value]
"""Name of an input or output in the joint model, and its value."""


def part_of(joint: Any, name: str, inputs: Sequence[Port], outputs: Sequence[Port]) -> Any:
    """The model that computes `outputs` of a joint model from `inputs`. Both get the names of their values."""
    onnx = package("onnx")
    producers = {result: index for index, node in enumerate(joint.graph.node) for result in node.output}
    needed: set[int] = set()
    read = {source for source, _ in outputs}
    pending = list(read)
    while pending:
        index = producers.get(pending.pop())
        if index is None or index in needed:
            continue
        needed.add(index)
        for source in _reads(joint.graph.node[index]):
            if source not in read:
                read.add(source)
                pending.append(source)
    model = onnx.ModelProto(ir_version=IR_VERSION, producer_name="ffebm-compiler")
    model.opset_import.extend(joint.opset_import)
    graph = model.graph
    graph.name = name
    graph.node.extend(joint.graph.node[index] for index in sorted(needed))
    graph.initializer.extend(item for item in joint.graph.initializer if item.name in read)
    names: dict[str, str] = {}
    for source, value in inputs:
        names[source] = value.name
        graph.input.append(_info(onnx, value))
    taken = set(names.values())
    for source, value in outputs:
        graph.output.append(_info(onnx, value))
        if source in producers and source not in names and value.name not in taken:
            names[source] = value.name
            taken.add(value.name)
    _free_names(graph, names, taken)
    _rename(graph, names)
    for source, value in outputs:  # an output may be an input, a tensor or another output, which is then copied
        if names.get(source, source) != value.name:
            graph.node.append(onnx.helper.make_node("Identity", [names.get(source, source)], [value.name]))
    return model


def _free_names(graph: Any, names: dict[str, str], taken: set[str]) -> None:
    """Rename inner values whose names are needed for inputs and outputs."""
    for node in _nodes(graph):
        for result in node.output:
            if result and result not in names and result in taken:
                names[result] = f"{result}.inner"
    for item in graph.initializer:
        if item.name not in names and item.name in taken:
            names[item.name] = f"{item.name}.weight"


def _info(onnx: Any, value: Value) -> Any:
    kind = onnx.helper.np_dtype_to_tensor_dtype(value.zeros().numpy().dtype)
    return onnx.helper.make_tensor_value_info(value.name, kind, list(value.shape))


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from _nodes(inner)


def _reads(node: Any) -> set[str]:
    """Names of all values that a node reads, also in its subgraphs."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            for item in inner.node:
                found |= _reads(item)
            found |= {output.name for output in inner.output}
    return found - {""}


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for node in _nodes(graph):
        node.input[:] = [names.get(item, item) for item in node.input]
        node.output[:] = [names.get(item, item) for item in node.output]
    for item in graph.initializer:
        item.name = names.get(item.name, item.name)
