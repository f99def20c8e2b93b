"""Random networks on random fabrics: the hybrid without feedback computes what the source computes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import networkx
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware

WIDTHS = (3, 4, 8)
INPUT = 6
SAME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "flip": lambda value: value.flip(-1),
    "softmax": lambda value: value.softmax(-1),
    "norm": lambda value: nn.functional.layer_norm(value, value.shape[-1:]),
}

Step = tuple[str, int, int, int]
"""Kind, the number of the value that it reads, of a second one, and a width; numbers count back from the newest."""

steps = st.lists(
    st.tuples(
        st.sampled_from(["linear", "linear", "linear", "again", "relu", "tanh", "add", "concat", "product", *SAME]),
        st.integers(0, 3),
        st.integers(0, 5),
        st.sampled_from(WIDTHS),
    ),
    min_size=1,
    max_size=14,
)
own = st.fixed_dictionaries({}, optional={"tile_rows": st.sampled_from([None, 4]), "bias_row": st.booleans()})
hardwares = st.builds(
    Hardware,
    tile_rows=st.sampled_from([None, 3, 4, 8]),
    tile_cols=st.sampled_from([None, 4, 8]),
    tiles_per_core=st.sampled_from([None, 2, 4, 16]),
    layers_per_block=st.sampled_from([None, 1, 2, 4]),
    neurons_per_block=st.sampled_from([None, None, 8, 24]),
    cores=st.sampled_from([None, None, None, 1, 3]),
    devices_per_weight=st.integers(1, 2),
    bias_row=st.booleans(),
    overrides=st.none() | st.fixed_dictionaries({"layers.0": own.filter(bool)}),
)


class Random(nn.Module):
    """The network that a list of steps describes; what nothing reads is its output."""

    def __init__(self, described: list[Step]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(INPUT, WIDTHS[0])])
        self.steps: list[tuple[str, int, int, int]] = [("layer", 0, 0, 0)]
        widths = [INPUT, WIDTHS[0]]
        for kind, first, second, width in described:
            a, b = (max(0, len(widths) - 1 - back) for back in (first, second))
            detail = 0
            if kind in ("add", "product"):
                # The newest value but `second` of equal width; the value itself where there is no other.
                equal = [index for index, size in enumerate(widths) if size == widths[a]]
                b = equal[-1 - second % len(equal)]
            if kind in ("linear", "again"):
                fitting = [i for i, layer in enumerate(self.layers) if layer.in_features == widths[a]]
                if kind == "linear" or not fitting:
                    self.layers.append(nn.Linear(widths[a], width, bias=second % 2 == 0))
                    fitting = [len(self.layers) - 1]
                kind, detail = "layer", fitting[-1]
            self.steps.append((kind, a, b, detail))
            out = self.layers[detail].out_features if kind == "layer" else widths[a]
            widths.append(int(out) + (widths[b] if kind == "concat" else 0))
        read = {a for _, a, _, _ in self.steps}
        read |= {b for kind, _, b, _ in self.steps if kind in ("add", "product", "concat")}
        self.leaves = [index for index in range(1, len(widths)) if index not in read]

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        values = [x]
        for kind, a, b, detail in self.steps:
            values.append(self.value(kind, values[a], values[b], detail))
        return [values[index] for index in self.leaves]

    def value(self, kind: str, a: torch.Tensor, b: torch.Tensor, detail: int) -> torch.Tensor:
        if kind == "layer":
            layer: torch.Tensor = self.layers[detail](a)
            return layer
        if kind == "add":
            return a + b
        if kind == "product":
            return a * b
        return torch.cat([a, b], -1) if kind == "concat" else SAME[kind](a)


def run_layers(model: nn.Module, x: torch.Tensor) -> tuple[Any, set[str]]:
    """The output, and the paths of the layers that ran, found by hooks and not by the compiler."""
    ran: set[str] = set()
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: ran.add(path))
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    with torch.no_grad():
        out = model(x)
    for hook in hooks:
        hook.remove()
    return out, ran


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    described=steps,
    hardware=hardwares,
    block_ops=st.sampled_from([("add", "reshape"), ("add", "concat"), ()]),
    digital_drive=st.booleans(),
)
def test_without_feedback_the_hybrid_is_the_source(
    described: list[Step], hardware: Hardware, block_ops: tuple[str, ...], digital_drive: bool
) -> None:
    torch.manual_seed(len(described))
    model, x = Random(described).double(), torch.randn(3, INPUT, dtype=torch.float64)
    expected, ran = run_layers(model, x)
    hybrid = ffebm.convert(model, x, hardware=hardware, block_ops=block_ops, feedback=1e-6, digital_drive=digital_drive)
    with torch.no_grad():
        torch.testing.assert_close(hybrid(x), expected, rtol=1e-5, atol=1e-5)
    plan = hybrid.plan
    plan.validate()
    assert ffebm.Plan.from_dict(plan.to_dict()) == plan
    assert digital_drive or not any(block.driven for block in plan.blocks)
    assert networkx.is_directed_acyclic_graph(plan.to_networkx())
    held = {layer for block in plan.blocks for layer in block.layers}
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            placement = plan.weights[f"{path}.weight"]
            assert placement.reason
            assert (placement.block is not None) == (path in held)
            assert path not in ran or path in held or plan.rejected[path]
    for block in plan.blocks:
        assert hardware.layers_per_block is None or len(block.layers) <= hardware.layers_per_block
        assert hardware.tiles_per_core is None or block.tiles <= hardware.tiles_per_core
    assert hardware.cores is None or plan.placement().cores <= hardware.cores


moves = st.lists(st.tuples(st.integers(0, 20), st.sampled_from(["digital", "analog"])), min_size=1, max_size=4)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(described=steps, hardware=hardwares, chosen=moves)
def test_moves_of_layers_beside_driven_states_are_sound(
    described: list[Step], hardware: Hardware, chosen: list[tuple[int, str]]
) -> None:
    """`move` validates what it makes; what it refuses is the move, never a plan that it made wrong."""
    plan = ffebm.plan(Random(described), torch.randn(3, INPUT), hardware=hardware, digital_drive=True)
    refused = []
    for number, where in chosen:
        layers = [layer for block in plan.blocks for layer in block.layers] + list(plan.rejected)
        try:
            plan = plan.move(layers[number % len(layers)], where)
        except ffebm.PlanError as error:
            refused.append(str(error))
    assert all(re.search("cannot move to|does not fit|cannot be analog|more than the", text) for text in refused)
    assert ffebm.Plan.from_dict(plan.to_dict()) == plan
