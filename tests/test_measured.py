"""Equilibria that a fabric measures: the gradient, when it is programmed, what goes wrong, what is refused."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import drn_networks
import numpy as np
import pytest
import torch
from fabrics import Bench, Boards
from finite_differences import parameter_gradients, squared_error
from networks import CASES, MLP, noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.estimators.base import Estimator

CENTERED = ffebm.EquilibriumPropagation(1e-3, "centered")
TWO_BLOCKS = ffebm.Hardware(layers_per_block=2)


def made(case: str = "mlp", dtype: torch.dtype = torch.float64, **options: Any) -> tuple[ffebm.HybridModel, Tensor]:
    model, x = CASES[case].make(nn.ReLU)
    model, x = model.to(dtype), x.to(dtype)
    settings = {"energy": "resistive", "feedback": 0.3, "gradient": CENTERED, **CASES[case].options, **options}
    return ffebm.convert(model, x, **settings), x


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).norm() / value.norm()) for name, value in expected.items())


@pytest.mark.parametrize("case", ["mlp", "branches", "projections", "convolutions", "experts"])
@pytest.mark.parametrize("variant", ["positive", "negative", "centered"])
def test_the_contrast_of_measured_states_is_the_gradient(case: str, variant: Any) -> None:
    """That of computed states, in deviation coordinates, at the same β; and centered at a small β the exact one."""
    hybrid, x = made(case, solver=ffebm.GaussSeidel(rtol=1e-13))
    hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-2, variant))
    output, same = hybrid(x).detach(), parameter_gradients(hybrid, x)
    hybrid.set_gradient("unrolled")
    exact = parameter_gradients(hybrid, x)
    hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-2, variant))
    hybrid.set_solver(ffebm.Measured(Bench()))
    assert error(parameter_gradients(hybrid, x), same) <= 1e-8
    if variant == "centered":
        hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-4, variant))
        assert error(parameter_gradients(hybrid, x), exact) <= 1e-6
    torch.testing.assert_close(hybrid(x).detach(), output, rtol=1e-9, atol=1e-10)
    hybrid.eval()
    with torch.no_grad():
        torch.testing.assert_close(hybrid(x), output, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("energy", ["drn", "unamplified"])
@pytest.mark.parametrize("kind", ["one hidden", "two hidden", "convolutional", "residual"])
def test_circuits_without_amplifiers(kind: str, energy: str) -> None:
    model, x, options = drn_networks.made(kind)
    solver = ffebm.GaussSeidel(rtol=1e-13)
    hybrid = ffebm.convert(model, x, energy=energy, gradient=CENTERED, solver=solver, **options)
    output, expected = hybrid(x).detach(), parameter_gradients(hybrid, x)
    hybrid.set_solver(ffebm.Measured(Bench()))
    assert error(parameter_gradients(hybrid, x), expected) <= 1e-6
    torch.testing.assert_close(hybrid(x).detach(), output, rtol=1e-9, atol=1e-10)


def test_the_contrast_loses_no_digits_in_a_float32_network() -> None:
    """s⁺ − s⁻ of a nudge of 1e-4 would keep three digits in float32. It is formed from what was measured."""
    exact, x = made(gradient="unrolled", solver=ffebm.GaussSeidel(rtol=1e-13))
    expected = parameter_gradients(exact, x)
    hybrid, x = made(dtype=torch.float32, gradient=ffebm.EquilibriumPropagation(1e-4, "centered"))
    hybrid.set_solver(ffebm.Measured(Bench()))
    assert error(parameter_gradients(hybrid, x.float()), expected) <= 1e-5


def test_a_fabric_of_a_hopfield_block() -> None:
    """Any energy can be measured: here a fabric that knows the matrices of two layers."""

    class Hopfield:
        def program(self, block: Any, weights: Any) -> None:
            c = block.setting.scales
            self.w1, self.b1, self.w2, self.b2 = weights
            self.gamma = c[1] / c[0]

        def settle(self, inputs: Any, nudge: Any) -> Any:
            (x,) = inputs
            one, two = (0.0, 0.0) if nudge is None else (0.0 if part is None else part for part in nudge)
            s2 = torch.zeros(len(x), len(self.b2), dtype=x.dtype)
            for _ in range(500):
                s1 = torch.tanh(x @ self.w1.T + self.b1 + self.gamma * s2 @ self.w2 + one)
                s2 = s1 @ self.w2.T + self.b2 + two
            return [s1.numpy(), s2]  # arrays are as good as tensors

    model = seeded(lambda: nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))).double()
    x = noise(5, 6).double()
    hybrid = ffebm.convert(model, x, feedback=0.3, gradient="unrolled", solver=ffebm.GaussSeidel(rtol=1e-13))
    expected = parameter_gradients(hybrid, x)
    hybrid.set_gradient(CENTERED)
    hybrid.set_solver(ffebm.Measured(Hopfield()))
    assert error(parameter_gradients(hybrid, x), expected) <= 1e-6
    hybrid.set_solver(ffebm.Measured(Bench()))
    with pytest.raises(ffebm.UnsupportedError, match="block_1: its energy, 'hopfield', is not that of a circuit"):
        hybrid(x)


@pytest.mark.parametrize(
    "estimator",
    [ffebm.ContrastiveLearning(0.01), ffebm.CoupledLearning(1e-4, "centered"), ffebm.CoupledLearning(1e-4)],
    ids=str,
)
def test_states_that_are_held(estimator: Estimator) -> None:
    hybrid, x = made(gradient=estimator, solver=ffebm.GaussSeidel(rtol=1e-13))
    expected, bench = parameter_gradients(hybrid, x), Bench()
    hybrid.set_solver(ffebm.Measured(bench))
    assert error(parameter_gradients(hybrid, x), expected) <= 1e-7
    assert "hold" in bench.calls


def test_coupled_learning_needs_a_fabric_that_holds_states() -> None:
    class Free:
        def __init__(self) -> None:
            self.bench = Bench()
            self.program, self.settle = self.bench.program, self.bench.settle

    hybrid, x = made(gradient="coupled", solver=ffebm.Measured(Free()))
    output = hybrid(x)
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1: the fabric Free holds no states.*method hold"):
        squared_error(output).backward()


def test_it_is_programmed_when_weights_or_gains_have_changed_and_only_then() -> None:
    hybrid, x = made()
    bench = Bench()
    hybrid.set_solver(ffebm.Measured(bench))
    programs = 0

    def asked(changed: bool) -> None:
        nonlocal programs
        programs += changed
        parameter_gradients(hybrid, x)
        assert bench.calls.count("program") == programs, bench.calls

    asked(True)
    asked(False)
    assert bench.calls == ["program", "settle", "nudge", "nudge", "settle", "nudge", "nudge"]
    hybrid.eval()
    hybrid(x[:2])  # another batch, another mode
    hybrid.load_state_dict(hybrid.state_dict())
    hybrid.train()
    asked(False)
    torch.optim.SGD(hybrid.parameters(), 1e-3).step()
    asked(True)
    asked(False)
    hybrid.get_parameter("layers.0.bias").data[0] += 0.1  # which raises no counter
    asked(True)
    hybrid.set_feedback(0.4)
    asked(True)
    other = copy.deepcopy(hybrid)
    assert other.energy_blocks["block_1"].solver.fabric is bench  # a copied model is no second chip
    other(x)
    asked(False)
    with torch.no_grad():
        other.get_parameter("layers.0.bias").add_(0.1)
    other(x)
    programs += 1
    asked(True)


def test_a_convolution_of_another_size_is_another_circuit() -> None:
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3))).double()
    bench, small, large = Bench(), noise(2, 1, 6, 6).double(), noise(2, 1, 7, 7).double()
    free = {
        "dynamic_shapes": ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC},)
    }
    hybrid = ffebm.convert(model, large, energy="resistive", solver=ffebm.GaussSeidel(rtol=1e-13), **free)
    expected = [hybrid(x).detach() for x in (small, large)]
    hybrid.set_solver(ffebm.Measured(bench))
    for x, output in zip((small, large), expected, strict=True):
        torch.testing.assert_close(hybrid(x).detach(), output, rtol=1e-9, atol=1e-10)
        hybrid(x)
    assert bench.calls.count("program") == 2


def test_several_blocks() -> None:
    hybrid, x = made(hardware=TWO_BLOCKS, gradient="unrolled", solver=ffebm.GaussSeidel(rtol=1e-13))
    assert len(hybrid.blocks) == 2
    expected = parameter_gradients(hybrid, x)
    hybrid.set_gradient(ffebm.EquilibriumPropagation(1e-6, "centered"))
    bench, boards = Bench(), Boards()
    hybrid.set_solver(ffebm.Measured(bench))  # one chip, programmed in turn
    assert error(parameter_gradients(hybrid, x), expected) <= 1e-6
    assert bench.calls.count("program") == 3  # block_1, block_2, and block_1 again in backward
    hybrid.set_solver(ffebm.Measured(boards))  # a chip a block
    for _ in range(2):
        assert error(parameter_gradients(hybrid, x), expected) <= 1e-6
    assert [board.block.name for board in boards.benches] == ["block_1", "block_2"]
    hybrid.train()  # which sets the amplifiers for the new weights
    torch.optim.SGD(hybrid.parameters(), 1e-3).step()
    hybrid(x)
    assert [board.block.name for board in boards.benches] == ["block_1", "block_2"] * 2


def test_two_networks_that_share_a_fabric() -> None:
    bench = Bench()
    pairs = []
    for seed in (0, 1):
        model, x = seeded(MLP, seed).double(), noise(6, 8).double()
        hybrid = ffebm.convert(model, x, energy="resistive", solver=ffebm.GaussSeidel(rtol=1e-13))
        pairs.append((hybrid, x, hybrid(x).detach()))
        hybrid.set_solver(ffebm.Measured(bench))
    for hybrid, x, output in pairs * 2:
        torch.testing.assert_close(hybrid(x).detach(), output, rtol=1e-9, atol=1e-10)
    assert bench.calls.count("program") == 4


def test_blocks_of_one_layer_are_not_measured() -> None:
    bench = Bench()
    hybrid, x = made(hardware=ffebm.Hardware(layers_per_block=1), solver=ffebm.Measured(bench))
    source = CASES["mlp"].make(nn.ReLU)[0].double()
    assert error(parameter_gradients(hybrid, x), parameter_gradients(source, x)) <= 1e-12
    assert bench.calls == []


# -- what goes wrong -------------------------------------------------------------------------


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fail(found: Any) -> Any:
        raise error

    return fail


def with_nan(states: list[Tensor]) -> list[Tensor]:
    states[0][2, 1] = float("nan")
    return states


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "fails": (raising(OSError("no route to the bench")), r"failed \(OSError: no route to the bench\)\. No weight was"),
    "times out": (raising(TimeoutError()), r"failed \(TimeoutError\)"),
    "hangs": (lambda found: time.sleep(2), r"failed \(TimeoutError: no answer in 0.5 s\)"),
    "NaN": (with_nan, r"NaN or infinite values in the state of layers.0, for 1 of 6 samples \(the first is 2\)"),
    "infinite": (lambda found: [found[0] / 0, *found[1:]], "NaN or infinite values in the state of layers.0"),
    "shape": (
        lambda found: [found[0][:, :-1], *found[1:]],
        r"layers.0 of shape \(6, 8\); expected \(6, 9\)|expected \(6",
    ),
    "one sample": (
        lambda found: [state[:1] for state in found],
        r"of shape \(1, \d+\); expected \(6, \d+\), batch first",
    ),
    "whole numbers": (lambda found: [state.long() for state in found], "in torch.int64; expected torch.float64"),
    "complex": (lambda found: [state + 0j for state in found], "in torch.complex128; expected torch.float64"),
    "half": (lambda found: [state.half() for state in found], "in torch.float16; expected torch.float64"),
    "too few": (lambda found: found[:-1], r"returned 3 states; expected 4, one for each of the layers layers.0, "),
    "too many": (lambda found: [*found, found[0]], "returned 5 states; expected 4"),
    "one tensor": (lambda found: found[0], "returned a Tensor; expected a list of 4 tensors"),
    "nothing": (lambda found: None, "returned a NoneType; expected a list of 4 tensors"),
    "text": (lambda found: ["s"] * 4, "returned a str as the state of layers.0; expected a tensor or an array"),
}


@pytest.mark.parametrize("when", ["settle", "nudge"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_an_error_and_changes_nothing(fault: str, when: str) -> None:
    change, message = FAULTS[fault]
    faulty = False

    def at(method: str, found: Any) -> Any:
        return change(found) if faulty and method == when else found

    hybrid, x = made()
    bench = Bench(at)
    hybrid.set_solver(ffebm.Measured(bench, timeout=0.5 if fault == "hangs" else None))
    expected = parameter_gradients(hybrid, x)  # which stay in the parameters
    before = {name: value.clone() for name, value in hybrid.state_dict().items()}
    faulty = True
    with pytest.raises(ffebm.FabricError, match=message) as raised:
        squared_error(hybrid(x)).backward()
    assert str(raised.value).startswith("block_1: settle of the fabric Bench ")
    assert all(torch.equal(value, before[name]) for name, value in hybrid.state_dict().items())
    assert error({n: p.grad for n, p in hybrid.named_parameters() if p.grad is not None}, expected) == 0
    faulty = False
    programs = bench.calls.count("program")
    assert error(parameter_gradients(hybrid, x), expected) <= 1e-9
    assert bench.calls.count("program") == programs + 1  # nobody knew what it held


def test_program_that_fails() -> None:
    def refuse(method: str, found: Any) -> Any:
        raise ValueError("conductance out of range")

    hybrid, x = made(solver=ffebm.Measured(Bench(refuse)))
    with pytest.raises(ffebm.FabricError, match=r"block_1: program of the fabric Bench failed \(ValueError: conduct"):
        hybrid(x)


@pytest.mark.parametrize("accumulated", [False, True])
def test_no_gradient_is_added_by_a_backward_that_fails(accumulated: bool) -> None:
    """The last block and the digital head have their gradients when the first block's measurement fails."""
    faulty = False

    def at(method: str, found: Any) -> Any:
        if faulty and method == "nudge" and bench.block.name == "block_1":
            raise OSError("lost")
        return found

    hybrid, x = made(hardware=TWO_BLOCKS)
    bench = Bench(at)
    hybrid.set_solver(ffebm.Measured(bench))
    expected = parameter_gradients(hybrid, x)
    if not accumulated:
        hybrid.zero_grad()
    places = [p.grad for p in hybrid.parameters()]
    faulty = True
    loss = squared_error(hybrid(x))
    with pytest.raises(ffebm.FabricError, match="block_1"):
        loss.backward()
    assert all(p.grad is place for p, place in zip(hybrid.parameters(), places, strict=True))
    if accumulated:
        assert error({n: p.grad for n, p in hybrid.named_parameters() if p.grad is not None}, expected) == 0


