"""Plausible mistakes of somebody who uses a hybrid for the first time are answered in a sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ffebm_compiler as ffebm

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def hybrid() -> ffebm.HybridModel:
    return ffebm.convert(network(), X)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input": X}, r"got dict: pass keyword arguments by themselves, convert\(model, \(\), kwargs=\{\.\.\.\}\)"),
        (X.numpy(), r"got ndarray: make it a tensor with torch\.as_tensor"),
        (None, r"got NoneType: pass a batch as the model takes it"),
        (tuple(X.flatten().tolist()), r"rejects the example inputs \['-?\d.*\] and 16 more: TypeError"),
        (X.double(), r"rejects the example inputs \[\(4, 6\)\] in module '0'.* must have the same dtype"),
        (torch.ones(4, 6, dtype=torch.long), r"rejects the example inputs .* must have the same dtype"),
    ],
)
def test_example_inputs(inputs: Any, message: str) -> None:
    for call in (ffebm.convert, ffebm.plan):
        with pytest.raises(ffebm.InputError, match=message):
            call(network(), inputs)


def test_torch_logs_nothing_beside_the_error() -> None:
    code = (
        "import torch, ffebm_compiler as ffebm\n"
        "try: ffebm.convert(torch.nn.Linear(6, 3), torch.randn(4, 7))\n"
        "except ffebm.InputError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("the model itself rejects the example inputs [(4, 7)]")
    assert ran.stderr == ""


@pytest.mark.parametrize("argument", ["force_digital", "force_analog", "block_ops"])
@pytest.mark.parametrize(
    ("value", "named"),
    [(None, "None"), (nn.Linear(6, 5), "a Linear"), (nn.Linear, "a type"), ([0], r"\[0\]"), (3, "3")],
)
def test_names_that_are_none(argument: str, value: Any, named: str) -> None:
    with pytest.raises(ffebm.InputError, match=rf"{argument} is {named}; expected a name such as '.*', or a sequence"):
        ffebm.convert(network(), X, **{argument: value})


def test_one_name_alone() -> None:
    assert ffebm.plan(network(), X, block_ops="avg_pool").options.block_ops == ("avg_pool",)
    with pytest.raises(ffebm.InputError, match="block_ops names 'avgpool'; expected some of"):
        ffebm.plan(network(), X, block_ops="avgpool")


def test_settings() -> None:
    for solver, named in ((ffebm.Anderson, "the class Anderson itself"), ("anderson", "a str")):
        with pytest.raises(ffebm.InputError, match=f"solver is {named}; expected a Solver such as"):
            ffebm.convert(network(), X, solver=solver)  # type: ignore[arg-type]
    hybrid = ffebm.convert(network(), X, feedback=np.float32(0.25))  # type: ignore[arg-type]
    assert hybrid.blocks[0].loop_gain == pytest.approx(0.25)
    with pytest.raises(ffebm.InputError, match="solver is the class Anderson itself"):
        hybrid.set_solver(ffebm.Anderson)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("auto", "dynamic_shapes is 'auto'; expected 'batch', None, or what torch.export takes"),
        (True, "dynamic_shapes is True; expected 'batch'"),
        ({"x": {0: torch.export.Dim("batch")}}, r"dynamic_shapes does not fit the inputs \(.*\): expected 'batch'"),
    ],
)
def test_dynamic_shapes(shapes: Any, message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.convert(network(), X, dynamic_shapes=shapes)
    free = ffebm.convert(network(), X, dynamic_shapes={"input": {0: torch.export.Dim("batch")}})
    assert free(X[:2]).shape == (2, 3)


@pytest.mark.parametrize(
    ("change", "x", "message"),
    [
        ({}, X.double(), r"input 'input' is torch\.float64 and the hybrid's weights are torch\.float32.* cast one"),
        ({"dtype": torch.float16}, X, r"input 'input' is torch\.float32 and the hybrid's weights are torch\.float16"),
        ({}, X.to("meta"), r"input 'input' is on meta and the hybrid's weights are on cpu: move one"),
        ({"device": "meta"}, X.to("meta"), r"on the meta device, where weights have no values"),
        ({"device": "meta"}, X, r"on the meta device, where weights have no values"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"force_digital": "0"}])
def test_inputs_of_another_kind_than_the_weights(
    change: dict[str, Any], x: Tensor, message: str, options: dict[str, Any]
) -> None:
    hybrid = ffebm.convert(network(), X, **options)
    hybrid.to(**change)
    with pytest.raises(ffebm.InputError, match=message):
        hybrid(x)


def test_a_source_that_casts_its_inputs_takes_any() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.float())

    hybrid = ffebm.convert(Casting(), X)
    assert torch.equal(hybrid(X.double()), hybrid(X))


def of_weights(hybrid: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda weights: torch.func.functional_call(hybrid, weights, (X,)).sum()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize(
    "call",
    [
        lambda hybrid: torch.vmap(hybrid)(X[:, None]),
        lambda hybrid: torch.func.grad(lambda x: hybrid(x).sum())(X),
        lambda hybrid: torch.func.jacrev(hybrid)(X),
        lambda hybrid: torch.func.grad(of_weights(hybrid))(dict(hybrid.named_parameters())),
        lambda hybrid: torch.vmap(of_weights(hybrid))({n: w.expand(2, *w.shape) for n, w in hybrid.named_parameters()}),
        lambda hybrid: torch.func.jvp(hybrid, (X,), (X,)),
    ],
)
def test_transforms(hybrid: ffebm.HybridModel, call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(ffebm.UnsupportedError, match=r"inside a transform of torch\.func.*to_digital\(\)"):
        call(hybrid)


def penalty(network: nn.Module) -> Tensor:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize(
    "call",
    [
        lambda hybrid: penalty(hybrid).backward(),
        lambda hybrid: torch.autograd.grad(penalty(hybrid), hybrid.get_parameter("0.weight"), allow_unused=True),
        lambda hybrid: torch.autograd.functional.hvp(lambda x: hybrid(x).sum(), X, X),
        lambda hybrid: torch.autograd.functional.hessian(lambda x: hybrid(x).square().sum(), X),
        lambda hybrid: torch.autograd.functional.jvp(hybrid, X, X),
    ],
)
@pytest.mark.parametrize("gradient", ["ep", "implicit", "unrolled"])
def test_second_derivatives(call: Callable[[nn.Module], object], gradient: str) -> None:
    hybrid = ffebm.convert(network(), X, gradient=gradient)
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1 has no derivative.*feedforward_mode.*to_digital\(\)"):
        call(hybrid)
    with hybrid.feedforward_mode():  # the remedies
        call(hybrid)
    call(hybrid.to_digital())


def test_second_derivatives_through_a_perturbed_part() -> None:
    hybrid = ffebm.convert(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), torch.rand(2, 3))
    hybrid.set_gradient("ep", feedforward="zeroth-order")
    x = torch.rand(2, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(hybrid(x).sum(), x, create_graph=True)
    with pytest.raises(ffebm.UnsupportedError, match=r"a digital part that is perturbed .* has no derivative"):
        gradient.sum().backward()


def test_a_graph_of_the_gradient_alone_is_no_mistake(hybrid: ffebm.HybridModel) -> None:
    hybrid(X).square().sum().backward()
    expected = [parameter.grad for parameter in hybrid.parameters()]
    found = torch.autograd.grad(hybrid(X).square().sum(), list(hybrid.parameters()), create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda hybrid: torch.autograd.functional.jacobian(hybrid, X, vectorize=True), "one error at a time"),
        (
            lambda hybrid: torch.autograd.functional.jacobian(
                hybrid, X, vectorize=True, strategy="forward-mode", strict=False
            ),
            "gradients in reverse mode only",
        ),
    ],
)
def test_batched_and_forward_derivatives(
    hybrid: ffebm.HybridModel, call: Callable[[nn.Module], Tensor], message: str
) -> None:
    with pytest.raises(ffebm.UnsupportedError, match=rf"block_1 .*{message}"):
        call(hybrid)
    with hybrid.feedforward_mode():  # the remedies
        expected = call(hybrid)
    assert torch.equal(call(hybrid.to_digital()), expected)


def test_export(hybrid: ffebm.HybridModel) -> None:
    with pytest.raises(ffebm.UnsupportedError, match=r"torch\.export cannot take a hybrid.*export_onnx"):
        torch.export.export(hybrid, (X,))
    assert torch.export.export(hybrid.to_digital(), (X,))


def test_check_gradients(hybrid: ffebm.HybridModel) -> None:
    with pytest.raises(ffebm.InputError, match="hybrid is a Sequential; expected a hybrid, which convert"):
        ffebm.check_gradients(network(), X, torch.sum)  # type: ignore[arg-type]
    with pytest.raises(ffebm.InputError, match="loss_fn is a Tensor; expected a function of the hybrid's output"):
        ffebm.check_gradients(hybrid, X, X)  # type: ignore[arg-type]
    frozen = ffebm.convert(network().requires_grad_(False), X)
    with pytest.raises(
        ffebm.GradientError, match="no parameter of the hybrid receives a gradient: set requires_grad=True"
    ):
        ffebm.check_gradients(frozen, X, torch.sum)


def test_load(hybrid: ffebm.HybridModel, tmp_path: Path) -> None:
    torch.save(hybrid.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("weights.pt", r"it is a file, and a saved hybrid is a folder; hybrid\.load_state_dict\(\)"),
        ("none", "there is no such folder"),
        ("empty", r"hybrid\.json, .* are missing"),
    ):
        with pytest.raises(ffebm.InputError, match=message):
            ffebm.load(tmp_path / path, network())
    with pytest.raises(ffebm.InputError, match="path is a Sequential; expected the folder that"):
        ffebm.load(network(), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ffebm.InputError, match=r"model is a (Posix|Windows)Path; expected the source"):
        ffebm.load(tmp_path, tmp_path)  # type: ignore[arg-type]


def test_pictures_under_the_name_of_another_format(hybrid: ffebm.HybridModel, tmp_path: Path) -> None:
    for write, name, own in (
        (hybrid.save_html, "a.svg", "html"),
        (hybrid.plan.save_html, "a.PNG", "html"),
        (hybrid.save_svg, "a.png", "svg"),
        (hybrid.plan.save_svg, "a.html", "svg"),
    ):
        with pytest.raises(ffebm.InputError, match=rf"path is .*{name}'; expected a name that ends in \.{own}"):
            write(tmp_path / name)
    assert not list(tmp_path.iterdir())
    hybrid.save_html(tmp_path / "page")  # no suffix, no promise
    hybrid.save_html(tmp_path / "v1.2")


def test_submodules_are_there_without_an_import_of_their_own() -> None:
    code = "import ffebm_compiler as ffebm; print(ffebm.onnx.verify.__name__, ffebm.drawing.save_html.__name__)"
    ran = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["verify", "save_html"]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", ["ep", "implicit"])
def test_a_loss_that_is_not_finite(factor: float, gradient: str) -> None:
    hybrid = ffebm.convert(network(), X, gradient=gradient)
    with pytest.raises(ffebm.GradientError, match="gradient of the loss at the outputs of block_1 holds NaN or inf"):
        (hybrid(X) * factor).sum().backward()
    assert all(parameter.grad is None for parameter in hybrid.parameters())
