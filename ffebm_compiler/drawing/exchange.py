"""A plan in the formats of other drawing tools: Graphviz's DOT and Model Explorer's JSON."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from ffebm_compiler.drawing.scene import Node, scene_of, shape_words
from ffebm_compiler.drawing.svg import COLOURS

if TYPE_CHECKING:
    from ffebm_compiler.hybrid_core import HybridCore
    from ffebm_compiler.plan_data import PlanData

__all__ = ["dot_text", "model_explorer_text"]

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def dot_text(plan: PlanData, hybrid: HybridCore | None = None) -> str:
    """The quotient DAG in DOT, which Graphviz and its relatives draw; `hybrid` adds its feedback weights.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
    """
    scene = scene_of(plan, hybrid)
    lines = [
        "digraph partition {",
        f"  label={_quoted(f'{scene.title}: {scene.totals}')}; labelloc=t; rankdir=TB;",
        '  node [fontname="Helvetica", fontsize=11]; edge [fontname="Helvetica", fontsize=9, color="#7a7a7a"];',
    ]
    lines += [f"  {_quoted(node.key)} [{_style(node)}];" for node in scene.nodes]
    for edge in scene.edges:
        label = "\n".join(part for part in (edge.shape, edge.conversion) if part)
        dashes = "" if edge.conversion else ", style=dashed"
        lines.append(f"  {_quoted(edge.source)} -> {_quoted(edge.target)} [label={_quoted(label)}{dashes}];")
    return "\n".join([*lines, "}", ""])


def _style(node: Node) -> str:
    fill, line = COLOURS[node.domain]
    shape = {"analog": "box", "digital": "box"}.get(node.domain, "oval")
    style = "rounded,filled" if node.domain == "analog" else "filled"
    double = ", peripheries=2" if node.settles else ""
    plain = ", no feedback" if node.domain == "analog" and not node.settles else ""
    title = f"{node.title} · {node.domain}{plain}" if node.domain in ("analog", "digital") else node.title
    label = "\n".join([title, *(entry.text for entry in node.lines)])
    return f'label={_quoted(label)}, shape={shape}, style="{style}", fillcolor="{fill}", color="{line}"{double}'


def _quoted(text: str) -> str:
    """A string of DOT. Backslashes and quotes in the text are escaped, and a line break becomes `\\n`."""
    pieces = [_CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece) for piece in text.split("\n")]
    return '"' + "\\n".join(piece.replace("\\", "\\\\").replace('"', '\\"') for piece in pieces) + '"'


def model_explorer_text(plan: PlanData) -> str:
    """The operations as JSON that Model Explorer opens, with block and module path as its layers.

    Raises:
        PlanError: where the plan has no operation or is cyclic.
    """
    scene = scene_of(plan)
    nodes = [
        _node(name, f"{name} · input", "", [], {"values per sample": values})
        for name, values in plan.graph.inputs.items()
    ]
    for op in plan.graph.operations:
        layers = [plan.home(op.name), *(part.replace("/", "|") for part in op.path.split(".") if part)]
        attributes = {
            "module": op.path,
            "placement": plan._explain_operation(op),
            "values per sample": op.values,
            "MACs per sample": op.macs,
            "weights": ", ".join(op.weights),
        }
        made = _node(op.name, op.target, "/".join(layers), list(op.inputs), attributes)
        made["outputsMetadata"] = [{"id": "0", "attrs": [{"key": "shape", "value": shape_words(op.shape, op.values)}]}]
        nodes.append(made)
    for index, name in enumerate(dict.fromkeys(plan.graph.outputs)):
        nodes.append(_node(f"output {index + 1}", "output", "", [name], {}))
    graph = {"id": scene.title, "nodes": nodes}
    return json.dumps({"label": scene.title, "graphs": [graph]}, indent=1, ensure_ascii=True) + "\n"


def _node(name: str, label: str, layers: str, inputs: list[str], attributes: dict[str, object]) -> dict[str, Any]:
    return {
        "id": name,
        "label": label,
        "namespace": layers,
        "incomingEdges": [
            {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
            for index, source in enumerate(inputs)
        ],
        "attrs": [{"key": key, "value": str(value)} for key, value in attributes.items() if value not in ("", 0)],
    }
