"""Each pass keeps its promise, each operator its transpose, each certificate its bound."""

from __future__ import annotations

import ast
import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CASES, converted, digits_cnn, mlp, noise, seeded, transformer, warmed
from running import run, targets
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.ir import Role, info, verify
from ffebm_compiler.passes.annotate import annotate
from ffebm_compiler.passes.capture import capture
from ffebm_compiler.passes.fold_batchnorm import fold_batchnorm
from ffebm_compiler.passes.free_shapes import free_shapes
from ffebm_compiler.passes.functionalize import functionalize
from ffebm_compiler.passes.merge_modes import merge_modes
from ffebm_compiler.passes.rebind import rebind
from ffebm_compiler.runtime.energies.loop_gain import MARGIN, certify, edge_norms, gain_for, scales_for
from ffebm_compiler.runtime.feedforward import ReboundAttention, ReboundBatchNorm, ReboundDropout
from ffebm_compiler.runtime.frame import Frame
from ffebm_compiler.runtime.free_phase import FreePhase
from ffebm_compiler.runtime.operators import (
    Concat,
    Convolution,
    Gain,
    Linear,
    Mask,
    Operator,
    Permute,
    Reshape,
    Scale,
    Sum,
    Wiring,
    slice_of,
)

aten = torch.ops.aten


# -- imports -------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]
LAYERS = {
    "runtime": ("errors", "runtime"),
    "passes": ("errors", "hardware", "hardware_layers", "ir", "plan", "runtime", "passes"),
}


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder: str) -> None:
    files = list((ROOT / folder).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is None or module.split(".")[0] != "ffebm_compiler":
                continue
            assert module.split(".")[1] in LAYERS[folder], f"{path.name} imports {module}"
            if folder == "passes":
                assert module not in ("ffebm_compiler.runtime.solvers", "ffebm_compiler.runtime.gradients"), path.name


# -- free_shapes ---------------------------------------------------------------------------------


class Shapes(nn.Module):
    """Reads the batch of intermediate values in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4 * 16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = y.view(y.size(0), -1)
        z = self.b(y)
        z = z.view(z.shape[0], 2, z.shape[1] // 2).transpose(1, 2).reshape(z.shape[0], -1)
        return z.view(-1, 4).view(x.shape[0], 8)


def test_free_shapes_reads_the_batch_from_the_input_only() -> None:
    model = seeded(Shapes)
    program = capture(model, (noise(3, 2, 4, 4),), {})
    before = targets(program)
    assert aten.view.default in before
    program = free_shapes(program)
    verify(program)
    (name,) = program.inputs
    reads = [node for node in program.graph.nodes if node.target is aten.sym_size.int]
    assert all(node.args[0].name == name for node in reads)
    assert aten.view.default not in targets(program)
    graph = annotate(program)
    assert not any(op.reason.startswith("its sizes are computed") for op in graph.operations)
    for batch in (1, 3, 7):
        x = noise(batch, 2, 4, 4, seed=batch)
        torch.testing.assert_close(run(program, x), model(x))


# -- rebind --------------------------------------------------------------------------------------


def test_rebind_binds_every_flag_to_the_source() -> None:
    cnn, x = digits_cnn()
    program = rebind(free_shapes(functionalize(capture(cnn, (x,), {}))))
    verify(program)
    assert aten.batch_norm.default not in targets(program)
    bound = [m for m in program.graph_module.modules() if isinstance(m, ReboundBatchNorm)]
    norms = [m for m in program.source.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [m.owner for m in bound] == norms
    torch.testing.assert_close(run(program, x), cnn(x))
    program.source.train()
    expected = copy.deepcopy(cnn).train()
    torch.testing.assert_close(run(program, x), expected(x))
    for mine, theirs in zip(program.source.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)

    encoder, tokens = transformer(dropout=0.25)
    program = rebind(merge_modes(capture(encoder, (tokens,), {})))
    modules = list(program.graph_module.modules())
    assert [m.rate for m in modules if isinstance(m, ReboundAttention)] == [0.25, 0.25]
    drops = [m for m in modules if isinstance(m, ReboundDropout)]
    assert len(drops) == 6
    assert all(m.rate == 0.25 and not m.active for m in drops)
    program.source.train()
    assert all(m.active for m in drops)


# -- fold_batchnorm ------------------------------------------------------------------------------


def folding(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh())


FOLDABLE = {
    "conv": (lambda: folding(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4)), (5, 2, 6, 6)),
    "conv without bias": (lambda: folding(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)), (5, 2, 6, 6)),
    "grouped conv": (lambda: folding(nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8)), (5, 4, 6, 6)),
    "conv with padding by name": (lambda: folding(nn.Conv1d(2, 4, 3, padding="same"), nn.BatchNorm1d(4)), (5, 2, 6)),
    "without affine": (lambda: folding(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False, eps=0.1)), (5, 2, 6, 6)),
    "linear": (lambda: folding(nn.Linear(6, 4), nn.BatchNorm1d(4)), (5, 6)),
}


@pytest.mark.parametrize("name", FOLDABLE)
def test_fold_batchnorm_is_exact_in_eval_mode_and_reaches_every_parameter(name: str) -> None:
    build, shape = FOLDABLE[name]
    x = noise(*shape)
    model = warmed(seeded(build), 2 * x + 1)
    program = fold_batchnorm(rebind(free_shapes(functionalize(capture(model, (x,), {})))))
    verify(program)
    assert not any(node.op == "call_module" for node in program.graph.nodes)
    assert any("1 batch norms are folded" in note for note in program.notes)
    found = run(program, x)
    expected = model(x)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    with torch.no_grad():
        assert (model[0](x).tanh() - expected).norm() > 0.05 * expected.norm()  # the norm does something
    found.square().sum().backward()
    expected.square().sum().backward()
    for key, parameter in model.named_parameters():
        gradient = program.source.get_parameter(key).grad
        assert (gradient - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-6, key


class Unfoldable(nn.Module):
    """Batch norms that no layer before them can take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read_twice = nn.BatchNorm2d(2), nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(2, 4, 1)
        self.linear, self.tokens = nn.Linear(6, 6), nn.BatchNorm1d(4)
        self.last = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.first(x))
        y = self.read_twice(y) + y
        return self.last(self.tokens(self.linear(y.mean(-1))))