def test_what_a_fabric_keeps_or_overwrites_is_its_own_matter() -> None:
    class Careless(Bench):
        def program(self, block: Any, weights: Any) -> None:
            super().program(block, weights)
            for weight in weights:
                if weight is not None:
                    weight.zero_()

        def settle(self, inputs: Any, nudge: Any) -> Any:
            found = super().settle(inputs, nudge)
            if not hasattr(self, "buffers"):
                self.buffers = [np.zeros(state.shape) for state in found]
            for buffer, state in zip(self.buffers, found, strict=True):
                buffer[:] = state
            inputs[0].zero_()
            return self.buffers

    hybrid, x = made(solver=ffebm.Measured(Bench()))
    expected = parameter_gradients(hybrid, x)
    hybrid.set_solver(ffebm.Measured(Careless()))
    assert error(parameter_gradients(hybrid, x), expected) <= 1e-12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("chip", r"fabric is a str; expected an object with the methods program\(block, weights\) and settle"),
        (Bench, "fabric is the class Bench; expected an object with the methods"),
        (object(), "fabric is a object; expected an object"),
    ],
)
def test_what_is_no_fabric(given: Any, message: str) -> None:
    with pytest.raises(ffebm.InputError, match=message):
        ffebm.Measured(given)


@pytest.mark.parametrize("timeout", [0, -1.0, True, "1"])
def test_timeouts(timeout: Any) -> None:
    with pytest.raises(ffebm.InputError, match=r"timeout is .*; expected seconds, a positive number, or None"):
        ffebm.Measured(Bench(), timeout=timeout)


