"""Networks as hypothesis draws them: vectors, images and tokens, with the layers and sizes that people forget.

A network is a list of steps, so that hypothesis can shrink one that fails, and its `repr` builds it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["DrawnNetwork", "Step", "networks"]

Shape = tuple[int, ...]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardtanh": F.hardtanh,
    "hardsigmoid": F.hardsigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
    "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
    "gelu": F.gelu,
    "silu": F.silu,
    "mish": F.mish,
    "relu6": F.relu6,
    "softsign": F.softsign,
    "clamp": lambda v: v.clamp(-0.5, 0.7),
}

_PROJECTIONS = ("relu", "hardtanh", "relu6", "clamp")
DIODES = {
    "resistive": (*_PROJECTIONS, "leaky_relu", "hardsigmoid"),
    "unamplified": _PROJECTIONS,
    "drn": _PROJECTIONS,
}
"""The activations that the circuit of an energy makes; every other energy has all of them."""


@dataclass(frozen=True)
class Step:
    """One operation: its kind, the numbers of the values that it reads, and its settings."""

    kind: str
    reads: tuple[int, ...]
    settings: tuple[Any, ...] = ()


class DrawnNetwork(nn.Module):
    """Runs the steps in order. The result is all that no step reads."""

    def __init__(self, shape: Shape, steps: list[Step], seed: int) -> None:
        super().__init__()
        self.shape, self.steps, self.seed = shape, steps, seed
        self.layers = nn.ModuleDict()
        shapes = [shape]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for index, step in enumerate(steps):
                layer = _layer(step, shapes[step.reads[0]])
                if layer is not None:
                    self.layers[str(index)] = _as_trained(layer)
                shapes.append(shape_after(step, shapes))
        used = {value for step in steps for value in step.reads}
        self.results = [value for value in range(1, len(shapes)) if value not in used]

    def for_energy(self, energy: str) -> DrawnNetwork:
        """The same network with what a circuit of this energy is made of: its diodes, else ReLU, and conductances."""
        made = DIODES.get(energy, tuple(ACTIVATIONS))
        steps = [
            replace(step, settings=("relu",)) if step.kind == "activation" and step.settings[0] not in made else step
            for step in self.steps
        ]
        network = DrawnNetwork(self.shape, steps, self.seed)
        if energy == "drn":
            with torch.no_grad():
                for weight in (p for name, p in network.named_parameters() if name.endswith("weight")):
                    weight.abs_()
        return network

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for index, step in enumerate(self.steps):
            read = [values[value] for value in step.reads]
            if step.kind == "again":
                values.append(self.layers[str(step.settings[0])](*read))
            elif str(index) in self.layers:
                values.append(self.layers[str(index)](*read))
            else:
                values.append(_run(step, read))
        return torch.cat([values[value].flatten(1) for value in self.results], 1)


def _layer(step: Step, shape: Shape) -> nn.Module | None:
    """The module of a step, or None where it is a function."""
    kind, settings = step.kind, step.settings
    if kind == "linear":
        width, bias, zero = settings
        return _zeroed(nn.Linear(shape[-1], width, bias=bias), zero)
    if kind in ("conv", "transposed"):
        width, size, stride, groups, bias, zero = settings
        build = nn.Conv2d if kind == "conv" else nn.ConvTranspose2d
        return _zeroed(build(shape[0], width, size, stride, size // 2, groups=groups, bias=bias), zero)
    if kind == "batch_norm":
        return (nn.BatchNorm2d if len(shape) == 3 else nn.BatchNorm1d)(shape[0], affine=settings[0])
    simple: dict[str, Callable[[], nn.Module]] = {
        "layer_norm": lambda: nn.LayerNorm(shape[-1]),
        "group_norm": lambda: nn.GroupNorm(1, shape[0]),
        "prelu": lambda: nn.PReLU(),
        "dropout": lambda: nn.Dropout(settings[0]),
        "average": lambda: nn.AvgPool2d(2),
        "maximum": lambda: nn.MaxPool2d(2),
        "adaptive": lambda: nn.AdaptiveAvgPool2d(1),
        "upsample": lambda: nn.Upsample(scale_factor=2),
    }
    return simple[kind]() if kind in simple else None


def _as_trained(layer: nn.Module) -> nn.Module:
    """The layer; a norm has factors, shifts and statistics as training leaves them, negative factors among them."""
    if isinstance(layer, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d):
        with torch.no_grad():
            for name, value in (*layer.named_parameters(), *layer.named_buffers()):
                if name == "running_var":
                    value.uniform_(0.3, 2)
                elif value.is_floating_point():
                    value.normal_(1.0 if name == "weight" else 0.0, 0.5)
    return layer


def _zeroed(layer: nn.Module, zero: bool) -> nn.Module:
    if zero:
        nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
    return layer


def _run(step: Step, read: list[Tensor]) -> Tensor:
    """The result of a step that has no module."""
    first, kind, settings = read[0], step.kind, step.settings
    functions: dict[str, Callable[[], Tensor]] = {
        "activation": lambda: ACTIVATIONS[settings[0]](first),
        "add": lambda: first + read[1],
        "subtract": lambda: first - read[1],
        "multiply": lambda: first * read[1],
        "cat": lambda: torch.cat(read, 1),
        "scale": lambda: first * settings[0],
        "shift": lambda: first + settings[0],
        "slice": lambda: first[:, settings[0] : settings[1]],
        "flatten": lambda: first.flatten(1),
        "mean": lambda: first.flatten(2).mean(2) if first.ndim == 4 else first.mean(1),
        "transpose": lambda: first.transpose(1, 2),
        "softmax": lambda: first.softmax(-1),
        "attend": lambda: (first @ read[1].transpose(1, 2)).softmax(-1) @ read[2],
        "tokens": lambda: first.flatten(2).transpose(1, 2),
    }
    return functions[kind]()


def shape_after(step: Step, shapes: list[Shape]) -> Shape:
    """The shape of a step's result, without the batch."""
    shape, kind, settings = shapes[step.reads[0]], step.kind, step.settings
    if kind == "again":
        return shapes[settings[0] + 1]
    if kind == "linear":
        return (*shape[:-1], settings[0])
    if kind in ("conv", "transposed"):
        width, size, stride = settings[:3]
        margin = 2 * (size // 2) - size
        side = (lambda n: (n + margin) // stride + 1) if kind == "conv" else (lambda n: (n - 1) * stride - margin)
        return (width, side(shape[1]), side(shape[2]))
    if kind == "slice":
        return (settings[1] - settings[0], *shape[1:])
    if kind == "cat":
        return (sum(shapes[value][0] for value in step.reads), *shape[1:])
    if kind in ("average", "maximum"):
        return (shape[0], shape[1] // 2, shape[2] // 2)
    changed: dict[str, Shape] = {
        "adaptive": (shape[0], 1, 1),
        "upsample": (shape[0], *(2 * side for side in shape[1:])),
        "flatten": (prod(shape),),
        "mean": (shape[0],) if len(shape) == 3 else shape[1:],
        "transpose": shape[::-1],
        "tokens": (prod(shape[1:]), shape[0]),
    }
    return changed.get(kind, shape)


WIDTHS = st.sampled_from([1, 2, 3, 4, 8])
PARTLY = st.sampled_from([False, False, False, False, False, False, False, True])


@st.composite
def networks(draw: st.DrawFn, most: int = 10) -> tuple[DrawnNetwork, Tensor]:
    """A network of one to `most` steps with at least one layer, and its input: a batch of 1 to 4."""
    shape: Shape = draw(
        st.one_of(
            st.tuples(WIDTHS),
            st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 4, 5, 6]), st.sampled_from([2, 4, 6])),
            st.tuples(st.sampled_from([1, 3, 4]), WIDTHS),
        )
    )
    shapes, steps = [shape], []
    for index in range(draw(st.integers(1, most))):
        read = index if draw(st.integers(0, 3)) else draw(st.integers(0, index))
        usual = "weighted" if not index or steps[-1].kind == "activation" else "activation"
        if not index or draw(st.booleans()):  # layers and activations in turn, which settle
            step = _of_kind(draw, usual, read, shapes, steps)
        else:
            step = draw(_step(read, shapes, steps))
        steps.append(step)
        shapes.append(shape_after(step, shapes))
    alone = any(step.kind == "group_norm" and prod(shapes[step.reads[0]]) == 1 for step in steps)
    batch = draw(st.sampled_from([4, 2, 3] if alone else [4, 1, 2, 3]))  # torch's group norm refuses a single value
    seed = draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    return DrawnNetwork(shape, steps, seed), torch.randn(batch, *shape, generator=generator)