def test_fold_batchnorm_notes_what_it_leaves_and_why() -> None:
    x = noise(3, 2, 6, 6)
    model = warmed(seeded(Unfoldable), x)
    program = fold_batchnorm(rebind(capture(model, (x,), {})))
    assert program.notes == [
        "batch norm 'first' stays digital: the operation before it is no convolution or linear",
        "batch norm 'read_twice' stays digital: the layer before it is also read elsewhere",
        "batch norm 'tokens' stays digital: it normalises another dimension than the linear's features",
    ]
    torch.testing.assert_close(run(program, x), model(x))


def test_folded_statistics_are_frozen_in_train_mode_and_load_state_dict_is_seen() -> None:
    model, x = digits_cnn()
    hybrid = ffebm.convert(model, x, fold_batchnorm=True)
    hybrid.train()
    before = {name: buffer.clone() for name, buffer in hybrid.named_buffers()}
    expected = copy.deepcopy(hybrid).eval()(x)
    torch.testing.assert_close(hybrid(x), expected)
    assert all(torch.equal(buffer, before[name]) for name, buffer in hybrid.named_buffers())
    assert any("running statistics are frozen" in note for note in hybrid.plan.notes)


# -- annotate ------------------------------------------------------------------------------------


def test_annotate_gives_every_node_a_role_and_a_reason() -> None:
    for model, x in (digits_cnn(), transformer(), mlp()):
        program = rebind(free_shapes(functionalize(capture(model, (x,), {}))))
        graph = annotate(program)
        assert all(info(node).reason for node in program.graph.nodes)
        dynamic = [
            node.name
            for node in program.graph.nodes
            if info(node).role in (Role.WEIGHT, Role.ACTIVATION, Role.WIRING, Role.DIGITAL)
        ]
        assert [operation.name for operation in graph.operations] == dynamic


