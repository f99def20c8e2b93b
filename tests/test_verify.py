"""`ir.verify` and the promises of the passes: each is broken by hand and named with its node and module."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, fx, nn

from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.hardware.fabric import Hardware
from ffebm_compiler.ir import Pass, Program, verify
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.pipeline import annotated_program, passes_for
from ffebm_compiler.plan_data import PlanOptions

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)))


def program() -> Program:
    made, _ = annotated_program(seeded(Net), (noise(2, 3, 6),), {}, PlanOptions(), "batch", Hardware())
    return made


def promised() -> list[Pass]:
    return passes_for(PlanOptions(), Hardware())


def broken(change: Callable[[Program, fx.Node], None]) -> str:
    """The text of `verify` after a change at the activation."""
    made = program()
    verify(made, [promise for step in promised() for promise in step.promises])
    relu = next(node for node in made.graph.nodes if node.target is aten.relu.default)
    with made.graph.inserting_after(relu):
        change(made, relu)
    with pytest.raises(FFEBMError) as refused:
        verify(made, [promise for step in promised() for promise in step.promises])
    return str(refused.value)


def call(made: Program, relu: fx.Node, target: object, *args: object) -> None:
    fresh = made.graph.call_function(target, (relu, *args))  # type: ignore[arg-type]
    fresh.meta = dict(relu.meta)
    relu.replace_all_uses_with(fresh, lambda user: user is not fresh)


def without_value(made: Program, relu: fx.Node) -> None:
    del relu.meta["val"]


def of_one_name(made: Program, relu: fx.Node) -> None:
    relu.name = relu.all_input_nodes[0].name


def too_early(made: Program, relu: fx.Node) -> None:
    call(made, relu, aten.tanh.default)
    relu.next.append(relu)


def same_padding(made: Program, relu: fx.Node) -> None:
    weight = next(node for node in made.graph.nodes if made.lifted.get(node.name) == "conv.weight")
    call(made, relu, aten.conv1d.padding, weight, None, [1], "same")


def batch_norm(made: Program, relu: fx.Node) -> None:
    call(made, relu, aten.batch_norm.default, None, None, None, None, False, 0.1, 1e-5, False)


def dropout(made: Program, relu: fx.Node) -> None:
    call(made, relu, aten.dropout.default, 0.5, False)
    relu.next.meta = dict(relu.all_input_nodes[0].meta)  # run by the batch norm, whose flag is bound


def submodule(made: Program, relu: fx.Node) -> None:
    made.graph_module.body = nn.Module()
    made.graph.get_attr("body").meta["val"] = relu.meta["val"]


def vmap(made: Program, relu: fx.Node) -> None:
    call(made, relu, torch._C._functorch._remove_batch_dim, 1, 2, 0)


def split_relu(made: Program, relu: fx.Node) -> None:
    last, halves = relu, []
    for start, end, target, args in ((0, 2, aten.relu.default, ()), (2, 4, aten.clamp.default, (None, 0))):
        with made.graph.inserting_after(last):
            part = made.graph.call_function(aten.slice.Tensor, (relu, 1, start, end))
        with made.graph.inserting_after(part):
            last = made.graph.call_function(target, (part, *args))
        for node in (part, last):
            node.meta = {**relu.meta, "val": relu.meta["val"][:, start:end]}
        halves.append(last)
    with made.graph.inserting_after(last):
        joined = made.graph.call_function(aten.cat.default, (halves, 1))
    joined.meta = dict(relu.meta)
    relu.replace_all_uses_with(joined, lambda user: user not in (*halves, *(half.args[0] for half in halves)))


def unread(made: Program, relu: fx.Node) -> None:
    made.graph.call_function(aten.tanh.default, (relu,)).meta.update(relu.meta)


BROKEN: dict[str, tuple[Callable[[Program, fx.Node], None], str]] = {
    "no value": (without_value, r"node 'relu' \(aten.relu.default\) has no captured value"),
    "one name": (of_one_name, r"has the name of another"),
    "order": (too_early, r"node 'tanh_default' .* uses 'relu' before it is computed"),
    "in place": (lambda made, relu: call(made, relu, aten.relu_.default), r"node 'relu__default' .* writes in place"),
    "padding": (same_padding, r"is a convolution whose padding is not symmetric"),
    "dropout": (dropout, r"follows a training flag of the source and is not bound to it"),
    "submodule": (submodule, r"node 'body' \(body\) calls a captured submodule"),
    "vmap": (vmap, r"belongs to a level of vmap"),
    "split ReLU": (split_relu, r"is a concatenation that computes a split ReLU, which is one activation"),
    "dead code": (unread, r"node 'tanh_default' .* is read by nothing and does nothing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_a_pass_ensures_is_checked_after_every_later_one(name: str) -> None:
    change, message = BROKEN[name]
    text = broken(change)
    assert re.search(message, text), text
    assert text.endswith("this is a defect of the compiler, please report the model")


def test_every_promise_is_broken_above() -> None:
    texts = {promise.text for step in promised() for promise in step.promises}
    assert {text for text in texts if not any(text in message for _, message in BROKEN.values())} == set()


def test_a_capture_is_verified_too() -> None:
    made = capture(seeded(Net), (noise(2, 3, 6),), {})
    verify(made)
    made.lifted["another"] = "conv.weight"
    with pytest.raises(FFEBMError, match=r"placeholders .* do not match the program's inputs"):
        verify(made)


def test_a_graph_has_one_output_at_its_end() -> None:
    made = program()
    output = next(node for node in made.graph.nodes if node.op == "output")
    with made.graph.inserting_after(output):
        made.graph.output(output.args[0])
    with pytest.raises(FFEBMError, match="the graph does not end with its one output"):
        verify(made)