def _weighted(draw: st.DrawFn, read: int, shapes: list[Shape]) -> Step:
    """A layer with weights."""
    shape = shapes[read]
    if len(shape) != 3 or draw(PARTLY):
        return Step("linear", (read,), (draw(WIDTHS), draw(st.booleans()), draw(PARTLY)))
    kind = draw(st.sampled_from(["conv", "conv", "conv", "transposed"]))
    stride = draw(st.sampled_from([1, 1, 2])) if kind == "conv" else 1
    groups = draw(st.sampled_from([n for n in (1, 1, 2, shape[0]) if not shape[0] % n]))
    width = groups * draw(st.sampled_from([1, 2, 4]))
    size = draw(st.sampled_from([1, 3]))
    return Step(kind, (read,), (width, size, stride, groups, draw(st.booleans()), draw(PARTLY)))


@st.composite
def _step(draw: st.DrawFn, read: int, shapes: list[Shape], steps: list[Step]) -> Step:
    """Any operation that the value's shape allows."""
    shape = shapes[read]
    kinds = ["weighted"] * 5 + ["activation"] * 5 + ["add", "add", "multiply", "subtract", "scale", "shift", "dropout"]
    kinds += ["prelu", "layer_norm", "softmax", "cat"]
    kinds += ["again"] * bool(_again(read, shapes, steps)) + ["slice"] * (shape[0] > 1)
    if len(shape) == 1:
        kinds += ["batch_norm", "batch_norm"]
    if len(shape) == 3:
        kinds += ["batch_norm", "batch_norm", "group_norm", "adaptive", "flatten", "mean", "tokens"]
        kinds += ["average", "maximum"] * (min(shape[1:]) > 1) + ["upsample"] * (max(shape[1:]) < 8)
    if len(shape) == 2:
        kinds += ["mean", "transpose", "attend", "flatten"]
    return _of_kind(draw, draw(st.sampled_from(kinds)), read, shapes, steps)