def test_annotate_measures_the_matrices() -> None:
    x = noise(3, 2, 6, 6)
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 4, 2, stride=2, bias=False),
            nn.Flatten(),
            nn.Linear(144, 5),
        )
    )
    program = rebind(free_shapes(functionalize(capture(model, (x,), {}))))
    layers = [op for op in annotate(program).operations if op.role is Role.WEIGHT]
    assert [(op.path, op.rows, op.cols, op.groups, op.positions, op.bias) for op in layers] == [
        ("0", 9, 3, 2, 9, True),
        ("2", 6, 16, 1, 9, False),
        ("4", 144, 5, 1, 1, True),
    ]
    # Multiply-accumulates, by counting: every output of a layer is a sum over its receptive field.
    assert [op.macs for op in layers] == [6 * 9 * 9, 9 * 6 * 4 * 4, 144 * 5]
    assert [op.values for op in layers] == [54, 144, 5]
    assert layers[0].shape == (None, 6, 3, 3)


# -- lower_block ---------------------------------------------------------------------------------

STRUCTURE = {
    # name: per state (layer, activation, states that its drive reads, depth)
    "mlp": [
        ("layers.0", "tanh", (), 0),
        ("layers.1", "tanh", (0,), 1),
        ("layers.2", "tanh", (1,), 2),
        ("layers.3", "identity", (2,), 3),
    ],
    "residual": [("a", "tanh", (), 0), ("b", "tanh", (0,), 1), ("c", "identity", (1,), 2)],
    "skip": [("a", "tanh", (), 0), ("b", "tanh", (0,), 1), ("c", "identity", (1,), 2)],
    "projections": [
        ("q", "tanh", (), 0),
        ("k", "tanh", (), 0),
        ("v", "tanh", (), 0),
        ("out", "identity", (0, 1, 2), 1),
    ],
    "branches": [
        ("a", "tanh", (), 0),
        ("c", "tanh", (0,), 1),
        ("b", "tanh", (0, 1), 2),
        ("e", "identity", (2,), 3),
    ],
    "joined": [("a", "tanh", (), 0), ("b", "tanh", (), 0), ("c", "identity", (0, 1), 1)],
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_lower_block_makes_one_state_of_every_activation(case: str) -> None:
    hybrid, _ = converted(case, nn.Tanh)
    (block,) = hybrid.blocks
    program = block.module.program
    found = [
        (layer.name, layer.activation.name, above, depth)
        for layer, above, depth in zip(program.layers, program.upstream, program.depths, strict=True)
    ]
    assert sorted(found) == sorted(_renumbered(STRUCTURE[case], found))
    assert program.batched
    assert program.visible == (len(program.layers) - 1,)


def _renumbered(expected: list[tuple[Any, ...]], found: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The expected states with the numbers that the found ones have: independent layers may come in any order."""
    place = {layer: index for index, (layer, *_) in enumerate(found)}
    order = [place[layer] for layer, *_ in expected]
    return [(layer, act, tuple(sorted(order[k] for k in above)), depth) for layer, act, above, depth in expected]


class Linears(nn.Module):
    """Linear layers without an activation between them, one of which also leaves the block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).unflatten(1, (5, 1)).flatten(1)
        return torch.relu(self.b(y) + self.c(y)), y


def test_lower_block_puts_an_identity_state_between_linear_layers() -> None:
    x = noise(4, 6)
    hybrid = ffebm.convert(seeded(Linears), x, feedback=0.3)
    (block,) = hybrid.blocks
    layers = block.module.program.layers
    assert [(layer.name, layer.activation.name) for layer in layers] == [("a", "identity"), ("b", "relu")]
    found = ffebm.check_gradients(hybrid, x, lambda y: y[0].square().sum() + y[1].sin().sum())
    assert found.worst("ep")[1].cosine >= 0.9999


# -- operators -----------------------------------------------------------------------------------


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def check_operator(operator: Operator, values: list[Tensor], weights: list[Tensor | None]) -> None:
    """⟨A v, p⟩ = ⟨v, Aᵀ p⟩, A v = f(x + v) − f(x), and ∂⟨p, f(x)⟩/∂θ against autograd, in float64."""
    shapes = [value.shape for value in values]
    output = operator.apply(values, weights)
    p = noise(*output.shape, seed=51).double()
    directions = [noise(*shape, seed=52 + i).double() for i, shape in enumerate(shapes)]
    parts = operator.adjoint(p, weights, shapes, [True] * len(values))
    images = []
    for index, direction in enumerate(directions):
        alone = [direction if i == index else None for i in range(len(values))]
        image = operator.tangent(alone, weights, shapes)
        moved = [value + direction if i == index else value for i, value in enumerate(values)]
        torch.testing.assert_close(image, operator.apply(moved, weights) - output, rtol=1e-9, atol=1e-9)
        assert parts[index].shape == shapes[index]
        torch.testing.assert_close(dot(image, p), dot(direction, parts[index]), rtol=1e-9, atol=1e-9)
        images.append(image)
    torch.testing.assert_close(operator.tangent(list(directions), weights, shapes), sum(images))
    learnt = [index for index, weight in enumerate(weights) if weight is not None]
    if operator.draws or not learnt:
        return
    leaves = [None if weight is None else weight.clone().requires_grad_() for weight in weights]
    loss = dot(operator.apply(values, leaves), p)
    expected = torch.autograd.grad(loss, [leaves[i] for i in learnt])
    needed = [weight is not None for weight in weights]
    found = operator.weight_gradients(values, p, weights, needed, True)
    for index, gradient in zip(learnt, expected, strict=True):
        torch.testing.assert_close(found[index], gradient, rtol=1e-9, atol=1e-9)
    without = operator.weight_gradients(values, p, weights, needed, False)
    torch.testing.assert_close(without[0], expected[0], rtol=1e-9, atol=1e-9)
    assert all(gradient is None for gradient in without[1:])
    assert operator.weight_gradients(values, p, weights, [False] * len(weights), True) == [None] * len(weights)


sizes = st.integers(1, 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=0, max_size=3), sizes, sizes, st.booleans())
def test_linear_operator(leading: list[int], inputs: int, outputs: int, bias: bool) -> None:
    weights = [noise(outputs, inputs).double(), noise(outputs, seed=6).double() if bias else None]
    check_operator(Linear(), [noise(*leading, 2, inputs, seed=7).double()], weights)


CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.booleans(), st.booleans())
def test_convolution_operator(data: st.DataObject, rank: int, transposed: bool, bias: bool) -> None:
    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    groups, kernel, stride, dilation = data.draw(st.integers(1, 2)), draw(1, 3), draw(1, 3), draw(1, 2)
    padding = tuple(min(p, (k - 1) * d) for p, k, d in zip(draw(0, 2), kernel, dilation, strict=True))
    spatial = draw(5, 6)
    inputs, outputs = 2 * groups, groups
    x = noise(2, inputs, *spatial, seed=7).double()
    offset = noise(outputs, seed=6).double() if bias else None
    if transposed:
        extra = tuple(min(1, s - 1) for s in stride)
        arguments: tuple[Any, ...] = (stride, padding, extra, groups, dilation)
        weight = noise(inputs, outputs // groups, *kernel).double()
        operator = Convolution(TRANSPOSED[rank], arguments, stride, padding, dilation, True, extra, groups)
    else:
        weight = noise(outputs, inputs // groups, *kernel).double()
        arguments = (stride, padding, dilation, groups)
        operator = Convolution(CONVOLUTIONS[rank], arguments, stride, padding, dilation, False, (0,) * rank, groups)
    check_operator(operator, [x], [weight, offset])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.lists(st.integers(2, 3), min_size=1, max_size=3))
def test_sum_operator_broadcasts(data: st.DataObject, shape: list[int]) -> None:
    def smaller() -> list[int]:
        kept = [size if data.draw(st.booleans()) else 1 for size in shape]
        return kept[data.draw(st.integers(0, len(kept) - 1)) :]

    second = noise(*smaller(), seed=8).double()
    factors = (data.draw(st.sampled_from([1.0, -1.0, 0.5])), data.draw(st.sampled_from([1.0, -1.0, 2.0])))
    operands = [noise(*shape, seed=7).double(), second]
    if data.draw(st.booleans()):
        operands.reverse()
    check_operator(Sum(factors, data.draw(st.sampled_from([0.0, 3.0]))), operands, [])
    check_operator(Sum((factors[0],), 2.0), operands[:1], [])


WIRING = {
    "scale": (Scale(-0.7), (2, 3)),
    "average pooling": (Wiring(F.avg_pool2d, (3, 2, 1), (("count_include_pad", False),)), (2, 3, 7, 6)),
    "adaptive pooling": (Wiring(F.adaptive_avg_pool2d, ((2, 3),)), (2, 3, 5, 7)),
    "mean": (Wiring(torch.mean, ((1, 3), True)), (2, 3, 4, 5)),
    "slice": (Wiring(slice_of, (2, 1, 4, 2)), (2, 3, 6)),
    "select": (Wiring(torch.select, (1, -1)), (2, 3, 4)),
    "flatten": (Reshape(torch.flatten, (1,)), (2, 3, 4)),
    "reshape": (Reshape(torch.reshape, ((6, -1),)), (2, 3, 4)),
    "permute": (Permute((0, -1, 1, 2)), (2, 3, 4, 5)),
}


@pytest.mark.parametrize("name", WIRING)
def test_wiring_operators(name: str) -> None:
    operator, shape = WIRING[name]
    check_operator(operator, [noise(*shape, seed=7).double()], [])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.data())
