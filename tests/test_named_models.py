"""Models by the names of libraries: built with random weights, with inputs that fit them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ffebm_compiler.cli.models import load_model, random_inputs
from ffebm_compiler.errors import InputError

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from zoo_models import load_torchvision  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _torchvision() -> None:
    load_torchvision()


SMALL = "num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=32"
RUN = {
    "timm:resnet18": (3, 224, 224),
    "timm:test_vit": (3, 160, 160),
    "timm:resnet18(in_chans=1, num_classes=7)": (1, 224, 224),
    "timm:vit_tiny_patch16_224(img_size=64, depth=1)": (3, 64, 64),
    "torchvision:resnet18(num_classes=4)": (3, 224, 224),
    "torchvision:efficientnet_b1": (3, 240, 240),
    "torchvision:shufflenet_v2_x0_5": (3, 224, 224),
    "torchvision:r3d_18": (3, 16, 112, 112),
    "transformers:GPT2Config(n_layer=2, n_embd=32, n_head=2)": (16,),
    f"transformers:bert({SMALL})": (16,),
    f"transformers:BertForSequenceClassification({SMALL})": (16,),
    f"transformers:ViTConfig({SMALL}, image_size=32)": (3, 32, 32),
}


@pytest.mark.parametrize("name", RUN)
def test_the_default_inputs_fit(name: str) -> None:
    if name.startswith(("timm", "torchvision")):
        pytest.importorskip("timm")
    else:
        pytest.importorskip("transformers")
    model = load_model(name)
    args, kwargs = random_inputs(model.inputs, 0)
    assert tuple(args[0].shape[1:]) == RUN[name]
    with torch.no_grad():
        model.module(*args, **kwargs)


def test_arguments_reach_the_model() -> None:
    pytest.importorskip("transformers")
    model = load_model("transformers:GPT2Config(n_layer=2, n_embd=32, n_head=2)").module
    assert len(model.h) == 2  # type: ignore[arg-type]
    assert isinstance(model, nn.Module)


def test_sizes_of_all_of_torchvision() -> None:
    """Every image classifier is described by what its published weights are evaluated with."""
    models = pytest.importorskip("torchvision").models
    from ffebm_compiler.cli.libraries import _torchvision_inputs

    found = {name: _torchvision_inputs(models, name) for name in models.list_models()}
    assert found["resnet18"] == ("1x3x224x224",)
    assert found["inception_v3"] == ("1x3x299x299",)
    assert found["raft_small"] == ("1x3x128x128", "1x3x128x128")
    assert found["mvit_v1_b"] == ("1x3x16x224x224",)
    assert found["fcn_resnet50"] == ("1x3x520x520",)


@pytest.mark.parametrize("name", ["GPT2Config(n_layer=)", "GPT2Config(2)", "GPT2Config(n_layer=open('x'))", "a.b(c=1)"])
def test_arguments_are_written_out(name: str) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(InputError, match="a name with arguments that are written out"):
        load_model(f"transformers:{name}")
