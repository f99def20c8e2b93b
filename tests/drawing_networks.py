"""Ten real architectures with random weights, for the tests of the page: as small as their graphs allow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import seeded
from torch import Tensor, nn

import ffebm_compiler as ffebm

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from zoo_models import load_torchvision

__all__ = ["NETWORKS", "plan_of"]

Case = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _torchvision(name: str, size: int) -> Callable[[], Case]:
    def make() -> Case:
        load_torchvision()
        models = pytest.importorskip("torchvision").models
        return getattr(models, name)(weights=None), (torch.randn(1, 3, size, size),), {}

    return make


def _timm(name: str, size: int, **settings: Any) -> Callable[[], Case]:
    def make() -> Case:
        load_torchvision()
        timm = pytest.importorskip("timm")
        return timm.create_model(name, **settings), (torch.randn(1, 3, size, size),), {}

    return make


def _text(model: str, settings: dict[str, Any], kwargs: dict[str, Any] | None = None) -> Callable[[], Case]:
    def make() -> Case:
        load_torchvision()
        transformers = pytest.importorskip("transformers")
        kind = getattr(transformers, model)
        config = kind.config_class(vocab_size=50, **settings)
        return kind(config), (torch.randint(3, 50, (1, 8)),), dict(kwargs or {})

    return make


class _DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers)


class UNet(nn.Module):
    """The U-Net (Ronneberger, Fischer and Brox 2015, arXiv 1505.04597) with four levels, padding and batch norm."""

    def __init__(self, channels: int = 8, levels: int = 4) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(levels + 1)]
        self.first = _DoubleConv(3, widths[0])
        self.down = nn.ModuleList(_DoubleConv(a, b) for a, b in pairwise(widths))
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(_DoubleConv(a, b) for a, b in pairs)
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = [self.first(x)]
        for down in self.down:
            skips.append(down(nn.functional.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            y = merge(torch.cat((skips.pop(), up(y)), 1))
        return self.last(y)


_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}

NETWORKS: dict[str, Callable[[], Case]] = {
    "resnet18": _torchvision("resnet18", 32),
    "resnet50": _torchvision("resnet50", 64),
    "vit_tiny": _timm("vit_tiny_patch16_224", 64, img_size=64),
    "convnext": _timm("convnext_atto", 64),
    "efficientnet": _torchvision("efficientnet_b0", 64),
    "gpt2": _text("GPT2Model", {"n_layer": 6, "n_embd": 32, "n_head": 2}, {"use_cache": False}),
    "llama": _text("LlamaForCausalLM", _SMALL, {"use_cache": False}),
    "unet": lambda: (UNet(), (torch.randn(1, 3, 32, 32),), {}),
    "mixture": _text(
        "MixtralForCausalLM", _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}, {"use_cache": False}
    ),
    "mamba": _text("MambaModel", {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4}, {"use_cache": False}),
}
"""Name -> a function that makes the model, its inputs and its keywords."""

FOLDED = {"resnet18", "resnet50", "unet"}
"""Those whose batch norms are folded."""


def plan_of(name: str) -> ffebm.Plan:
    """The plan of one of the networks."""
    model, args, kwargs = seeded(NETWORKS[name])
    return ffebm.plan(model.eval(), args, kwargs, fold_batchnorm=name in FOLDED)
