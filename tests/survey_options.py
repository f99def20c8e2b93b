"""Settings of layers and functions under which something else runs than in `survey_cases` and `survey_functions`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from survey_cases import LABELS, Call, Survey
from torch import Tensor, nn

__all__ = ["OPTIONS"]


class Inputs(nn.Module):
    """A layer given the value and more: masks, states, weights."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


class Flagged(nn.Module):
    """A function that is handed the module's `training`."""

    def __init__(self, function: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.training)


def _made(make: Callable[..., nn.Module], *args: Any, kind: str = "flat", **settings: Any) -> Survey:
    return Survey(lambda: make(*args, **settings), kind)


def _first(make: Callable[..., nn.Module], *args: Any, **settings: Any) -> Survey:
    return Survey(lambda: Inputs(make(*args, **settings), lambda layer, x: layer(x)[0]), "sequence")


def _attended(call: Callable[..., Any], **settings: Any) -> Survey:
    return Survey(lambda: Inputs(nn.MultiheadAttention(8, 2, **settings), call), "sequence")


def _encoded(call: Callable[..., Any] = lambda layer, x: layer(x), layers: int = 1, **settings: Any) -> Survey:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 12, **{"batch_first": True, "dropout": 0.1, **settings})
        return Inputs(nn.TransformerEncoder(layer, layers, enable_nested_tensor=False), call)

    return Survey(build, "sequence")


def _call(function: Callable[..., Any], *parameters: tuple[int, ...], kind: str = "flat", **buffers: Tensor) -> Survey:
    return Survey(lambda: Call(function, *parameters, **buffers), kind)


CAUSAL = torch.triu(torch.full((5, 5), float("-inf")), diagonal=1)
ABSENT = torch.tensor([[False, False, False, False, True], [False, False, False, True, True]]).repeat(2, 1)
"""Places of each sequence that are padding."""
SCORES = torch.linspace(0.5, 1.5, 20).view(4, 5)

