"""Every class of torch.nn and every function of torch.nn.functional that a network may contain, in a small net.

A case is the layer (or call) in the middle of `before → middle → flatten → linear`; see test_survey.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "INPUTS", "LABELS", "REAL", "SEVERAL", "SIGNS", "Call", "Survey"]


class Call(nn.Module):
    """A function of the value before it and of parameters and buffers made here."""

    def __init__(self, function: Callable[..., Any], *parameters: tuple[int, ...], **buffers: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) / 3) for shape in parameters])
        self.names = tuple(buffers)
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.weights, *[getattr(self, name) for name in self.names])


@dataclass(frozen=True)
class Survey:
    """One case: how to build the middle, and the kind of input that it takes."""

    build: Callable[[], nn.Module]
    kind: str = "flat"
    inner: bool = True
    """Whether its result goes on into a linear layer (a loss doesn't)."""


INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "flat": (lambda: nn.Linear(6, 6), (4, 6)),
    "sequence": (lambda: nn.Linear(8, 8), (4, 5, 8)),
    "1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (3, 4, 8)),
    "2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), (2, 4, 6, 6)),
    "3d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (2, 4, 4, 4, 4)),
    "fold": (lambda: nn.Conv1d(4, 8, 1), (2, 4, 6)),
    "tokens": (nn.Identity, (4, 5)),
}
"""The layer before, and the shape of the input; tokens are integers below 10."""


def _of(make: Callable[..., nn.Module], *args: Any, kind: str = "flat", **keywords: Any) -> Survey:
    return Survey(lambda: make(*args, **keywords), kind)


class _Loss(nn.Module):
    """A loss, handed to `call` before the value and the targets."""

    def __init__(self, loss: nn.Module, call: Callable[..., Tensor], targets: dict[str, Tensor]) -> None:
        super().__init__()
        self.loss, self.call, self.names = loss, call, tuple(targets)
        for name, value in targets.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.loss, x, *[getattr(self, name) for name in self.names])


def _loss(make: Callable[[], nn.Module], call: Callable[..., Any], kind: str = "flat", **targets: Tensor) -> Survey:
    return Survey(lambda: _Loss(make(), call, targets), kind, inner=False)


def _draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


REAL = torch.rand(4, 6, generator=_draw(1))
"""Targets of the shape of the value, in (0, 1)."""
SIGNS = torch.where(REAL > 0.5, 1.0, -1.0)
LABELS = torch.tensor([0, 3, 5, 1])
SEVERAL = torch.tensor([[0, 3, -1, 0, 0, 0], [5, -1, 0, 0, 0, 0], [1, 2, 3, -1, 0, 0], [4, -1, 0, 0, 0, 0]])

_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish",
    "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "RReLU",
    "PReLU",
)  # fmt: skip


class _Recurrent(nn.Module):
    """The output sequence of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


class _Attention(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class _Twice(nn.Module):
    """A layer of two inputs, given the value and a function of it."""

    def __init__(self, layer: nn.Module, second: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.layer, self.second = layer, second

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.second(x))


class _Unpool(nn.Module):
    def __init__(self, pool: nn.Module, unpool: nn.Module) -> None:
        super().__init__()
        self.pool, self.unpool = pool, unpool

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


class _Named(nn.Module):
    """Layers in a container, called by hand."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        for key in self.layers if isinstance(self.layers, nn.ModuleDict) else range(len(self.layers)):
            x = torch.tanh(self.layers[key](x))
        return x


