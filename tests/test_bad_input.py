"""Every bad input is a clear error that says what was given, what was expected and what to do."""

from __future__ import annotations

import copy
import inspect
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from networks import MLP, DigitsCNN, digits_cnn, mlp, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler import drawing, onnx
from ffebm_compiler.passes.partition.compare import sweep
from ffebm_compiler.reports.numbers import number_of


def fails(
    kind: type[ffebm.FFEBMError], message: str, call: Callable[..., Any], *args: Any, **kwargs: Any
) -> ffebm.FFEBMError:
    """The error that a call raises: of this very kind, its message matched, in one line, with a remedy."""
    with pytest.raises(kind, match=message) as caught:
        call(*args, **kwargs)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


# -- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [ffebm.convert, ffebm.plan])
def test_model_without_weight_stationary_layers(call: Callable[..., Any]) -> None:
    model = nn.Sequential(nn.ReLU(), nn.LayerNorm(4), nn.Softmax(-1))
    fails(
        ffebm.UnsupportedError,
        r"Sequential has no weight-stationary layer.*linear, convolution",
        call,
        model,
        noise(2, 4),
    )


@pytest.mark.parametrize("call", [ffebm.convert, ffebm.plan])
@pytest.mark.parametrize(
    ("model", "named"),
    [(nn.Linear, "type"), (torch.relu, "builtin_function_or_method"), ({"w": 1}, "dict"), (None, "NoneType")],
    ids=["class", "function", "dictionary", "none"],
)
def test_something_that_is_no_module(call: Callable[..., Any], model: object, named: str) -> None:
    fails(ffebm.InputError, rf"needs a torch\.nn\.Module, got {named}: pass the model object", call, model, noise(2, 4))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_script_module() -> None:
    scripted = torch.jit.trace(nn.Linear(4, 3), noise(2, 4))
    fails(ffebm.InputError, r"TorchScript.*pass the eager nn\.Module", ffebm.convert, scripted, noise(2, 4))
    holds = nn.Sequential(nn.Linear(4, 4), scripted)
    fails(ffebm.InputError, r"module '1' is a TorchScript module.*put the eager", ffebm.convert, holds, noise(2, 4))


def test_data_parallel() -> None:
    wrapped = nn.DataParallel(nn.Linear(4, 3))
    fails(ffebm.InputError, r"wrapped in DataParallel: convert model\.module", ffebm.convert, wrapped, noise(2, 4))


def test_lazy_module() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    fails(ffebm.InputError, r"'1\.weight' is not initialised.*run the model once", ffebm.convert, model, noise(2, 4))