def test_a_fabric_that_takes_no_attribute() -> None:
    class Closed:
        __slots__ = ()

        def program(self, block: Any, weights: Any) -> None: ...
        def settle(self, inputs: Any, nudge: Any) -> None: ...

    hybrid, x = made(solver=ffebm.Measured(Closed()))
    with pytest.raises(ffebm.FabricError, match=r"the fabric Closed takes no attribute.*__slots__"):
        hybrid(x)


def test_operands_that_are_not_finite() -> None:
    hybrid, x = made(solver=ffebm.Measured(Bench()))
    with pytest.raises(ffebm.InputError, match="NaN"):
        hybrid(x.clone().fill_(float("nan")))
    hybrid.eval()
    with torch.no_grad():
        hybrid.get_parameter("layers.0.weight")[0, 0] = float("inf")
    with pytest.raises(ffebm.InputError, match=r"weight 0 of block_1, of shape .* holds NaN or infinite values"):
        hybrid(x)


def test_dropout_inside_a_block_is_refused_in_training() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4)).double()
    x = noise(3, 6).double()
    hybrid = ffebm.convert(model, x, energy="resistive", block_ops=("add", "reshape", "scale"))
    hybrid.set_solver(ffebm.Measured(Bench()))
    assert hybrid.energy_blocks["block_1"].program.masks
    hybrid.eval()
    hybrid(x)
    hybrid.train()
    with pytest.raises(ffebm.UnsupportedError, match=r"block_1 draws random masks .dropout inside the block"):
        hybrid(x)


