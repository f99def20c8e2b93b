"""A dozen real architectures of `benchmarks/zoo.py`, with an independent count of their weights."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import zoo
from zoo_models import MODELS, load_torchvision

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)

DOZEN = [
    "timm:resnet18",
    "timm:mobilenetv3_small_050",
    "timm:resnetv2_50x1_bit",  # standardised weights: the weight itself is computed
    "timm:vit_tiny_patch16_224",
    "timm:ghostnet_050",
    "torchvision:swin_t",  # writes through views
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_0",
    "transformers:bert",
    "transformers:gpt2",  # Conv1D, a tied head and a hand-written GELU
    "transformers:albert",  # one layer used twice
    "transformers:llama",  # a no_grad region
    "transformers:t5_encoder",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", DOZEN)
def test_every_weight_is_accounted_for_and_trains(name: str) -> None:
    load_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party model code
        row = zoo.measure(name)
        torch.manual_seed(0)
        model, args, kwargs = MODELS[name]()
        plan = ffebm.plan(model.eval(), args, kwargs)
    assert zoo.failures(row) == []
    assert row["placed"] + row["refused"] == row["matrices"]
    # Independently of the compiler's own counting: the layers whose forward runs, by a hook.
    ran: set[str] = set()
    names = {module: path for path, module in model.named_modules()}
    hooks = [
        module.register_forward_hook(lambda module, *_: ran.add(names[module]))
        for module in model.modules()
        if isinstance(module, LAYERS)
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    parameters = {id(p): n for n, p in model.named_parameters()}
    assert ran
    for path in ran:
        layer = model.get_submodule(path)
        placement = plan.weights[parameters[id(layer.weight)]]
        assert placement.block is not None or placement.reason, path
        if placement.block is None:
            assert path in plan.rejected, f"{path} stayed digital and is not listed as rejected"