def test_gain_operator_broadcasts(shape: list[int], data: st.DataObject) -> None:
    kept = [size if data.draw(st.booleans()) else 1 for size in shape]
    gain = noise(*kept[data.draw(st.integers(0, len(kept))) :], seed=6).double()
    check_operator(Gain(), [noise(*shape, seed=7).double()], [gain])


def test_concat_operator() -> None:
    check_operator(Concat(-1), [noise(2, 3, 4, seed=7).double(), noise(2, 3, 1, seed=8).double()], [])
    check_operator(Concat(1), [noise(2, width, seed=7 + width).double() for width in (1, 3, 2)], [])


def test_mask_operator() -> None:
    drop = nn.Dropout(0.5).train()
    operator = Mask(ReboundDropout(drop, "dropout", 0.5))
    x = noise(6, 5).double()
    mask = operator.draw([x])
    assert mask is not None
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    check_operator(operator, [x], [mask])
    assert operator.gain(3.0) == 6.0
    assert Mask(ReboundDropout(drop.eval(), "dropout", 0.5)).draw([x]) is None


# -- loop gain -----------------------------------------------------------------------------------


def frame_of(hybrid: ffebm.HybridModel, index: int, *inputs: Tensor) -> tuple[Frame, list[Tensor]]:
    """A block's frame at a batch of one, and its feedforward states."""
    block = hybrid.blocks[index]
    with hybrid.recording() as record, torch.no_grad():
        hybrid(*inputs)
    operands = record[block.name][0]
    program = block.module.program
    frame = Frame(program, operands[: program.inputs], operands[program.inputs :])
    with torch.no_grad():
        return frame, frame.feedforward()


def dense_norm(frame: Frame, states: list[Tensor], earlier: int, later: int) -> float:
    """The largest singular value of the dense Jacobian of a drive by a state, by numpy."""

    def drive(state: Tensor) -> Tensor:
        return frame.drive(later, [state if i == earlier else s for i, s in enumerate(states)]).flatten()

    jacobian = torch.autograd.functional.jacobian(drive, states[earlier])
    return float(np.linalg.norm(jacobian.flatten(1).detach().numpy(), 2))


