"""Saving and loading hybrids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import noise, seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Tied(nn.Module):
    """A tied weight, batch norm, dropout, a keyword and a flag."""

    def __init__(self, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(11, width)
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor, *, shift: Tensor, double: bool = False) -> Tensor:
        h = self.norm(self.words(tokens)) + shift
        h = h + self.down(self.drop(torch.relu(self.up(h))))
        return self.head(2 * h if double else h)


def _hybrid() -> tuple[ffebm.HybridModel, Tensor, dict[str, object]]:
    torch.manual_seed(0)
    tokens, settings = torch.randint(0, 11, (4,)), {"shift": torch.randn(4, 8), "double": True}
    hybrid = ffebm.convert(
        Tied(),
        tokens,
        settings,
        feedback=0.2,
        gradient=ffebm.EquilibriumPropagation(beta=0.01, variant="centered"),
        solver=ffebm.Anderson(rtol=1e-6, memory=3),
    )
    optimizer = torch.optim.SGD(hybrid.parameters(), 0.1)
    hybrid.train()
    hybrid(tokens, **settings).square().mean().backward()
    optimizer.step()
    hybrid.recertify()
    return hybrid.eval(), tokens, settings


def test_round_trip(tmp_path: Path) -> None:
    hybrid, tokens, settings = _hybrid()
    hybrid.save(tmp_path / "saved")
    hybrid.save(tmp_path / "saved")  # an earlier save is replaced
    assert sorted(file.name for file in tmp_path.iterdir()) == ["saved"]
    loaded = ffebm.load(tmp_path / "saved", Tied())
    assert torch.equal(loaded(tokens, **settings), hybrid(tokens, **settings))
    assert loaded.plan == hybrid.plan
    assert not loaded.training
    assert loaded.head.weight is loaded.words.weight
    for name, tensor in hybrid.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for ours, theirs in zip(hybrid.blocks, loaded.blocks, strict=True):
        assert ours.module.estimator == theirs.module.estimator
        assert ours.module.solver == theirs.module.solver
        assert ours.loop_gain == pytest.approx(theirs.loop_gain)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    hybrid, _, _ = _hybrid()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ffebm.ExportError, match="exists and is no saved hybrid"):
        hybrid.save(tmp_path / "mine")
    (tmp_path / "file").write_text("words")
    with pytest.raises(ffebm.ExportError, match="cannot be saved"):
        hybrid.save(tmp_path / "file" / "below")
    layer = nn.Sequential(nn.Linear(3, 2))
    free = ffebm.convert(layer, torch.randn(2, 3), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    with pytest.raises(ffebm.ExportError, match="custom dynamic_shapes"):
        free.save(tmp_path / "free")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


class Small(nn.Module):
    """With a layer that the forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def _small() -> ffebm.HybridModel:
    return ffebm.convert(seeded(Small), noise(2, 8))


def _take_spare(hybrid: ffebm.HybridModel) -> None:
    del hybrid.spare


def _add_parameter(hybrid: ffebm.HybridModel) -> None:
    hybrid.log_sigma = nn.Parameter(torch.zeros(1))  # a learned weight of a loss


def _add_module(hybrid: ffebm.HybridModel) -> None:
    hybrid.aux = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def _add_inside(hybrid: ffebm.HybridModel) -> None:
    hybrid.get_submodule("layers.1").slope = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_add_parameter, r"'log_sigma' was added to the hybrid after conversion, and ffebm.load\(\) makes"),
        (_add_module, "'aux.0.weight' was added to the hybrid after conversion"),
        (_add_inside, "'layers.1.slope' was added to the hybrid after conversion"),
        (_take_spare, "'spare.bias' was taken from the hybrid"),
    ],
)
def test_what_was_added_later_is_in_a_state_dict_and_not_in_a_folder(change: Any, message: str, tmp_path: Path) -> None:
    hybrid = _small()
    change(hybrid)
    around = nn.ModuleDict({"hybrid": hybrid, "head": nn.Linear(3, 3)})
    for module in (hybrid, around):
        assert not any(module.load_state_dict(module.state_dict()))
        with pytest.raises(RuntimeError, match=r'Unexpected key.*: "other.weight"'):
            module.load_state_dict({**module.state_dict(), "other.weight": torch.ones(3)})
    hybrid.register_buffer("cache", torch.ones(2), persistent=False)
    with pytest.raises(ffebm.ExportError, match=message):
        hybrid.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_buffer_that_is_not_stored_may_be_added_later(tmp_path: Path) -> None:
    hybrid = _small()
    hybrid.register_buffer("cache", torch.ones(2), persistent=False)
    hybrid.save(tmp_path / "saved")
    ffebm.load(tmp_path / "saved", Small())


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    hybrid, _, _ = _hybrid()
    folder = tmp_path / "saved"
    with pytest.raises(ffebm.InputError, match=r"no saved hybrid \(there is no such folder\)"):
        ffebm.load(folder, Tied())
    hybrid.save(folder)
    with pytest.raises(ffebm.PlanError, match="another model"):
        ffebm.load(folder, Tied(hidden=12))
    with pytest.raises(ffebm.InputError, match="rejects the example inputs"):
        ffebm.load(folder, Tied(width=16))
    settings = json.loads((folder / "hybrid.json").read_text())
    (folder / "hybrid.json").write_text(json.dumps({**settings, "schema": 9}))
    with pytest.raises(ffebm.InputError, match="schema 9"):
        ffebm.load(folder, Tied())
    (folder / "hybrid.json").write_text("{")
    with pytest.raises(ffebm.InputError, match="malformed"):
        ffebm.load(folder, Tied())
    (folder / "hybrid.json").write_text(json.dumps(settings))
    (folder / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ffebm.InputError, match="malformed"):
        ffebm.load(folder, Tied())


@pytest.mark.parametrize("energy", ["resistive", "unamplified"])
def test_resistive_hybrids_with_a_block_of_one_layer(energy: str, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.Softmax(-1), nn.Linear(5, 2)))
    x = noise(3, 6)
    hybrid = ffebm.convert(model, x, energy=energy)
    assert [block.module.program.coupled for block in hybrid.blocks] == [True, False]
    hybrid.save(tmp_path / "saved")
    assert torch.equal(ffebm.load(tmp_path / "saved", model)(x), hybrid(x))
    again = ffebm.convert(model, x, energy=energy)
    again.load_state_dict(hybrid.state_dict())
    assert torch.equal(again(x), hybrid(x))
