"""Networks that hypothesis draws, end to end: convert, compare, step, save, load, and the same step again.

`make networks` tries 10 000 (`FFEBM_NETWORKS`), the tests of every day fewer.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_networks import DrawnNetwork, networks
from hypothesis import event, given, note
from hypothesis import strategies as st
from many_examples import in_slices, often
from same_as_source import assert_same, deviation
from torch import Tensor

import ffebm_compiler as ffebm
from ffebm_compiler.bound_block import BoundBlock
from ffebm_compiler.passes.dialect import WIRING_KINDS
from ffebm_compiler.runtime.energies import row_sums

NETWORKS = int(os.environ.get("FFEBM_NETWORKS", "0"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    in_slices(metafunc, NETWORKS)


SMALL = ffebm.Hardware(tile_rows=6, tile_cols=6, layers_per_block=2)

VARIANTS = {name: ffebm.EquilibriumPropagation(variant=name) for name in ("positive", "negative", "centered")}
OPTIONS = st.fixed_dictionaries(
    {
        "energy": st.sampled_from(["hopfield", "hopfield", "hopfield", "resistive", "unamplified", "drn"]),
        "feedback": st.sampled_from([0.1, 0.03, 0.5, 0.8]),
        "gradient": st.sampled_from(["ep", "implicit", "unrolled", "holomorphic"]),
        "block_ops": st.sampled_from([("add", "reshape"), WIRING_KINDS, ()]),
        "fold_batchnorm": st.booleans(),
        "digital_drive": st.sampled_from([False, False, True]),
        "feedback_weights": st.sampled_from(["tied", "tied", "tied", "free"]),
        "hardware": st.sampled_from(
            ["crossbar-256", "ideal", ffebm.Hardware(tile_rows=6, tile_cols=6, layers_per_block=2)]
        ),
    }
)


def converted(model: DrawnNetwork, x: Tensor, options: dict[str, Any]) -> ffebm.HybridModel | None:
    """A hybrid, or None where an option is refused in plain words."""
    named = dict(options)
    if named["energy"] == "drn":
        named["feedback"] = "symmetric"
    if named["gradient"] == "holomorphic":
        named["gradient"] = ffebm.EquilibriumPropagation(variant="holomorphic")
    try:
        return ffebm.convert(copy.deepcopy(model), x, **named)
    except ffebm.FFEBMError as error:
        event(f"refused: {type(error).__name__}")
        note(str(error))
        return None


@contextmanager
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp())
    try:
        yield path / "saved"
    finally:
        shutil.rmtree(path)


def stepped(hybrid: ffebm.HybridModel, x: Tensor, directions: Tensor, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The output of a training step, and all tensors after it."""
    hybrid.zero_grad()
    torch.manual_seed(seed)
    output = hybrid(x)
    if output.requires_grad:
        (output * directions).sum().backward()
        torch.optim.SGD(hybrid.parameters(), 0.1, momentum=0.9).step()
    return output.detach(), {name: value.clone() for name, value in hybrid.state_dict().items()}


@often(20, NETWORKS)
@given(networks(), st.booleans())
def test_a_hybrid_of_one_layer_blocks_is_its_source(drawn: tuple[DrawnNetwork, Tensor], train: bool) -> None:
    model, x = drawn
    note(f"{x.shape} {model.steps}")
    if train and any(step.kind == "batch_norm" for step in model.steps) and len(x) == 1:
        train = False  # torch's batch norm refuses one value a channel itself
    assert_same(model.double(), x.double(), train=train, limit=1e-9, gradient_limit=1e-7)


@often(20, NETWORKS)
@given(networks(), OPTIONS, st.booleans())
def test_a_hybrid_steps_and_is_saved(drawn: tuple[DrawnNetwork, Tensor], options: dict[str, Any], train: bool) -> None:
    model, x = drawn[0].for_energy(options["energy"]), drawn[1]
    note(f"{x.shape} {model.steps}")
    hybrid = converted(model, x, options)
    if hybrid is None:
        return
    if train and any(step.kind == "batch_norm" for step in model.steps) and len(x) == 1:
        train = False
    hybrid.train(train)
    try:
        directions = torch.randn_like(hybrid(x).detach())
        stepped(hybrid, x, directions, 1)
    except ffebm.UnsupportedError:  # an estimator that a block of this network does not take
        event(f"refused by a step: {options['gradient']}")
        return
    except ffebm.ConvergenceError as error:
        if not has_no_such_gradient(hybrid, error):
            raise
        return
    if not train:
        hybrid.recertify()  # evaluation leaves the feedback as it was set for the weights before the step
    with folder() as path:
        hybrid.save(path)
        again = ffebm.load(path, copy.deepcopy(model))
    assert again.training == train
    for key, value in hybrid.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    try:
        (mine, state), (other, state_again) = (stepped(one, x, directions, 2) for one in (hybrid, again))
    except ffebm.ConvergenceError as error:  # the step has left conductances of 0
        if not has_no_such_gradient(hybrid, error):
            raise
        return
    assert bool(torch.isfinite(mine).all())
    assert torch.equal(mine, other), "the loaded hybrid computes something else"
    for key, value in state.items():
        assert torch.equal(state_again[key], value), f"{key} is another after a step"