@pytest.mark.parametrize("case", CASES)
def test_edge_norms_are_those_of_the_dense_jacobian(case: str) -> None:
    hybrid, x = converted(case, nn.Tanh)
    hybrid = copy.deepcopy(hybrid).double()
    for index, block in enumerate(hybrid.blocks):
        if not block.module.program.coupled:
            continue
        frame, states = frame_of(hybrid, index, x[:1].double())
        norms = edge_norms(frame, states)
        assert {(k, m) for k, m, _ in norms} == {
            (k, m) for m, above in enumerate(block.module.program.upstream) for k in above
        }
        for earlier, later, norm in norms:
            exact = dense_norm(frame, states, earlier, later)
            assert exact <= norm <= exact * MARGIN * (1 + 1e-6), f"{block.name} {earlier}->{later}"
        measured = block.module.certificate.norms
        for (_, _, norm), (_, _, stored) in zip(norms, measured, strict=True):
            assert stored == pytest.approx(norm, rel=3e-3)  # measured in float32 by `convert`


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 3), st.integers(1, 2), st.integers(3, 7))
def test_norm_of_random_convolutions(seed: int, kernel: int, stride: int, size: int) -> None:
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 1), nn.Tanh(), nn.Conv2d(3, 4, kernel, stride, kernel // 2), nn.Tanh()
        ).double(),
        seed,
    )
    x = noise(1, 1, size, size).double()
    hybrid = ffebm.convert(model, x)
    frame, states = frame_of(hybrid, 0, x)
    ((earlier, later, norm),) = edge_norms(frame, states)
    exact = dense_norm(frame, states, earlier, later)
    assert exact <= norm <= exact * MARGIN * (1 + 1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kappa", [1e-6, 0.01, 0.1, 0.5, 0.99])
def test_feedback_is_the_loop_gain(case: str, kappa: float) -> None:
    hybrid, _ = converted(case, nn.Tanh)
    for block in hybrid.blocks:
        program = block.module.program
        if not program.coupled:
            assert block.certificate is None
            assert block.loop_gain == 0
            continue
        certificate = certify(program, block.certificate.norms, kappa)
        assert certificate.loop_gain == pytest.approx(kappa, rel=1e-6)
        assert certificate.certified
        assert certificate.radius == pytest.approx(comparison_radius(block.module, certificate.scales), rel=1e-9)
        assert max(certificate.scales) / min(certificate.scales) >= 1
        gain = gain_for(program, block.certificate.norms, kappa)
        assert scales_for(program, gain) == certificate.scales
        assert all(
            math.isclose(scale, gain ** (depth - max(program.depths)), rel_tol=1e-9)
            for scale, depth in zip(certificate.scales, program.depths, strict=True)
        )


def comparison(block: Any, scales: Sequence[float]) -> np.ndarray:
    """A of DESIGN: a_lm = √(c_m/c_l) ‖J_ml‖ √(Lip_l Lip_m), written down once more."""
    layers = block.program.layers
    matrix = np.zeros((len(layers), len(layers)))
    for earlier, later, norm in block.certificate.norms:
        lips = layers[earlier].activation.lipschitz * layers[later].activation.lipschitz
        entry = math.sqrt(scales[later] / scales[earlier]) * norm * math.sqrt(lips)
        matrix[earlier, later] += entry
        matrix[later, earlier] += entry
    return matrix


def comparison_radius(block: Any, scales: Sequence[float]) -> float:
    return float(max(abs(np.linalg.eigvals(comparison(block, scales)))))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("kappa", [0.1, 0.9])
def test_every_sweep_contracts_as_the_certificate_says(case: str, activation: type[nn.Module], kappa: float) -> None:
    """With n_l = √(c_l/Lip_l) ‖s_l − s*_l‖, an update obeys n_l ≤ Σ_m a_lm n_m, whatever the start."""
    hybrid, x = converted(case, activation)
    hybrid = copy.deepcopy(hybrid).double()
    hybrid.set_feedback(kappa)
    for index, block in enumerate(hybrid.blocks):
        module = block.module
        if not module.program.coupled:
            continue
        frame, _ = frame_of(hybrid, index, x.double())
        scales = module.scales
        matrix = comparison(module, scales)
        assert comparison_radius(module, scales) ** 2 == pytest.approx(kappa, rel=1e-6)
        weights = [
            math.sqrt(scale / layer.activation.lipschitz)
            for scale, layer in zip(scales, module.program.layers, strict=True)
        ]
        with torch.no_grad():
            settled = module.settle(frame.inputs, frame.weights).states
            phase = FreePhase(frame, module.setting)
            for layer, state in enumerate(settled):
                phase.store(layer, state + noise(*state.shape, seed=60 + layer).double())

            def distance(
                layer: int, phase: FreePhase = phase, settled: Any = settled, weights: list[float] = weights
            ) -> float:
                return weights[layer] * float((phase.values[layer] - settled[layer]).norm())

            start = max(distance(layer) for layer in range(len(settled)))
            for _ in range(3):
                for layer in range(len(settled)):
                    bound = sum(matrix[layer, other] * distance(other) for other in range(len(settled)))
                    phase.store(layer, phase.update(layer))
                    assert distance(layer) <= bound * (1 + 1e-6) + 1e-9 * start
            # ρ < 1: it converges from here to the same equilibrium.
            for _ in range(module.certificate.sweeps(1e-9)):
                for layer in range(len(settled)):
                    phase.store(layer, phase.update(layer))
            assert max(distance(layer) for layer in range(len(settled))) <= 1e-6 * start


@pytest.mark.parametrize("kappa", [0.05, 0.3, 0.8])
def test_predicted_rate_is_met_where_the_bound_is_tight(kappa: float) -> None:
    # Two linears without an activation: the error contracts by γ ‖W‖² = κ a sweep, up to the margin of the norm.
    model = seeded(lambda: nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))).double()
    x = noise(3, 5).double()
    hybrid = ffebm.convert(model, x, feedback=kappa)
    (block,) = hybrid.blocks
    frame, _ = frame_of(hybrid, 0, x)
    phase = FreePhase(frame, block.module.setting)
    errors = []
    with torch.no_grad():
        settled = block.settle(x).states
        phase.store(1, phase.values[1] + 1)
        for _ in range(12):
            for layer in range(2):
                phase.store(layer, phase.update(layer))
            errors.append(float((phase.values[1] - settled[1]).norm()))
            if errors[-1] < 1e-9:
                break
    rate = errors[-1] / errors[-2]
    assert rate == pytest.approx(kappa / MARGIN**2, rel=0.02)
    sweeps = block.certificate.sweeps(1e-6)
    assert sweeps == math.ceil(math.log(1e-6) / math.log(block.loop_gain))
    hybrid.configure(feedback=kappa, estimator=block.module.estimator, solver=ffebm.GaussSeidel(rtol=1e-6))
    hybrid(x)
    assert block.module.last.sweeps <= sweeps + 1


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kappa", [0.1, 0.5])
def test_sweeps_stay_within_the_prediction(case: str, kappa: float) -> None:
    hybrid, x = converted(case, nn.Tanh)
    hybrid = copy.deepcopy(hybrid)
    hybrid.set_feedback(kappa)
    hybrid(x)
    for block in hybrid.blocks:
        if block.certificate is not None:
            predicted = block.certificate.sweeps(1e-5)
            assert predicted is not None
            assert 1 <= block.module.last.sweeps <= predicted + 2, block.name
    assert "predicted" in hybrid.summary()


def test_symmetric_feedback_is_measured_not_scaled() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, feedback="symmetric")
    (block,) = hybrid.blocks
    assert block.module.scales == (1.0,) * 4
    assert block.loop_gain == pytest.approx(comparison_radius(block.module, (1.0,) * 4) ** 2, rel=1e-9)
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(10)
    hybrid.recertify()
    assert block.loop_gain > 1
    assert not block.certificate.certified
    assert block.certificate.sweeps(1e-5) is None