# -- what is refused, kept and told ----------------------------------------------------------

COMPUTED: list[tuple[Any, str]] = [
    ("implicit", "implicit gradients"),
    ("unrolled", "unrolled gradients"),
    ("truncated", "truncated gradients"),
    ("recurrent", "recurrent gradients"),
    (ffebm.EquilibriumPropagation(0.1, "holomorphic"), "holomorphic ep gradients"),
]


@pytest.mark.parametrize(("estimator", "name"), COMPUTED, ids=lambda value: str(value)[:12])
def test_gradients_that_do_not_exist_there(estimator: Any, name: str) -> None:
    message = f"the equilibria of block_1 are measured by Bench, where {name} do not exist.*Use 'ep'"
    measured = ffebm.Measured(Bench())
    hybrid, _ = made(solver=measured)
    with pytest.raises(ffebm.UnsupportedError, match=message):
        hybrid.set_gradient(estimator)
    assert hybrid.energy_blocks["block_1"].estimator is CENTERED
    hybrid.set_solver(None)
    hybrid.set_gradient(estimator)
    with pytest.raises(ffebm.UnsupportedError, match=message):
        hybrid.set_solver(measured)
    assert hybrid.energy_blocks["block_1"].solver is None
    with pytest.raises(ffebm.UnsupportedError, match=message):
        made(gradient=estimator, solver=measured)


