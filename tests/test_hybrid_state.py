"""What a hybrid is survives copies, pickles, state dicts and files, bit for bit."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Mixed(nn.Module):
    """Two blocks with feedback around a layer norm, batch norm and dropout, a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up, self.down = nn.Linear(64, 12), nn.Linear(12, 12)
        self.drop, self.again = nn.Dropout(0.2), nn.Linear(12, 12)
        self.again.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv2(torch.relu(self.conv1(x))))
        h = torch.tanh(self.up(F.avg_pool2d(h, 2).flatten(1)))
        return self.again(self.drop(torch.relu(self.down(h))))


def build(feedback: float | str = 0.3, gradient: str = "ep") -> tuple[ffebm.HybridModel, Tensor, Tensor]:
    model, x, y = seeded(Mixed), noise(8, 1, 8, 8), torch.arange(8) % 12
    if feedback == "symmetric":  # small enough to settle
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.3)
    return ffebm.convert(model, x, feedback=feedback, gradient=gradient), x, y


def train(hybrid: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    hybrid.train()
    for index in steps:
        torch.manual_seed(index)
        x, y = torch.randn(8, 1, 8, 8), torch.randint(0, 12, (8,))
        optimizer.zero_grad()
        loss = F.cross_entropy(hybrid(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def by_deepcopy(hybrid: ffebm.HybridModel, folder: Path) -> ffebm.HybridModel:
    return copy.deepcopy(hybrid)


def by_pickle(hybrid: ffebm.HybridModel, folder: Path) -> ffebm.HybridModel:
    torch.save(hybrid, folder / "whole.pt")
    loaded: ffebm.HybridModel = torch.load(folder / "whole.pt", weights_only=False)
    return loaded


def by_folder(hybrid: ffebm.HybridModel, folder: Path) -> ffebm.HybridModel:
    hybrid.save(folder / "saved")
    return ffebm.load(folder / "saved", seeded(Mixed, 9))


def by_state_dict(hybrid: ffebm.HybridModel, folder: Path) -> ffebm.HybridModel:
    torch.save(hybrid.state_dict(), folder / "state.pt")
    fresh = ffebm.convert(seeded(Mixed, 9), noise(8, 1, 8, 8))
    fresh.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return fresh.train(hybrid.training)


def by_state_dict_of_a_parent(hybrid: ffebm.HybridModel, folder: Path) -> ffebm.HybridModel:
    """As a LightningModule or DistributedDataParallel holds it."""
    torch.save(nn.ModuleDict({"body": hybrid}).state_dict(), folder / "parent.pt")
    parent = nn.ModuleDict({"body": ffebm.convert(seeded(Mixed, 9), noise(8, 1, 8, 8))})
    parent.load_state_dict(torch.load(folder / "parent.pt", weights_only=True))
    body = parent["body"]
    assert isinstance(body, ffebm.HybridModel)
    return body.train(hybrid.training)


WAYS: dict[str, Callable[[ffebm.HybridModel, Path], ffebm.HybridModel]] = {
    "deepcopy": by_deepcopy,
    "torch.save": by_pickle,
    "save and load": by_folder,
    "state dict": by_state_dict,
    "state dict of a parent": by_state_dict_of_a_parent,
}


@pytest.mark.parametrize("feedback", [0.3, "symmetric"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_keeps_outputs_settings_and_what_comes_next(way: str, feedback: float | str, tmp_path: Path) -> None:
    hybrid, x, _ = build(feedback)
    hybrid.recertify_every, hybrid.project_to = 7, 0.8
    optimizer = torch.optim.AdamW(hybrid.parameters(), 1e-3)
    train(hybrid, optimizer, range(5))
    settled = [block for block in hybrid.blocks if block.certificate is not None]
    assert len(settled) >= 2
    if feedback != "symmetric":
        settled[0].module.set_feedback(0.45)
    settled[1].module.estimator = ffebm.ImplicitDifferentiation()
    settled[1].module.solver = ffebm.Anderson(rtol=1e-5, memory=3)
    again = WAYS[way](hybrid, tmp_path)
    assert again.training
    assert (again.recertify_every, again.project_to) == (7, 0.8)
    for ours, theirs in zip(hybrid.blocks, again.blocks, strict=True):
        assert ours.module.feedback == theirs.module.feedback
        assert ours.module.scales == theirs.module.scales
        assert ours.module.estimator == theirs.module.estimator
        assert ours.module.solver == theirs.module.solver
        assert ours.loop_gain == theirs.loop_gain
    with torch.no_grad():
        assert torch.equal(hybrid.eval()(x), again.eval()(x))
    # What training does next, with the same optimizer state, is the same too.
    other = torch.optim.AdamW(again.parameters(), 1e-3)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(hybrid, optimizer, range(5, 9)) == train(again, other, range(5, 9))
    for name, tensor in hybrid.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("feedback", [0.3, "symmetric"])
@pytest.mark.parametrize("gradient", ["ep", "implicit"])
def test_training_resumed_from_a_checkpoint_is_training_that_went_on(
    gradient: str, feedback: float | str, tmp_path: Path
) -> None:
    hybrid, _, _ = build(feedback, gradient)
    rate = 1e-3 if feedback == "symmetric" else 3e-3
    optimizer = torch.optim.Adam(hybrid.parameters(), rate)
    train(hybrid, optimizer, range(100))
    torch.save({"model": hybrid.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    hybrid.save(tmp_path / "folder")
    went_on = train(hybrid, optimizer, range(100, 200))
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = ffebm.convert(seeded(Mixed, 4), noise(8, 1, 8, 8))
    fresh.load_state_dict(stored["model"])
    for resumed in (fresh, ffebm.load(tmp_path / "folder", seeded(Mixed, 4))):
        theirs = torch.optim.Adam(resumed.parameters(), rate)
        theirs.load_state_dict(copy.deepcopy(stored["optimizer"]))
        assert train(resumed, theirs, range(100, 200)) == went_on


def test_keys_are_the_sources_both_ways() -> None:
    hybrid, x, _ = build()
    source = seeded(Mixed, 3)
    assert list(hybrid.state_dict()) == list(source.state_dict())
    source.load_state_dict(hybrid.state_dict(), strict=True)
    hybrid.load_state_dict(source.state_dict(), strict=True)
    with torch.no_grad():
        hybrid.get_parameter("down.weight").mul_(2)
    source.load_state_dict(hybrid.state_dict(), strict=True)
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, hybrid.state_dict()[name])
    assert torch.isfinite(hybrid(x)).all()


def test_weights_of_a_source_set_the_feedback_and_the_present_ones_nothing() -> None:
    hybrid, x, _ = build()
    train(hybrid, torch.optim.Adam(hybrid.parameters(), 1e-2), range(3))
    hybrid.eval()
    with torch.no_grad():
        before = hybrid(x)
    plain = {name: tensor.clone() for name, tensor in hybrid.state_dict().items()}  # without metadata
    hybrid.load_state_dict(plain)
    with torch.no_grad():
        assert torch.equal(hybrid(x), before)
    hybrid.load_state_dict({name: value * 2 if value.is_floating_point() else value for name, value in plain.items()})
    for block in hybrid.blocks:
        if block.certificate is not None:
            assert block.loop_gain == pytest.approx(0.3, rel=1e-6)
    # A part of the weights, which bring no feedback of their own.
    name = next(block for block in hybrid.blocks if block.certificate is not None).state_names[-1] + ".weight"
    hybrid.load_state_dict({name: hybrid.get_parameter(name).detach() * 3}, strict=False)
    assert all(block.loop_gain == pytest.approx(0.3, rel=1e-6) for block in hybrid.blocks if block.certificate)


def test_a_state_of_another_plan_is_not_taken_over() -> None:
    hybrid, x, _ = build()
    train(hybrid, torch.optim.Adam(hybrid.parameters(), 1e-2), range(2))
    other = ffebm.convert(seeded(Mixed, 9), x, feedback=0.2, force_digital="conv2")
    other.load_state_dict(hybrid.state_dict())
    for block in other.blocks:
        if block.certificate is not None:
            assert block.module.feedback == 0.2
            assert block.loop_gain == pytest.approx(0.2, rel=1e-6)


def test_malformed_states_are_named() -> None:
    hybrid, _, _ = build()
    for damage in (
        lambda state: state["blocks"]["block_1"].pop("scales"),
        lambda state: state["blocks"]["block_1"].update(gradient={"kind": "Magic"}),
        lambda state: state["blocks"]["block_1"].update(norms=[[0, 7, 1.0]]),
        lambda state: state.pop("project_to"),
    ):
        state: Any = hybrid.state_dict()
        damage(state._metadata[""]["ffebm"])
        with pytest.raises(ffebm.InputError, match=r"stored (state|feedback) of"):
            hybrid.load_state_dict(state)


def test_frozen_modules_parameters_and_precision_are_saved(tmp_path: Path) -> None:
    hybrid, x, _ = build()
    hybrid.double().train()
    hybrid.get_submodule("norm").eval()
    hybrid.get_parameter("up.weight").requires_grad_(False)
    with torch.no_grad():
        hybrid.get_parameter("up.bias").add_(1e-12)  # lost in float32
    hybrid.save(tmp_path / "saved")
    again = ffebm.load(tmp_path / "saved", seeded(Mixed))
    assert again.training
    assert not again.get_submodule("norm").training
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == ["up.weight"]
    torch.manual_seed(0)
    want = hybrid(x.double())
    torch.manual_seed(0)
    assert torch.equal(again(x.double()), want)


def test_another_dtype_or_device_is_no_change_of_the_weights() -> None:
    hybrid, x, _ = build()
    hybrid.train()
    scales = [block.module.scales for block in hybrid.blocks]
    hybrid.double()
    nn.ModuleDict({"body": hybrid}).float()
    hybrid(x)
    assert [block.module.scales for block in hybrid.blocks] == scales
    assert all(block.module.gain.changes == 0 for block in hybrid.blocks)


def _scaled(state: Any) -> Any:
    """As edited checkpoints are: a copy of the dictionary with its metadata, and other values."""
    other = copy.deepcopy(state)
    for name in ("conv1.weight", "conv2.weight", "up.weight", "down.weight"):
        other[name] = other[name] * 2
    return other


def _averaged(state: Any) -> Any:
    other = copy.deepcopy(state)
    for name, value in seeded(Mixed, 3).state_dict().items():
        if value.is_floating_point():
            other[name] = (other[name] + value) / 2
    return other


def check_measured_gains(hybrid: ffebm.HybridModel) -> None:
    """That every block has the asked loop gain, measured at its present weights."""
    for block in hybrid.blocks:
        block.module.gain.forget()
        assert block.loop_gain == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("edit", [_scaled, _averaged])
@pytest.mark.parametrize("as_value", [False, True])
def test_weights_that_were_edited_have_their_feedback_set(edit: Callable[[Any], Any], as_value: bool) -> None:
    """A state dict's metadata is of the values that it was written with."""
    hybrid, x, _ = build()
    hybrid.train()(x)
    state, block_state = edit(hybrid.state_dict()), hybrid.block_state()
    loaded = build()[0]
    if as_value:
        state = dict(state)
    loaded.load_state_dict(state)
    if as_value:
        loaded.load_block_state(block_state)
    check_measured_gains(loaded)


def test_a_state_dict_that_shares_its_tensors_has_the_feedback_of_their_later_values() -> None:
    hybrid, x, _ = build()
    hybrid.train()(x)
    state = hybrid.state_dict()
    train(hybrid, torch.optim.Adam(hybrid.parameters(), 0.03), range(5))
    loaded = build()[0]
    loaded.load_state_dict(state)
    check_measured_gains(loaded)


def test_tensors_may_be_swapped_by_conversions_and_loading() -> None:
    """`torch.__future__` swaps the content of parameters, as sharded tensors need it."""
    hybrid, x, _ = build()
    hybrid.train()(x).sum().backward()
    hybrid.zero_grad()
    state, weight = copy.deepcopy(hybrid.state_dict()), hybrid.get_parameter("down.weight")
    gains = [block.loop_gain for block in hybrid.blocks]
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        hybrid.double()
        assert hybrid.get_parameter("down.weight") is weight
        assert hybrid(x.double()).dtype is torch.float64
        hybrid.float()
        hybrid.load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert [block.loop_gain for block in hybrid.blocks] == gains
    with torch.no_grad():
        hybrid.get_parameter("down.weight").mul_(3)
    hybrid(x)
    assert hybrid.blocks[1].loop_gain == pytest.approx(0.3, rel=0.02)


def test_a_setting_of_your_own_class_is_not_stored(tmp_path: Path) -> None:
    class Mine(ffebm.GaussSeidel):
        pass

    hybrid, _, _ = build()
    hybrid.set_solver(Mine())
    with pytest.raises(ffebm.ExportError, match="the solver of block_1 is of a class of your own"):
        hybrid.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    other, _, _ = build()
    other.load_state_dict(hybrid.state_dict())
    assert other.blocks[0].module.solver is None


def test_the_state_is_in_torchs_metadata_and_weights_only_reads_it() -> None:
    hybrid, _, _ = build()
    train(hybrid, torch.optim.Adam(hybrid.parameters(), 1e-2), range(2))
    buffer = io.BytesIO()
    torch.save(hybrid.state_dict(), buffer)
    buffer.seek(0)
    metadata = torch.load(buffer, weights_only=True)._metadata[""]
    assert set(metadata["ffebm"]["blocks"]) == {block.name for block in hybrid.blocks}
