"""Plans of models on the meta device, which have shapes and no values: the plans of the same models with values."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from networks import CASES
from torch import Tensor, nn

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from zoo_models import load_torchvision


def as_json(plan: ffebm.Plan, path: Path) -> object:
    plan.to_json(path)
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_that_of_the_model_with_values(case: str, tmp_path: Path) -> None:
    model, x = CASES[case].make(nn.GELU)
    expected = as_json(ffebm.plan(model, x), tmp_path / "a.json")
    empty = model.to("meta")
    assert as_json(ffebm.plan(empty, x.to("meta")), tmp_path / "b.json") == expected
    assert as_json(ffebm.plan(empty, x), tmp_path / "c.json") == expected, "inputs with values"


@pytest.mark.slow
def test_transformers_models_are_planned_without_memory() -> None:
    load_torchvision()
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = torch.zeros(1, 6, dtype=torch.long)
    for config, kind in ((LlamaConfig, LlamaForCausalLM), (MixtralConfig, MixtralForCausalLM)):
        settings = config(**sizes, num_hidden_layers=2, vocab_size=100, use_cache=False)
        expected = ffebm.plan(kind(settings), tokens)
        with torch.device("meta"):
            empty = kind(settings)
        found = ffebm.plan(empty, tokens)
        # Attention has other strides there and experts another way of multiplying: some digital operations differ.
        assert [block.layers for block in found.blocks] == [block.layers for block in expected.blocks]
        assert {name: place.block for name, place in found.weights.items()} == {
            name: place.block for name, place in expected.weights.items()
        }


def test_a_model_of_which_a_part_has_no_memory_is_planned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3))
    expected = ffebm.plan(model, torch.randn(2, 3, 8, 8)).fingerprint
    model[0].to("meta")
    assert ffebm.plan(model, torch.randn(2, 3, 8, 8)).fingerprint == expected
    assert not model[3].weight.is_meta, "the model of the user stays where it is"


def test_a_plan_without_memory_has_costs_and_a_picture(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8192, 8192), nn.GELU(), nn.Linear(8192, 8192))
    plan = ffebm.plan(model, torch.empty(2, 8192, device="meta"), hardware=ffebm.Hardware(1024, 1024, 256))
    assert "modelled" in str(plan.cost_report())
    assert [block.layers for block in plan.blocks] == [("0", "2")]
    plan.save_svg(tmp_path / "plan.svg")
    assert "Linear" in str(plan) or "Sequential" in str(plan)


class Branches(nn.Module):
    """Branches on a value of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("flag", torch.tensor(1))
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if bool(self.flag > 0) else x


def test_a_branch_on_a_value_that_is_not_there_is_refused() -> None:
    with torch.device("meta"):
        model = Branches()
    with pytest.raises(ffebm.CaptureError, match=r"flag.*the model is on the meta device, where tensors have shapes"):
        ffebm.plan(model, torch.empty(2, 4, device="meta"))


def test_only_models_with_values_are_converted() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    with pytest.raises(
        ffebm.InputError, match=r"'weight' is on the meta device.*load the weights first, or call ffebm\.plan"
    ):
        ffebm.convert(model, torch.randn(2, 4))