def test_a_saved_hybrid_says_that_its_fabric_is_missing(tmp_path: Path) -> None:
    hybrid, x = made()
    output = hybrid(x).detach()
    hybrid.set_solver(ffebm.Measured(Bench()))
    hybrid(x)
    hybrid.save(tmp_path / "saved")
    found = ffebm.load(tmp_path / "saved", CASES["mlp"].make(nn.ReLU)[0].double())
    assert repr(found.energy_blocks["block_1"].solver) == "Measured(Bench)"
    with pytest.raises(ffebm.FabricError, match=r"block_1: its equilibria were measured by .* Bench when .*set_solver"):
        found(x)
    found.save(tmp_path / "again")  # still what it was
    assert (tmp_path / "again/hybrid.json").read_text() == (tmp_path / "saved/hybrid.json").read_text()
    found.set_solver(ffebm.Measured(Bench()))
    torch.testing.assert_close(found(x).detach(), hybrid(x).detach(), rtol=0, atol=0)
    found.set_solver(None)
    torch.testing.assert_close(found(x).detach(), output)


def test_a_checkpoint_leaves_the_fabric_where_it_is() -> None:
    hybrid, x = made()
    bench = Bench()
    hybrid.set_solver(ffebm.Measured(bench))
    state = copy.deepcopy(hybrid.state_dict())
    with torch.no_grad():
        hybrid.get_parameter("layers.0.bias").add_(1)
    hybrid.load_state_dict(state)
    assert hybrid.energy_blocks["block_1"].solver.fabric is bench
    hybrid.load_block_state(hybrid.block_state())
    assert hybrid.energy_blocks["block_1"].solver.fabric is bench
    other, _ = made()
    other.load_state_dict(state)
    assert repr(other.energy_blocks["block_1"].solver) == "Measured(Bench)"
    with pytest.raises(ffebm.FabricError, match="a file holds no fabric"):
        other(x)


