"""Training steps that read one step later whether their phases settled (here on a CPU, where they are asked for)."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import noise
from torch import nn

import ffebm_compiler as ffebm
from ffebm_compiler.runtime.solvers import pace as pacing


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def hybrid_of(late: bool | None = True, **settings: Any) -> ffebm.HybridModel:
    solver = ffebm.GaussSeidel(late=late, **settings.pop("solver", {}))
    return ffebm.convert(network(), noise(2, 8, seed=1), feedback=0.5, solver=solver, **settings).train()


def step(hybrid: ffebm.HybridModel, seed: int = 1, rows: int = 16) -> dict[str, torch.Tensor]:
    hybrid.zero_grad()
    F.cross_entropy(hybrid(noise(rows, 8, seed=seed)), torch.arange(rows) % 4).backward()
    return {name: p.grad.clone() for name, p in hybrid.named_parameters()}


def paces_of(hybrid: ffebm.HybridModel) -> dict[str, pacing.Pace]:
    return hybrid.energy_blocks["block_1"].paces._of


@pytest.mark.parametrize("gradient", ["ep", "implicit", ffebm.EquilibriumPropagation(1e-3, "centered")])
def test_gradients_while_weights_move(gradient: Any) -> None:
    hybrid = hybrid_of(gradient=gradient)
    optimizer = torch.optim.Adam(hybrid.parameters(), 5e-3)
    for index in range(40):
        found = step(hybrid, seed=index)
        if index % 8 == 7:
            exact = copy.deepcopy(hybrid).double().train()
            exact.set_gradient("implicit")
            exact.zero_grad()
            with exact.held_feedback():
                labels = torch.arange(16) % 4
                F.cross_entropy(exact(noise(16, 8, seed=index).double()), labels).backward()
            for name, parameter in exact.named_parameters():
                assert F.cosine_similarity(found[name].double().flatten(), parameter.grad.flatten(), 0) > 0.9999, name
        optimizer.step()
    assert all(pace.steps > 0 for pace in paces_of(hybrid).values())
    assert len(paces_of(hybrid)) == 2 if gradient in ("ep", "implicit") else 3


def test_a_phase_that_was_left_too_early_sweeps_more() -> None:
    hybrid = hybrid_of()
    step(hybrid)
    free = paces_of(hybrid)["free"]
    needed = free.sweeps
    assert needed is not None
    free.sweeps = 1
    step(hybrid)  # one sweep; nobody has read how it ended
    assert hybrid.energy_blocks["block_1"].last.sweeps == 1
    for _ in range(4):
        step(hybrid)
    assert free.sweeps >= needed
    assert 0 < free.residual <= hybrid.energy_blocks["block_1"].free_rtol(torch.float32, True)


def test_it_waits_for_its_result_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "_EVERY", 5)
    hybrid = hybrid_of()
    free = None
    counts = []
    for _ in range(12):
        step(hybrid)
        free = paces_of(hybrid)["free"]
        counts.append(free.steps)
    assert counts == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    free.sweeps = 50  # far too many: the next result that is waited for brings the number down
    step(hybrid)
    assert free.sweeps < 10


def test_a_lost_state_is_told_in_the_next_step() -> None:
    hybrid = hybrid_of()
    step(hybrid)
    block = hybrid.energy_blocks["block_1"]
    broken = noise(16, 8, seed=1)
    broken[3, 2], broken[3, 3] = math.inf, -math.inf
    with torch.no_grad():
        hybrid(broken)
    with pytest.warns(ffebm.ConvergenceWarning, match="a state of the step before is not finite"):
        step(hybrid)
    assert 0 < block.last.residual < 1
    with torch.no_grad():
        hybrid(broken)
    with (
        pytest.warns(ffebm.ConvergenceWarning, match="a state of the step before is not finite"),
        pytest.raises(ffebm.InputError, match=r"input 0 of block_1, of shape .* holds NaN or infinite values"),
    ):
        hybrid(broken)


@pytest.mark.parametrize(
    "hybrid",
    [
        pytest.param(lambda: hybrid_of(late=None), id="on a CPU by default"),
        pytest.param(lambda: hybrid_of(late=False), id="late=False"),
        pytest.param(lambda: hybrid_of().eval(), id="evaluation"),
        pytest.param(lambda: hybrid_of(solver={"on_failure": "error"}), id="an error is asked for"),
        pytest.param(lambda: hybrid_of(solver={"termination": "sample"}), id="samples stop by themselves"),
        pytest.param(lambda: hybrid_of(solver={"precision": "bfloat16"}), id="bfloat16 first"),
    ],
)
def test_who_waits(hybrid: Any) -> None:
    built = hybrid()
    for _ in range(3):
        step(built)
    assert all(pace.sweeps is None for pace in paces_of(built).values())


def test_symmetric_feedback_waits() -> None:
    hybrid = hybrid_of()
    with torch.no_grad():
        for parameter in hybrid.parameters():
            parameter.mul_(0.2)
    hybrid.set_feedback("symmetric")
    step(hybrid)
    assert all(pace.sweeps is None for pace in paces_of(hybrid).values())


def test_copies_wait_for_their_first_result() -> None:
    hybrid = hybrid_of()
    for _ in range(3):
        step(hybrid)
    twin = copy.deepcopy(hybrid)
    assert all(pace.sweeps is None for pace in paces_of(twin).values())
    file = io.BytesIO()
    torch.save(hybrid, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for name, gradient in step(again).items():
        assert F.cosine_similarity(gradient.flatten(), step(hybrid)[name].flatten(), 0) > 0.9999


def test_late_must_be_a_flag() -> None:
    with pytest.raises(ffebm.InputError, match=r"late is 'yes'; expected True, False or None"):
        ffebm.GaussSeidel(late="yes")