def _again(read: int, shapes: list[Shape], steps: list[Step]) -> list[int]:
    """The layers that a value of this shape can go through once more."""
    layers = (index for index, step in enumerate(steps) if step.kind in ("linear", "conv"))
    return [index for index in layers if shapes[steps[index].reads[0]] == shapes[read]]


def _of_kind(draw: st.DrawFn, kind: str, read: int, shapes: list[Shape], steps: list[Step]) -> Step:
    """A step of this kind with drawn settings."""
    shape = shapes[read]
    alike = [value for value, other in enumerate(shapes) if other == shape]
    other = draw(st.sampled_from(alike))
    if kind == "weighted":
        return _weighted(draw, read, shapes)
    settings: dict[str, Callable[[], tuple[Any, ...]]] = {
        "activation": lambda: (draw(st.sampled_from(sorted(ACTIVATIONS))),),
        "scale": lambda: (draw(st.sampled_from([0.5, -1.0, 2.0, 0.0])),),
        "shift": lambda: (draw(st.sampled_from([0.5, -1.0])),),
        "dropout": lambda: (draw(st.sampled_from([0.3, 0.0, 0.9])),),
        "batch_norm": lambda: (draw(st.booleans()),),
        "again": lambda: (draw(st.sampled_from(_again(read, shapes, steps))),),
        "slice": lambda: draw(st.sampled_from([(0, shape[0] // 2), (shape[0] // 2, shape[0]), (0, 1)])),
    }
    joinable = [v for v, seen in enumerate(shapes) if len(seen) == len(shape) and seen[1:] == shape[1:]]
    reads = {
        **dict.fromkeys(("add", "subtract", "multiply"), (read, other)),
        "cat": (read, draw(st.sampled_from(joinable))),
        "attend": (read, other, draw(st.sampled_from(alike))),
    }
    return Step(kind, reads.get(kind, (read,)), settings.get(kind, lambda: ())())