class _Held(nn.Module):
    """Parameters in a container."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.values = values

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.values[k] for k in (self.values if isinstance(self.values, nn.ParameterDict) else (0, 1)))
        return torch.tanh(x @ first) * second


class _Own(nn.Module):
    """A module of the user's, with a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _Cell(nn.Module):
    """A recurrent cell over three steps."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in range(3):
            state = self.cell(x[:, step], state)
        return state[0] if isinstance(state, tuple) else state


def _decoder_layer() -> nn.Module:
    return nn.TransformerDecoderLayer(8, 2, 12, batch_first=True, dropout=0.1)


def _encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.1)


def _pads() -> dict[str, Survey]:
    cases: dict[str, Survey] = {}
    for rank in (1, 2, 3):
        for name in ("Circular", "Constant", "Reflection", "Replication", "Zero"):
            width = tuple(range(1, 2 * rank + 1))[: 2 * rank]
            width = tuple(min(w, 2) for w in width)
            arguments = (width, 0.5) if name == "Constant" else (width,)
            cases[f"{name}Pad{rank}d"] = _of(getattr(nn, f"{name}Pad{rank}d"), *arguments, kind=f"{rank}d")
    return cases


def _ranked() -> dict[str, Survey]:
    """Layers that exist for one, two and three dimensions."""
    cases: dict[str, Survey] = {}
    for rank in (1, 2, 3):
        kind = f"{rank}d"
        made: dict[str, tuple[Any, ...]] = {
            "AdaptiveAvgPool": (2,),
            "AdaptiveMaxPool": (2,),
            "AvgPool": (2,),
            "MaxPool": (2,),
            "LPPool": (2, 2),
            "BatchNorm": (4,),
            "InstanceNorm": (4,),
            "LazyBatchNorm": (),
            "LazyInstanceNorm": (),
            "Conv": (4, 3, 2),
            "ConvTranspose": (4, 3, 2),
            "LazyConv": (3, 2),
            "LazyConvTranspose": (3, 2),
            "Dropout": (0.4,),
        }
        for name, arguments in made.items():
            cases[f"{name}{kind}"] = _of(getattr(nn, f"{name}{kind}"), *arguments, kind=kind)
        pool, unpool = getattr(nn, f"MaxPool{kind}"), getattr(nn, f"MaxUnpool{kind}")
        cases[f"MaxUnpool{kind}"] = Survey(
            lambda pool=pool, unpool=unpool: _Unpool(pool(2, return_indices=True), unpool(2)), kind
        )
    return cases


CLASSES: dict[str, Survey] = {
    **{name: _of(getattr(nn, name)) for name in _ACTIVATIONS},
    **_pads(),
    **_ranked(),
    "AdaptiveLogSoftmaxWithLoss": _loss(
        lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 8, [2, 5], div_value=1.0),
        lambda loss, x, t: loss(x, t).loss,
        target=LABELS,
    ),
    "AlphaDropout": _of(nn.AlphaDropout, 0.3),
    "BCELoss": _loss(nn.BCELoss, lambda loss, x, t: loss(torch.sigmoid(x), t), target=REAL),
    "BCEWithLogitsLoss": _loss(nn.BCEWithLogitsLoss, lambda loss, x, t: loss(x, t), target=REAL),
    "Bilinear": Survey(lambda: _Twice(nn.Bilinear(6, 6, 5))),
    "CTCLoss": _loss(
        nn.CTCLoss,
        lambda loss, x, t: loss(x.log_softmax(-1).transpose(0, 1), t, (5, 5, 5, 5), (2, 2, 2, 2)),
        "sequence",
        target=torch.tensor([[1, 2], [3, 4], [5, 6], [7, 1]]),
    ),
    "ChannelShuffle": _of(nn.ChannelShuffle, 2, kind="2d"),
    "CosineEmbeddingLoss": _loss(
        nn.CosineEmbeddingLoss, lambda loss, x, t: loss(x, torch.tanh(x), t), target=SIGNS[:, 0]
    ),
    "CosineSimilarity": Survey(lambda: _Twice(nn.CosineSimilarity(dim=1)), "2d"),
    "CrossEntropyLoss": _loss(nn.CrossEntropyLoss, lambda loss, x, t: loss(x, t), target=LABELS),
    "CrossMapLRN2d": _of(nn.CrossMapLRN2d, 3, kind="2d"),
    "DataParallel": Survey(lambda: nn.DataParallel(nn.Linear(6, 6))),
    "Dropout": _of(nn.Dropout, 0.4),
    "Embedding": _of(nn.Embedding, 10, 6, kind="tokens"),
    "EmbeddingBag": _of(nn.EmbeddingBag, 10, 6, kind="tokens"),
    "FeatureAlphaDropout": _of(nn.FeatureAlphaDropout, 0.3, kind="2d"),
    "Flatten": _of(nn.Flatten, kind="2d"),
    "Fold": Survey(lambda: nn.Fold((3, 4), 2), "fold"),
    "FractionalMaxPool2d": _of(nn.FractionalMaxPool2d, 2, output_ratio=0.6, kind="2d"),
    "FractionalMaxPool3d": _of(nn.FractionalMaxPool3d, 2, output_ratio=0.6, kind="3d"),
    "GLU": _of(nn.GLU),
    "GRU": Survey(lambda: _Recurrent(nn.GRU(8, 5, batch_first=True)), "sequence"),
    "GRUCell": Survey(lambda: _Cell(nn.GRUCell(8, 5)), "sequence"),
    "GaussianNLLLoss": _loss(nn.GaussianNLLLoss, lambda loss, x, t: loss(x, t, x.square() + 1), target=REAL),
    "GroupNorm": _of(nn.GroupNorm, 2, 4, kind="2d"),
    "HingeEmbeddingLoss": _loss(nn.HingeEmbeddingLoss, lambda loss, x, t: loss(x, t), target=SIGNS),
    "HuberLoss": _loss(nn.HuberLoss, lambda loss, x, t: loss(x, t), target=REAL),
    "Identity": _of(nn.Identity),
    "KLDivLoss": _loss(
        lambda: nn.KLDivLoss(reduction="batchmean"), lambda loss, x, t: loss(x.log_softmax(-1), t), target=REAL
    ),
    "L1Loss": _loss(nn.L1Loss, lambda loss, x, t: loss(x, t), target=REAL),
    "LSTM": Survey(lambda: _Recurrent(nn.LSTM(8, 5, batch_first=True)), "sequence"),
    "LSTMCell": Survey(lambda: _Cell(nn.LSTMCell(8, 5)), "sequence"),
    "LayerNorm": _of(nn.LayerNorm, 8, kind="sequence"),
    "LazyLinear": _of(nn.LazyLinear, 5),
    "Linear": _of(nn.Linear, 6, 5),
    "LinearCrossEntropyLoss": _loss(
        lambda: nn.LinearCrossEntropyLoss(6, 7), lambda loss, x, t: loss(x, t), target=LABELS
    ),
    "LocalResponseNorm": _of(nn.LocalResponseNorm, 3, kind="2d"),
    "LogSoftmax": _of(nn.LogSoftmax, dim=-1),
    "MSELoss": _loss(nn.MSELoss, lambda loss, x, t: loss(x, t), target=REAL),
    "MarginRankingLoss": _loss(nn.MarginRankingLoss, lambda loss, x, t: loss(x, torch.tanh(x), t), target=SIGNS),
    "Module": Survey(_Own),
    "ModuleDict": Survey(lambda: _Named(nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}))),
    "ModuleList": Survey(lambda: _Named(nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]))),
    "MultiLabelMarginLoss": _loss(nn.MultiLabelMarginLoss, lambda loss, x, t: loss(x, t), target=SEVERAL),
    "MultiLabelSoftMarginLoss": _loss(nn.MultiLabelSoftMarginLoss, lambda loss, x, t: loss(x, t), target=REAL.round()),
    "MultiMarginLoss": _loss(nn.MultiMarginLoss, lambda loss, x, t: loss(x, t), target=LABELS),
    "MultiheadAttention": Survey(lambda: _Attention(dropout=0.1), "sequence"),
    "NLLLoss": _loss(nn.NLLLoss, lambda loss, x, t: loss(x.log_softmax(-1), t), target=LABELS),
    "PairwiseDistance": Survey(lambda: _Twice(nn.PairwiseDistance()), "sequence"),
    "ParameterDict": Survey(
        lambda: _Held(nn.ParameterDict({"first": torch.randn(6, 6) / 3, "second": torch.randn(6)})),
    ),
    "ParameterList": Survey(lambda: _Held(nn.ParameterList([torch.randn(6, 6) / 3, torch.randn(6)]))),
    "PixelShuffle": _of(nn.PixelShuffle, 2, kind="2d"),
    "PixelUnshuffle": _of(nn.PixelUnshuffle, 2, kind="2d"),
    "PoissonNLLLoss": _loss(nn.PoissonNLLLoss, lambda loss, x, t: loss(x, t), target=REAL),
    "RMSNorm": _of(nn.RMSNorm, 8, kind="sequence"),
    "RNN": Survey(lambda: _Recurrent(nn.RNN(8, 5, batch_first=True)), "sequence"),
    "RNNCell": Survey(lambda: _Cell(nn.RNNCell(8, 5)), "sequence"),
    "Sequential": Survey(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))),
    "SmoothL1Loss": _loss(nn.SmoothL1Loss, lambda loss, x, t: loss(x, t), target=REAL),
    "SoftMarginLoss": _loss(nn.SoftMarginLoss, lambda loss, x, t: loss(x, t), target=SIGNS),
    "Softmax": _of(nn.Softmax, dim=-1),
    "Softmax2d": _of(nn.Softmax2d, kind="2d"),
    "Softmin": _of(nn.Softmin, dim=-1),
    "SyncBatchNorm": _of(nn.SyncBatchNorm, 4, kind="2d"),
    "Threshold": _of(nn.Threshold, 0.1, -0.2),
    "Transformer": Survey(lambda: _Twice(nn.Transformer(8, 2, 1, 1, 12, batch_first=True, dropout=0.1)), "sequence"),
    "TransformerDecoder": Survey(lambda: _Twice(nn.TransformerDecoder(_decoder_layer(), 1)), "sequence"),
    "TransformerDecoderLayer": Survey(lambda: _Twice(_decoder_layer()), "sequence"),
    "TransformerEncoder": Survey(lambda: nn.TransformerEncoder(_encoder_layer(), 1), "sequence"),
    "TransformerEncoderLayer": Survey(_encoder_layer, "sequence"),
    "TripletMarginLoss": _loss(nn.TripletMarginLoss, lambda loss, x, t: loss(x, torch.tanh(x), t), target=REAL),
    "TripletMarginWithDistanceLoss": _loss(
        lambda: nn.TripletMarginWithDistanceLoss(distance_function=nn.PairwiseDistance()),
        lambda loss, x, t: loss(x, torch.tanh(x), t),
        target=REAL,
    ),
    "Unflatten": _of(nn.Unflatten, 1, (2, 2), kind="2d"),
    "Unfold": _of(nn.Unfold, 2, kind="2d"),
    "Upsample": _of(nn.Upsample, scale_factor=2, mode="bilinear", kind="2d"),
    "UpsamplingBilinear2d": _of(nn.UpsamplingBilinear2d, scale_factor=2, kind="2d"),
    "UpsamplingNearest2d": _of(nn.UpsamplingNearest2d, scale_factor=2, kind="2d"),
}