def spectral_radius(block: BoundBlock) -> float:
    """ρ of a circuit's couplings from all their eigenvalues. The loop gain is measured from below, to a thousandth."""
    frame = block.module.gain.measured(block.weights)
    if frame is None:
        return 0.0
    coupling = row_sums._ScaledCoupling(frame, block.module.gain.setting)
    with torch.no_grad():
        return float(torch.linalg.eigvalsh(coupling.forward(torch.eye(coupling.size))).abs().max())


def has_no_such_gradient(hybrid: ffebm.HybridModel, error: ffebm.ConvergenceError) -> bool:
    """Whether a step is refused since no source reaches some units of a circuit, so that they have no equilibrium.

    Where masks cut them off, tests/test_masked_circuits.py checks which.
    Or since plain sweeps, which are what an unrolled gradient differentiates, take more than 2 000 to settle.
    """
    gain = max(spectral_radius(block) ** 2 for block in hybrid.blocks)
    if "nothing sets the potentials" in str(error):
        return gain >= 1 - 64 * torch.finfo(torch.float32).eps or "the masks of this call cut" in str(error)
    return str(error).startswith("unrolled") and "did not settle in 2000 sweeps" in str(error) and gain > 0.98


def far_from_kinks(block: Any) -> bool:
    """Whether no state's slope changes within a hundredth of its usual drive, so that no nudge crosses a kink."""
    if block.program.selects:
        return False
    for sigma, field in zip(block._activations, block._preactivations, strict=True):
        near = 0.01 * float(field.square().mean().sqrt()) + 1e-9
        above, below = sigma.derivative(field + near), sigma.derivative(field - near)
        if not bool(((above - below).abs() < 0.1).all()):
            return False
    return True


def gradient_of(hybrid: ffebm.HybridModel, x: Tensor, estimator: Any) -> Tensor | None:
    """The gradient of all parameters, by a loss with random coefficients; None if the output has none."""
    hybrid.set_gradient(estimator)
    hybrid.zero_grad()
    torch.manual_seed(3)
    output = hybrid(x)
    if not output.requires_grad:
        return None
    torch.manual_seed(4)
    (output * torch.randn_like(output)).mean().backward()
    return torch.cat([p.grad.flatten() for p in hybrid.parameters() if p.grad is not None])


@often(15, NETWORKS)
@given(networks(), OPTIONS)
def test_gradients_are_those_of_the_unrolled_relaxation(
    drawn: tuple[DrawnNetwork, Tensor], options: dict[str, Any]
) -> None:
    model, x = drawn[0].for_energy(options["energy"]).double(), drawn[1].double()
    note(f"{x.shape} {model.steps}")
    hybrid = converted(model, x, {**options, "gradient": "ep"})
    if hybrid is None:
        return
    hybrid.eval()
    gradients = {}
    for name in ("unrolled", "implicit", "recurrent", *VARIANTS):
        try:
            found = gradient_of(hybrid, x, VARIANTS.get(name, name))
        except ffebm.ConvergenceError as error:
            if not has_no_such_gradient(hybrid, error):
                raise
            return
        if found is None:
            return
        gradients[name] = found
    if gradients["unrolled"].norm() < 1e-9:
        return
    settling = [block.module for block in hybrid.blocks if block.module.program.coupled]
    event(f"{options['energy']}: {len(settling)} settling blocks")
    for name in ("implicit", "recurrent"):
        assert deviation(gradients[name], gradients["unrolled"]) < 1e-4, name
    if options["feedback_weights"] == "tied" and all(far_from_kinks(block) for block in settling):
        event("equilibrium propagation is compared")
        for name, estimator in VARIANTS.items():
            found = gradients[name]
            if options["energy"] in ("unamplified", "drn") and deviation(found, gradients["unrolled"]) >= 0.01:
                # A unit of small conductance moves far under any nudge. What that adds falls with β.
                event("the nudge is not small")
                found = gradient_of(hybrid, x, replace(estimator, beta=1e-10))
            assert deviation(found, gradients["unrolled"]) < 0.01, name