OPTIONS: dict[str, Survey] = {
    **{
        f"nn.{name} in place": _made(getattr(nn, name), *arguments, inplace=True)
        for name, arguments in {
            "ReLU": (), "ReLU6": (), "LeakyReLU": (0.2,), "ELU": (0.7,), "CELU": (0.7,), "SELU": (), "SiLU": (),
            "Mish": (), "Hardswish": (), "Hardsigmoid": (), "Hardtanh": (-0.3, 0.7), "RReLU": (0.1, 0.4),
            "Threshold": (0.1, -0.2), "Dropout": (0.4,), "AlphaDropout": (0.3,),
        }.items()
    },
    **{
        f"nn.{layer.__name__} in place": _made(layer, 0.4, inplace=True, kind="2d")
        for layer in (nn.Dropout2d, nn.FeatureAlphaDropout)
    },
    **{f"F.{name} on a layer": _call(getattr(F, name)) for name in ("relu_", "elu_", "leaky_relu_", "rrelu_", "selu_")},
    "nn.Dropout of nothing": _made(nn.Dropout, 0.0),
    "nn.Dropout of everything": _made(nn.Dropout, 1.0),
    "nn.GELU tanh": _made(nn.GELU, "tanh"),
    "nn.Softplus beta": _made(nn.Softplus, 2.0, 1.0),
    "nn.PReLU by channel": _made(nn.PReLU, 4, -0.3, kind="2d"),
    "nn.Tanh in train": _made(nn.Tanh),
    "nn.BatchNorm1d flat": _made(nn.BatchNorm1d, 6),
    "nn.BatchNorm2d cumulative": _made(nn.BatchNorm2d, 4, momentum=None, kind="2d"),
    "nn.BatchNorm2d without affine": _made(nn.BatchNorm2d, 4, affine=False, kind="2d"),
    "nn.BatchNorm2d untracked": _made(nn.BatchNorm2d, 4, track_running_stats=False, kind="2d"),
    "nn.InstanceNorm2d tracked": _made(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True, kind="2d"),
    "nn.LayerNorm without affine": _made(nn.LayerNorm, 8, elementwise_affine=False, kind="sequence"),
    "nn.LayerNorm without bias": _made(nn.LayerNorm, (5, 8), bias=False, kind="sequence"),
    "nn.RMSNorm without affine": _made(nn.RMSNorm, 8, elementwise_affine=False, kind="sequence"),
    **{
        f"nn.Conv2d {mode}": _made(nn.Conv2d, 4, 4, 3, padding=1, padding_mode=mode, kind="2d")
        for mode in ("reflect", "replicate", "circular")
    },
    "nn.Conv2d same": _made(nn.Conv2d, 4, 4, 4, padding="same", dilation=(1, 2), kind="2d"),
    "nn.Conv2d depthwise": _made(nn.Conv2d, 4, 8, 3, groups=4, bias=False, kind="2d"),
    "nn.Conv2d pointwise with a stride": _made(nn.Conv2d, 4, 3, 1, stride=2, kind="2d"),
    "nn.ConvTranspose2d": _made(nn.ConvTranspose2d, 4, 6, 3, 2, 1, 1, groups=2, dilation=2, kind="2d"),
    "nn.AvgPool2d ceil": _made(nn.AvgPool2d, 4, 3, 1, ceil_mode=True, count_include_pad=False, kind="2d"),
    "nn.AvgPool2d divisor": _made(nn.AvgPool2d, 2, divisor_override=3, kind="2d"),
    "nn.MaxPool2d dilated": _made(nn.MaxPool2d, 2, 1, 1, dilation=2, ceil_mode=True, kind="2d"),
    "nn.AdaptiveAvgPool2d one size": _made(nn.AdaptiveAvgPool2d, (None, 3), kind="2d"),
    "nn.Embedding padded": _made(nn.Embedding, 10, 6, padding_idx=3, kind="tokens"),
    "nn.Embedding scaled": _made(nn.Embedding, 10, 6, scale_grad_by_freq=True, kind="tokens"),
    "nn.Embedding max norm": _made(nn.Embedding, 10, 6, max_norm=1.0, kind="tokens"),
    "nn.EmbeddingBag max": _made(nn.EmbeddingBag, 10, 6, mode="max", kind="tokens"),
    "nn.EmbeddingBag weighted": Survey(
        lambda: Inputs(
            nn.EmbeddingBag(10, 6, mode="sum"), lambda layer, x: layer(x, per_sample_weights=SCORES)
        ),
        "tokens",
    ),
    "nn.LSTM two ways": _first(nn.LSTM, 8, 5, 2, batch_first=True, bidirectional=True, dropout=0.3),
    "nn.LSTM projected": _first(nn.LSTM, 8, 5, batch_first=True, proj_size=3),
    "nn.LSTM sequence first": _first(nn.LSTM, 8, 5),
    "nn.LSTM last state": Survey(
        lambda: Inputs(nn.LSTM(8, 5, batch_first=True), lambda layer, x: layer(x)[1][0].transpose(0, 1)), "sequence"
    ),
    "nn.GRU two layers": _first(nn.GRU, 8, 5, 2, batch_first=True, dropout=0.3),
    "nn.GRU without bias": _first(nn.GRU, 8, 5, bias=False, batch_first=True, bidirectional=True),
    "nn.RNN of ReLU": _first(nn.RNN, 8, 5, nonlinearity="relu", batch_first=True),
    "nn.MultiheadAttention masked": _attended(
        lambda layer, x: layer(x, x, x, attn_mask=CAUSAL, need_weights=False)[0], batch_first=True, dropout=0.2
    ),
    "nn.MultiheadAttention padded": _attended(
        lambda layer, x: layer(x, x, x, key_padding_mask=ABSENT)[0], batch_first=True
    ),
    "nn.MultiheadAttention sequence first": _attended(lambda layer, x: layer(x, x, x)[0], add_bias_kv=True),
    "nn.MultiheadAttention zeros": _attended(
        lambda layer, x: layer(x, x, x)[0], batch_first=True, add_zero_attn=True, bias=False
    ),
    "nn.MultiheadAttention other sizes": _attended(
        lambda layer, x: layer(x, x[..., :3], x[..., 2:])[0], batch_first=True, kdim=3, vdim=6
    ),
    "nn.MultiheadAttention weights": _attended(
        lambda layer, x: layer(x, x, x, average_attn_weights=False)[1], batch_first=True
    ),
    "nn.TransformerEncoder causal": _encoded(lambda layer, x: layer(x, mask=CAUSAL, is_causal=True), norm_first=True),
    "nn.TransformerEncoder padded": _encoded(
        lambda layer, x: layer(x, src_key_padding_mask=ABSENT), activation="gelu", dropout=0.0
    ),
    "nn.TransformerEncoder two layers": _encoded(layers=2, bias=False, activation=torch.tanh),
    **{
        f"F.interpolate {mode}": _call(
            lambda x, mode=mode, more=more: F.interpolate(x, mode=mode, **more), kind="1d" if mode == "linear" else "2d"
        )
        for mode, more in {
            "nearest-exact": {"scale_factor": 1.5},
            "bilinear": {"size": (4, 9), "align_corners": True},
            "bicubic": {"scale_factor": 0.5, "antialias": True},
            "area": {"size": 3},
            "linear": {"scale_factor": 2.0},
        }.items()
    },
    "F.interpolate trilinear": _call(lambda x: F.interpolate(x, size=3, mode="trilinear"), kind="3d"),
    **{
        f"F.pad {mode}": _call(lambda x, mode=mode: F.pad(x, (2, 1, 1, 2), mode), kind="2d")
        for mode in ("reflect", "replicate", "circular")
    },
    **{
        f"F.grid_sample {mode}": _call(
            lambda x, grid, mode=mode: F.grid_sample(
                x, grid.expand(x.shape[0], -1, -1, -1), mode, "border", align_corners=True
            ),
            kind="2d",
            grid=torch.linspace(-1.1, 1.1, 24).view(1, 3, 4, 2),
        )
        for mode in ("bilinear", "nearest", "bicubic")
    },
    "F.dropout always": _call(F.dropout),
    "F.dropout in attention": Survey(
        lambda: Flagged(lambda x, train: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if train else 0.0)),
        "sequence",
    ),
    "F.scaled_dot_product_attention causal": _call(
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.7), kind="sequence"
    ),
    "F.scaled_dot_product_attention masked": _call(
        lambda x, m: F.scaled_dot_product_attention(x, x, x, attn_mask=m), kind="sequence", mask=CAUSAL
    ),
    "F.scaled_dot_product_attention grouped": _call(
        lambda x: F.scaled_dot_product_attention(
            x.unflatten(-1, (4, 2)).transpose(1, 2),
            x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2),
            x[..., 4:].unflatten(-1, (2, 2)).transpose(1, 2),
            enable_gqa=True,
        ),
        kind="sequence",
    ),
    "F.batch_norm by the batch": _call(
        lambda x, m, v: F.batch_norm(x, m, v, training=True), kind="2d", mean=torch.zeros(4), variance=torch.ones(4)
    ),
    "F.batch_norm frozen": _call(
        lambda x, w, m, v: F.batch_norm(x, m, v, w), (4,), kind="2d", mean=torch.zeros(4), variance=torch.ones(4)
    ),
    "F.cross_entropy weighted": Survey(
        lambda: Call(
            lambda x, t, w: F.cross_entropy(x, t, w, label_smoothing=0.1, ignore_index=3, reduction="sum"),
            target=LABELS,
            weight=torch.linspace(0.5, 2, 6),
        ),
        inner=False,
    ),
    "F.gumbel_softmax hard": _call(lambda x: F.gumbel_softmax(x, 0.7, hard=True)),
    "F.normalize by 1": _call(lambda x: F.normalize(x, 1.0, 0)),
    "F.softmax of a dtype": _call(lambda x: F.softmax(x, -1, dtype=torch.float64).to(x.dtype)),
    "F.leaky_relu negative": _call(lambda x: F.leaky_relu(x, -0.3)),
    "F.hardtanh one-sided": _call(lambda x: F.hardtanh(x, 0.0, 0.4)),
    "F.linear without bias": _call(F.linear, (5, 6)),
    "F.conv1d strided": _call(lambda x, w: F.conv1d(x, w, stride=2, dilation=2), (5, 4, 3), kind="1d"),
    "F.pixel_shuffle unbatched": _call(lambda x: torch.stack([F.pixel_shuffle(p, 2) for p in x]), kind="2d"),
}  # fmt: skip