def test_meta_device() -> None:
    with torch.device("meta"):
        model = MLP()
    fails(
        ffebm.InputError,
        r"'layers\.0\.weight' is on the meta device and has no values to convert: load the weights",
        ffebm.convert,
        model,
        noise(2, 8),
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_model() -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 3)), {nn.Linear}, torch.qint8)
    fails(ffebm.InputError, r"'0' is quantised: pass the float model", ffebm.convert, model, noise(2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model, x = mlp()
    with torch.no_grad():
        model.layers[2].weight[1, 3] = value
    fails(ffebm.InputError, r"'layers\.2\.weight' has 1 values that are NaN or infinite", ffebm.convert, model, x)


class Branching(nn.Module):
    """Control flow on data, in a submodule."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if y.sum() > 0:  # the line
                return y
            return -y

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.inner = self.Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.relu(self.stem(x)))


def test_control_flow_on_data_names_module_and_line() -> None:
    lines, first = inspect.getsourcelines(Branching)
    line = first + next(index for index, text in enumerate(lines) if "# the line" in text)
    error = fails(ffebm.CaptureError, r"cannot be traced in module 'inner'", ffebm.convert, Branching(), noise(2, 4))
    assert re.search(rf"test_bad_input\.py, line {line}\)", str(error)), error
    assert "control flow" in str(error)


class Items(nn.Module):
    """A size that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)[: int(x.argmax())]


def test_size_that_depends_on_data_names_the_line() -> None:
    fails(
        ffebm.CaptureError,
        r"cannot be traced in module 'Items' \(.*test_bad_input\.py, line \d+\)",
        ffebm.convert,
        Items(),
        noise(2, 4),
    )


class Uncopyable(nn.Module):
    """Holds a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.lock = threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_model_that_cannot_be_copied() -> None:
    fails(
        ffebm.CaptureError,
        r"Uncopyable cannot be copied \(TypeError.*lock.*make it deep-copyable",
        ffebm.convert,
        Uncopyable(),
        noise(2, 4),
    )


# -- the inputs ----------------------------------------------------------------------------------


def test_inputs_that_the_model_rejects() -> None:
    model, _ = mlp()
    error = fails(
        ffebm.InputError, r"model itself rejects the example inputs \[\(2, 7\)\]", ffebm.convert, model, noise(2, 7)
    )
    assert "networks.py, line" in str(error)
    assert "pass inputs for which" in str(error)
    fails(ffebm.InputError, r"rejects the example inputs \[\]", ffebm.convert, model, ())
    fails(
        ffebm.InputError,
        r"rejects.*unexpected keyword argument 'extra'",
        ffebm.convert,
        model,
        noise(2, 8),
        {"extra": 1},
    )


@pytest.mark.parametrize("inputs", [None, "x", 3, {"x": 1}])
def test_example_inputs_of_a_wrong_type(inputs: object) -> None:
    fails(
        ffebm.InputError,
        rf"example_inputs must be a tensor or a tuple.*got {type(inputs).__name__}",
        ffebm.convert,
        nn.Linear(4, 3),
        inputs,
    )


def test_kwargs_of_a_wrong_type() -> None:
    fails(ffebm.InputError, r"kwargs must be a dictionary.*got list", ffebm.convert, nn.Linear(4, 3), noise(2, 4), [1])


def test_nan_in_example_inputs() -> None:
    x = noise(2, 4)
    x[1, 2] = float("nan")
    fails(ffebm.InputError, r"example input 0 of shape \(2, 4\) holds NaN", ffebm.convert, nn.Linear(4, 3), x)


def test_inputs_of_the_hybrid() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    nan = x.clone()
    nan[0, 0] = float("nan")
    for value, message in (
        (nan, r"input 'x' of shape \(6, 8\) holds NaN"),
        (noise(2, 7), r"input 'x' has shape \(2, 7\), expected \(any, 8\): convert again"),
        (noise(8), r"input 'x' has shape \(8,\), expected \(any, 8\)"),
        (torch.ones(2, 8, dtype=torch.long), r"input 'x' has dtype torch.int64, expected a floating-point one"),
        ("text", r"input 'x' must be a tensor of shape \(any, 8\), got str"),
    ):
        fails(ffebm.InputError, message, hybrid, value)
    fails(ffebm.InputError, r"captured structure.*got nothing, expected x \(any, 8\)", hybrid)
    fails(ffebm.InputError, r"do not have the captured structure", hybrid, x, x)
    fails(ffebm.InputError, r"do not have the captured structure", hybrid, y=x)


def test_infinite_inputs_and_spoilt_weights_are_blamed() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    infinite = x.clone()
    infinite[0, 0] = float("inf")
    fails(ffebm.InputError, r"input 0 of block_1, of shape \(6, 8\), holds NaN or infinite", hybrid, infinite)
    with torch.no_grad():
        hybrid.get_parameter("layers.1.weight")[0, 0] = float("nan")
    fails(ffebm.InputError, r"weight \d of block_1, of shape \(10, 12\), holds NaN.*learning rate", hybrid, x)
    fails(ffebm.InputError, r"weight \d of block_1", hybrid.recertify)


def test_a_number_that_became_a_constant() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, gain: float) -> Tensor:
            return self.linear(x) * gain

    hybrid = ffebm.convert(Gain(), (noise(2, 4), 2.0))
    assert hybrid(noise(2, 4), 2.0).shape == (2, 3)
    fails(ffebm.InputError, r"input 'gain' is 3\.0, but the graph was captured with 2\.0", hybrid, noise(2, 4), 3.0)


# -- the settings --------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", [0, 0.0, 1, 1.0, -0.1, 1.5, float("nan"), "weak", None, True])
def test_feedback_outside_its_range(feedback: Any) -> None:
    model, x = mlp()
    message = rf"feedback is {re.escape(repr(feedback))}; expected a loop gain strictly between 0 and 1.*'symmetric'"
    fails(ffebm.InputError, message, ffebm.convert, model, x, feedback=feedback)
    hybrid = ffebm.convert(model, x)
    before = hybrid.blocks[0].certificate
    fails(ffebm.InputError, message, hybrid.set_feedback, feedback)
    assert hybrid.blocks[0].certificate == before


@pytest.mark.parametrize(
    "field", ["tile_rows", "tile_cols", "tiles_per_core", "cores", "layers_per_block", "devices_per_weight", "adc_bits"]
)
@pytest.mark.parametrize("value", [0, -3])
def test_hardware_with_a_field_that_is_not_positive(field: str, value: int) -> None:
    fails(ffebm.HardwareError, rf"{field}.*{value}", ffebm.Hardware, **{field: value})


def test_unknown_hardware() -> None:
    model, x = mlp()
    fails(ffebm.HardwareError, r"crossbar-255.*crossbar-256", ffebm.convert, model, x, hardware="crossbar-255")
    fails(ffebm.HardwareError, r"17|int", ffebm.convert, model, x, hardware=17)


@pytest.mark.parametrize("argument", ["force_digital", "force_analog"])
@pytest.mark.parametrize("call", [ffebm.convert, ffebm.plan])
def test_glob_that_matches_nothing(argument: str, call: Callable[..., Any]) -> None:
    model, x = digits_cnn()
    fails(
        ffebm.InputError,
        rf"{argument} pattern 'layer4\.\*' matches no module of the model; its modules are stem, bn, act, block1",
        call,
        model,
        x,
        **{argument: ("head", "layer4.*")},
    )


def test_contradicting_and_impossible_placements() -> None:
    model, x = digits_cnn()
    fails(
        ffebm.InputError,
        r"'head' matches both force_digital and force_analog",
        ffebm.convert,
        model,
        x,
        force_digital="head",
        force_analog=("he*",),
    )
    small = ffebm.Hardware(tile_rows=4, tile_cols=8, tiles_per_core=2)  # 9 rows of one 3×3 kernel fit no core
    fails(
        ffebm.UnsupportedError,
        r"force_analog asks for 'block1\.conv1', but it needs 9 tiles and a core has 2: raise tiles_per_core",
        ffebm.convert,
        model,
        x,
        hardware=small,
        force_analog="block1.conv1",
    )
    fails(
        ffebm.UnsupportedError,
        r"weight-stationary layers cannot be analog.*block1\.conv1: it needs",
        ffebm.convert,
        model,
        x,
        hardware=small,
        on_unsupported="error",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"energy": "boltzmann"}, r"energy is 'boltzmann'; expected 'hopfield' or 'resistive' or 'unamplified' "),
        ({"gradient": "backprop"}, r"gradient is 'backprop'; expected 'ep', 'implicit', 'unrolled'"),
        ({"gradient": 3}, r"gradient is 3"),
        ({"solver": "newton"}, r"solver is a str; expected a Solver"),
        ({"block_ops": ("add", "softmax")}, r"block_ops names 'softmax'; expected some of 'add', 'reshape'"),
        ({"on_unsupported": "ignore"}, r"on_unsupported is 'ignore'; expected 'digital' or 'error'"),
        ({"plan": "plan.json"}, r"plan is a str; expected a Plan"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_unknown_settings(options: dict[str, Any], message: str) -> None:
    model, x = mlp()
    fails(ffebm.InputError, message, ffebm.convert, model, x, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ffebm.EquilibriumPropagation(beta=0), r"beta is 0; expected a number in \(0, 100\]"),
        (lambda: ffebm.EquilibriumPropagation(beta=-1.0), r"beta is -1\.0"),
        (lambda: ffebm.EquilibriumPropagation(variant="both"), r"variant is 'both'"),
        (lambda: ffebm.GaussSeidel(rtol=0.0), r"rtol is 0\.0"),
        (lambda: ffebm.GaussSeidel(max_sweeps=0), r"max_sweeps is 0; expected a positive integer"),
        (lambda: ffebm.Anderson(on_failure="ignore"), r"on_failure is 'ignore'; expected 'isolate', 'error' or 'warn'"),
    ],
    ids=["beta zero", "beta negative", "variant", "rtol", "sweeps", "failure"],
)
def test_estimators_and_solvers_check_their_settings(make: Callable[[], object], message: str) -> None:
    fails(ffebm.InputError, message, make)


def test_unknown_schedule() -> None:
    model, x = mlp()
    solver = ffebm.GaussSeidel(schedule="random")
    with pytest.raises(ffebm.InputError, match=r"schedule is 'random'; expected one of 'auto'"):
        ffebm.convert(model, x, solver=solver)(x)


def test_plan_of_another_model() -> None:
    model, x = mlp()
    plan = ffebm.plan(seeded(lambda: MLP((8, 5, 3))), x)
    fails(
        ffebm.PlanError,
        r"made for another model.*make it again with ffebm\.plan\(\)",
        ffebm.convert,
        model,
        x,
        plan=plan,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", r"is not JSON \(line 1"),
        ("[]", r"not a plan of schema 2 \(found 'list'\)"),
        ('{"schema": 99}', r"not a plan of schema 2 \(found 99\)"),
        ('{"schema": 2}', r"has no 'graph'.*make it again"),
    ],
)
def test_malformed_plans(tmp_path: Any, text: str, message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    fails(ffebm.PlanError, message, ffebm.Plan.from_json, path)
    fails(ffebm.PlanError, r"cannot be read: No such file", ffebm.Plan.from_json, tmp_path / "missing.json")


def test_paths_that_a_plan_does_not_have() -> None:
    model, x = digits_cnn()
    plan = ffebm.plan(model, x)
    fails(
        ffebm.PlanError, r"no module or weight 'block1\.conv3'.*did you mean block1\.conv", plan.explain, "block1.conv3"
    )
    fails(ffebm.PlanError, r"no block 'block_99'", plan.block, "block_99")


def test_settle_and_energy_check_what_they_get() -> None:
    model, x = mlp()
    (block,) = ffebm.convert(model, x).blocks
    fails(ffebm.InputError, r"block_1 takes 1 inputs \(x\), got 2", block.settle, x, x)
    fails(ffebm.InputError, r"block_1 has 4 states, got 1", block.energy, x, states=[x])


def test_check_gradients_needs_a_scalar_loss_and_a_parameter() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    told = r"loss_fn must return a finite scalar tensor, got "
    fails(ffebm.InputError, told + r"a tensor of shape \(\d+, \d+\)", ffebm.check_gradients, hybrid, x, lambda y: y)
    fails(ffebm.InputError, told + "nan", ffebm.check_gradients, hybrid, x, lambda y: y.sum() * float("nan"))
    fails(ffebm.InputError, told + "float", ffebm.check_gradients, hybrid, x, lambda y: float(y.detach().sum()))
    report = ffebm.check_gradients(hybrid, x, lambda y: y.sum())
    fails(
        ffebm.InputError, r"estimator is 'backprop'; expected one of ep, implicit, unrolled", report.worst, "backprop"
    )
    hybrid.requires_grad_(False)
    with pytest.raises((ffebm.GradientError, RuntimeError)):
        ffebm.check_gradients(hybrid, x, lambda y: y.sum())


@pytest.mark.parametrize("path", [None, 5, True, b"hybrid.onnx", ["hybrid.onnx"]])
def test_paths_that_are_none(path: Any) -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    told = rf"is {re.escape(repr(path))}; expected the name of "
    fails(ffebm.InputError, f"path {told}the file to write, such as 'hybrid.onnx'", hybrid.export_onnx, path)
    fails(ffebm.InputError, f"path {told}the folder to write", hybrid.export_onnx, path, parts="digital")
    fails(ffebm.InputError, f"path {told}the folder to write", hybrid.save, path)
    fails(ffebm.InputError, f"path {told}the export", onnx.verify, hybrid, path, (x,))
    fails(ffebm.InputError, f"folder {told}the folder of an export", onnx.run, path, x)
    fails(ffebm.InputError, f"folder {told}the export", onnx.quantise, path, x)
    fails(ffebm.InputError, f"path {told}a file to write", hybrid.plan.to_json, path)
    fails(ffebm.InputError, f"path {told}the file of the plan", ffebm.Plan.from_json, path)


@pytest.mark.parametrize(
    ("name", "kind", "made"),
    [
        ("comparison", "Comparison", "hybrid.compare"),
        ("gradients", "GradientReport", "ffebm.check_gradients"),
        ("diagnosis", "Diagnosis", "hybrid.diagnose"),
        ("loop_gains", "Sequence", "drawing.loop_gain_points"),
    ],
)
def test_measurements_of_another_kind(tmp_path: Any, name: str, kind: str, made: str) -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    told = rf"{name} is a int; expected a {kind}, which {re.escape(made)}"
    fails(ffebm.InputError, told, hybrid.save_html, tmp_path / "page.html", **{name: 5})
    told = "a point of loop_gains is a str; expected a GainPoint"
    fails(ffebm.InputError, told, hybrid.save_html, tmp_path / "page.html", loop_gains="a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (torch.tensor([0.5, 0.4]), r"Tensor and shape \(2,\)"),
        (np.array([0.5, 0.4]), r"ndarray and shape \(2,\)"),
        (torch.tensor([]), r"Tensor and shape \(0,\)"),
        ([0.5], "list"),
        (np.bool_(True), "bool"),
        (torch.tensor(1j), "complex"),
    ],
)
def test_what_evaluate_may_not_return(found: Any, told: str) -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x)
    told = rf"evaluate returned an object of type {told} "
    fails(ffebm.InputError, told + "with the source", ffebm.sensitivity, hybrid, lambda _: found, "pcm", draws=1)
    fails(ffebm.InputError, told + "at loop gain 0.01", drawing.feedback_sweep, hybrid, lambda _: found)
    fails(ffebm.InputError, told, drawing.loop_gain_points, hybrid, x, evaluate=lambda _: found)


@pytest.mark.parametrize("found", [0.5, torch.tensor([[0.5]]), np.array([0.5]), np.float32(0.5), np.array(0.5)])
def test_what_evaluate_may_return(found: Any) -> None:
    assert number_of(found, "") == 0.5


def test_a_number_beyond_the_largest_is_infinite() -> None:
    assert number_of(10**400, "") == float("inf")


# -- equilibria that do not exist ----------------------------------------------------------------


def expansive() -> tuple[MLP, Tensor]:
    """Weights of the size of trained ones: at symmetric feedback the ReLU energy has no minimum."""
    model = seeded(lambda: MLP((8, 12, 12, 5)))
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(4 / torch.linalg.matrix_norm(layer.weight, 2))
    return model, noise(6, 8)


def test_block_that_does_not_settle_names_itself_and_the_remedy() -> None:
    model, x = expansive()
    hybrid = ffebm.convert(model, x, feedback="symmetric")
    error = fails(ffebm.ConvergenceError, r"^free phase of block_1 diverged", hybrid, x)
    gain = hybrid.blocks[0].loop_gain
    assert gain > 1
    assert f"loop gain at symmetric feedback is {gain:.3g}" in str(error)
    assert "feedback=0.1" in str(error)
    with pytest.raises(ffebm.ConvergenceError):
        hybrid.blocks[0].settle(x)
    # The same model at the default feedback settles.
    hybrid.set_feedback(0.1)
    assert hybrid(x).isfinite().all()


def test_block_that_runs_out_of_sweeps_reports_its_residual() -> None:
    model, x = mlp()
    hybrid = ffebm.convert(model, x, feedback=0.9, solver=ffebm.GaussSeidel(max_sweeps=2))
    error = fails(ffebm.ConvergenceError, r"free phase of block_1 did not settle in 2 sweeps", hybrid, x)
    residual = re.search(r"relative residual ([\d.e+-]+), asked for ([\d.e+-]+)\)", str(error))
    assert residual is not None
    assert float(residual[2]) < float(residual[1]) < 1
    assert "loop gain was set to 0.9 and certified as 0.9" in str(error)
    assert "max_sweeps" in str(error)


def test_bounded_oscillation_is_an_error_too() -> None:
    model = seeded(lambda: MLP((8, 12, 12, 5), activation=lambda: nn.Hardtanh(-1.0, 1.0)))
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(9)
    x = noise(6, 8)
    hybrid = ffebm.convert(model, x, feedback="symmetric", solver=ffebm.GaussSeidel(max_sweeps=3, on_failure="error"))
    fails(ffebm.ConvergenceError, r"did not settle in 3 sweeps.*loop gain", hybrid, x)


def test_warning_instead_on_request() -> None:
    model, x = mlp()
    solver = ffebm.GaussSeidel(max_sweeps=2, on_failure="warn")
    hybrid = ffebm.convert(model, x, feedback=0.9, solver=solver)
    with pytest.warns(ffebm.ConvergenceWarning, match=r"free phase of block_1 did not settle in 2 sweeps"):
        output = hybrid(x)
    assert output.isfinite().all()
    assert not hybrid.blocks[0].module.last.converged
    with pytest.warns(ffebm.ConvergenceWarning, match=r"nudged phase \(β = \+1e-08\) of block_1"):
        output.sum().backward()
    # What is not finite stays an error: there is nothing to go on with.
    model, x = expansive()
    hybrid = ffebm.convert(model, x, feedback="symmetric", solver=ffebm.GaussSeidel(on_failure="warn"))
    fails(ffebm.ConvergenceError, r"diverged: its states are not finite", hybrid, x)


@pytest.mark.parametrize(
    ("estimator", "phase"),
    [("ep", r"nudged phase \(β = \+1e-08\) of block_1"), ("implicit", "adjoint system of block_1")],
)
def test_backward_phase_that_does_not_settle_is_named(estimator: str, phase: str) -> None:
    first, second, last = (nn.Linear(8, size, bias=False) for size in (8, 8, 3))
    layers = [first, nn.Tanh(), second, nn.Tanh(), last]
    x = torch.zeros(2, 8)  # its states are their own equilibrium, which one sweep finds
    solver = ffebm.GaussSeidel(max_sweeps=1)
    hybrid = ffebm.convert(seeded(lambda: nn.Sequential(*layers)), x, feedback=0.5, gradient=estimator, solver=solver)
    output = hybrid(x)
    with pytest.raises(ffebm.ConvergenceError, match=phase):
        output.sum().backward()


def test_sources_stay_as_they_are_after_an_error() -> None:
    bad: list[tuple[nn.Module, Any, dict[str, Any]]] = [
        (DigitsCNN(4), noise(5, 1, 8, 7, 3), {}),
        (Branching(), noise(2, 4), {}),
        (DigitsCNN(4), noise(5, 1, 8, 8), {"force_digital": "nothing"}),
        (
            DigitsCNN(4),
            noise(5, 1, 8, 8),
            {"on_unsupported": "error", "hardware": ffebm.Hardware(tiles_per_core=1, tile_rows=8)},
        ),
    ]
    for model, x, options in bad:
        model.train()
        list(model.modules())[1].eval()
        flags = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        attributes = [set(vars(module)) for module in model.modules()]
        random = torch.get_rng_state()
        with warnings.catch_warnings(), pytest.raises(ffebm.FFEBMError):
            ffebm.convert(model, x, **options)
        assert torch.equal(torch.get_rng_state(), random)
        assert [module.training for module in model.modules()] == flags
        assert [set(vars(module)) for module in model.modules()] == attributes
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_every_error_is_an_ffebm_error() -> None:
    from ffebm_compiler import errors

    kinds = {name: getattr(errors, name) for name in errors.__all__}
    assert all(issubclass(kind, ffebm.FFEBMError | ffebm.FFEBMWarning) for kind in kinds.values())
    with pytest.warns(ffebm.FFEBMDeprecationWarning, match="NotYetError is deprecated"):
        assert ffebm.NotYetError is kinds.pop("NotYetError")
    assert all(getattr(ffebm, name) is kind for name, kind in kinds.items())


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc])
def test_compressed_sparse_buffers_are_refused_by_name(layout: torch.layout) -> None:
    model = nn.Linear(4, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls them a beta feature
        model.register_buffer("graph", torch.eye(4).to_sparse(layout=layout))
    with pytest.raises(
        ffebm.InputError, match=r"'graph' is a sparse tensor of layout torch.sparse_cs[rc].*to_sparse_coo\(\)"
    ):
        ffebm.convert(model, noise(3, 4))


# -- plans, reports and devices -------------------------------------------------------------------


def test_arguments_of_plans_and_reports() -> None:
    model, x = mlp()
    plan = ffebm.plan(model, x)
    hybrid = ffebm.convert(model, x)
    fails(ffebm.PlanError, "the other plan is a NoneType; expected a Plan", plan.diff, None)
    fails(ffebm.PlanError, "path is a NoneType; expected a module path", plan.explain, None)
    fails(ffebm.HardwareError, "sweep needs a list of values for 'tile_rows', got 64", sweep, plan, {"tile_rows": 64})
    fails(ffebm.HardwareError, "sweep needs fields with lists of values, as .*, got None", sweep, plan, None)
    for phases in (10**400, 0, True, 1.5):
        fails(
            ffebm.InputError,
            "expected a whole number of at least 1 and at most 1000000",
            plan.cost_report,
            nudged_phases=phases,
        )
    for sweeps in (-1, 0, True, 1.5, None):
        fails(ffebm.InputError, "expected the number of sweeps to record", hybrid.diagnose, x, sweeps=sweeps)
    fails(ffebm.HardwareError, "path is a NoneType; expected the path of a .toml", ffebm.Hardware.from_file, None)


def test_settings_of_devices() -> None:
    fails(ffebm.InputError, "times is 1; expected a tuple with an entry for each time", ffebm.Relaxation, 1, 0.1)
    fails(ffebm.InputError, "sigmas is 0.1; expected a tuple with an entry for", ffebm.Relaxation, (2,), 0.1)
    wrong = r"times\[0\] is 0; expected a finite number above 1, later than start, when the programming error"
    fails(ffebm.InputError, wrong, ffebm.Relaxation, (0, 1), (0.1, 0.2))
    wrong = r"times\[1\] is 2; expected a finite number above 2, later than the time before"
    fails(ffebm.InputError, wrong, ffebm.Relaxation, (2, 2), (0.1, 0.2))
    fails(ffebm.InputError, "seconds is 1000", ffebm.convert(*mlp(), devices="pcm").age, 10**400)


def test_a_count_of_costs_is_at_least_one() -> None:
    model, x = mlp()
    times = {"read_ns": 10, "adc_ns": 1, "dac_ns": 1}
    none = ffebm.plan(model, x, hardware=ffebm.Hardware(costs={**times, "converters": 0}))
    fails(ffebm.HardwareError, r"costs\['converters'\] is 0; expected at least 1, the converters of", none.cost_report)
    assert ffebm.plan(model, x, hardware=ffebm.Hardware(costs={**times, "converters": 1})).cost_report().latency.known