def test_reports() -> None:
    hybrid, x = made(solver=ffebm.Measured(Bench()))
    hybrid(x)
    assert "block_1: Measured: by Bench, outside" in hybrid.summary()
    assert "Measured" in hybrid.summary()
    report = ffebm.check_gradients(hybrid, x, squared_error)  # measured EP, and computed references
    assert report.worst("ep")[1].cosine > 0.99999
    assert report.worst("implicit")[1].cosine > 0.99999
    assert hybrid.blocks[0].settle(x).sweeps == 1
    assert hybrid.blocks[0].residual(x, states=hybrid.blocks[0].states) <= 1e-9
    assert len(hybrid.compare(x).blocks) == 1


def test_an_empty_batch_asks_nothing() -> None:
    bench = Bench()
    hybrid, x = made(solver=ffebm.Measured(bench))
    output = hybrid(x[:0])
    output.sum().backward()
    assert output.shape == (0, hybrid(x).shape[1])
    assert bench.calls == ["program", "settle"]  # of the second forward


def test_the_mean_of_several_reads() -> None:
    """On a bench with noise, EP's error falls as one over the root of the reads."""
    generator = torch.Generator().manual_seed(0)

    def noisy(method: str, found: Any) -> Any:
        if method == "program":
            return None
        return [state + 1e-3 * torch.randn(state.shape, generator=generator).double() for state in found]

    hybrid, x = made(solver=ffebm.Measured(Bench()))
    expected, bench = parameter_gradients(hybrid, x), Bench(noisy)
    hybrid.set_solver(ffebm.Measured(bench))
    errors = []
    for reads in (1, 64):
        hybrid.set_gradient(ffebm.EquilibriumPropagation(0.5, "centered", reads=reads))
        bench.calls.clear()
        errors.append(error(parameter_gradients(hybrid, x), expected))
        assert bench.calls == ["program"] * (reads == 1) + ["settle"] + ["nudge"] * 2 * reads
    assert errors[1] < 0.3 * errors[0]


def test_it_trains() -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)))
    x, y = noise(40, 6), noise(40, 6).abs()[:, :3].argmax(1)
    measured = ffebm.Measured(Bench())
    hybrid = ffebm.convert(model, x, energy="resistive", gradient=ffebm.EquilibriumPropagation(0.1, "centered"))
    hybrid.set_solver(measured)
    optimizer = torch.optim.Adam(hybrid.parameters(), 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(hybrid(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
