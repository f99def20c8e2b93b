"""Every function of torch.nn.functional that a network may contain, as `survey_cases.py` has the classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from survey_cases import LABELS, REAL, SEVERAL, SIGNS, Call, Survey
from torch import Tensor, nn

__all__ = ["FUNCTIONS"]


def _call(function: Callable[..., Any], *parameters: tuple[int, ...], kind: str = "flat", **buffers: Tensor) -> Survey:
    return Survey(lambda: Call(function, *parameters, **buffers), kind)


def _loss(function: Callable[..., Any], *parameters: tuple[int, ...], kind: str = "flat", **buffers: Tensor) -> Survey:
    return Survey(lambda: Call(function, *parameters, **buffers), kind, inner=False)


class _Dropout(nn.Module):
    """A dropout function that reads the module's flag, as users write it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, 0.4, self.training)


class _BatchNorm(nn.Module):
    """Batch norm with buffers of its own, as users write it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("variance", torch.ones(4))
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.function is F.instance_norm:
            return F.instance_norm(x, self.mean, self.variance, self.weight, self.bias, self.training)
        return self.function(x, self.mean, self.variance, self.weight, self.bias, self.training)


class _RReLU(nn.Module):
    """Leaky ReLU whose slope is random in train mode."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.function(x, training=self.training)
            if self.function is F.rrelu
            else self.function(x * 1.0, 0.1, 0.3, self.training)
        )


def _attention(x: Tensor, qkv: Tensor, out: Tensor) -> Tensor:
    value = x.transpose(0, 1)
    nothing = torch.zeros(24), torch.zeros(8)
    return F.multi_head_attention_forward(
        value, value, value, 8, 2, qkv, nothing[0], None, None, False, 0.0, out, nothing[1], need_weights=False
    )[0].transpose(0, 1)


def _pool_and_back(rank: int) -> Callable[[Tensor], Tensor]:
    pool, back = getattr(F, f"max_pool{rank}d"), getattr(F, f"max_unpool{rank}d")

    def call(x: Tensor) -> Tensor:
        values, winners = pool(x, 2, return_indices=True)
        return back(values, winners, 2)

    return call


def _ranked() -> dict[str, Survey]:
    """Functions that exist for one, two and three dimensions."""
    cases: dict[str, Survey] = {}
    for rank in (1, 2, 3):
        kind, kernel = f"{rank}d", (3,) * rank
        named: dict[str, Callable[..., Any]] = {
            "adaptive_avg_pool": lambda f: lambda x: f(x, 2),
            "adaptive_max_pool": lambda f: lambda x: f(x, 2),
            "avg_pool": lambda f: lambda x: f(x, 2),
            "max_pool": lambda f: lambda x: f(x, 2),
            "lp_pool": lambda f: lambda x: f(x, 2, 2),
        }
        for name, make in named.items():
            cases[f"{name}{kind}"] = _call(make(getattr(F, f"{name}{kind}")), kind=kind)
        for name in ("adaptive_max_pool", "max_pool"):
            function = getattr(F, f"{name}{kind}_with_indices")
            cases[f"{name}{kind}_with_indices"] = _call(lambda x, function=function: function(x, 2)[0], kind=kind)
        plain, transposed, dropped = (getattr(F, f"{name}{kind}") for name in ("conv", "conv_transpose", "dropout"))
        cases[f"conv{kind}"] = _call(lambda x, w, b, f=plain: f(x, w, b, padding=1), (5, 4, *kernel), (5,), kind=kind)
        cases[f"conv_transpose{kind}"] = _call(
            lambda x, w, b, f=transposed: f(x, w, b, stride=2),
            (4, 5, *kernel),
            (5,),
            kind=kind,
        )
        cases[f"max_unpool{kind}"] = _call(_pool_and_back(rank), kind=kind)
        cases[f"dropout{kind}"] = Survey(lambda f=dropped: _Dropout(f), kind)
    for rank in (2, 3):
        for name in (f"fractional_max_pool{rank}d", f"fractional_max_pool{rank}d_with_indices"):
            first, function = name.endswith("indices"), getattr(F, name)
            cases[name] = _call(
                lambda x, f=function, rank=rank, first=first: f(x, 2, output_ratio=(0.6,) * rank)[
                    0 if first else slice(None)
                ],
                kind=f"{rank}d",
            )
    return cases


def _grid(x: Tensor, theta: Tensor) -> Tensor:
    return F.grid_sample(
        x, F.affine_grid(theta.expand(x.shape[0], 2, 3), list(x.shape), align_corners=False), align_corners=False
    )


_PLAIN = (
    "celu", "elu", "gelu", "glu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid",
    "mish", "normalize", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softshrink", "softsign", "tanh",
    "tanhshrink",
)  # fmt: skip
_IN_PLACE = (F.celu_, F.elu_, F.hardtanh_, F.leaky_relu_, F.relu_, F.selu_)

FUNCTIONS: dict[str, Survey] = {
    **{name: _call(getattr(F, name)) for name in _PLAIN},
    **{f.__name__: _call(lambda x, f=f: f(x * 1.0)) for f in _IN_PLACE},
    **_ranked(),
    **{f.__name__: Survey(lambda f=f: _Dropout(f)) for f in (F.dropout, F.alpha_dropout)},
    "rrelu": Survey(lambda: _RReLU(F.rrelu)),
    "rrelu_": Survey(lambda: _RReLU(F.rrelu_)),
    "affine_grid": _call(_grid, (1, 2, 3), kind="2d"),
    "batch_norm": Survey(lambda: _BatchNorm(F.batch_norm), "2d"),
    "bilinear": _call(lambda x, w, b: F.bilinear(x, torch.tanh(x), w, b), (5, 6, 6), (5,)),
    "binary_cross_entropy": _loss(lambda x, t: F.binary_cross_entropy(torch.sigmoid(x), t), target=REAL),
    "binary_cross_entropy_with_logits": _loss(F.binary_cross_entropy_with_logits, target=REAL),
    "channel_shuffle": _call(lambda x: F.channel_shuffle(x, 2), kind="2d"),
    "conv_tbc": _call(F.conv_tbc, (3, 8, 5), (5,), kind="sequence"),
    "cosine_embedding_loss": _loss(lambda x, t: F.cosine_embedding_loss(x, torch.tanh(x), t), target=SIGNS[:, 0]),
    "cosine_similarity": _call(lambda x: F.cosine_similarity(x, torch.tanh(x)), kind="2d"),
    "cross_entropy": _loss(F.cross_entropy, target=LABELS),
    "ctc_loss": _loss(
        lambda x, t: F.ctc_loss(x.log_softmax(-1).transpose(0, 1), t, (5, 5, 5, 5), (2, 2, 2, 2)),
        kind="sequence",
        target=torch.tensor([[1, 2], [3, 4], [5, 6], [7, 1]]),
    ),
    "embedding": _call(F.embedding, (10, 6), kind="tokens"),
    "embedding_bag": _call(F.embedding_bag, (10, 6), kind="tokens"),
    "feature_alpha_dropout": Survey(lambda: _Dropout(F.feature_alpha_dropout), "2d"),
    "fold": _call(lambda x: F.fold(x, (3, 4), 2), kind="fold"),
    "gaussian_nll_loss": _loss(lambda x, t: F.gaussian_nll_loss(x, t, x.square() + 1), target=REAL),
    "grid_sample": _call(_grid, (1, 2, 3), kind="2d"),
    "group_norm": _call(lambda x, w, b: F.group_norm(x, 2, w, b), (4,), (4,), kind="2d"),
    "grouped_mm": _call(
        lambda x, w: F.grouped_mm(x.transpose(0, 1).bfloat16(), w.bfloat16()).float(), (5, 8, 8), kind="sequence"
    ),
    "gumbel_softmax": _call(F.gumbel_softmax),
    "hinge_embedding_loss": _loss(F.hinge_embedding_loss, target=SIGNS),
    "huber_loss": _loss(F.huber_loss, target=REAL),
    "instance_norm": Survey(lambda: _BatchNorm(F.instance_norm), "2d"),
    "interpolate": _call(lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), kind="2d"),
    "kl_div": _loss(lambda x, t: F.kl_div(x.log_softmax(-1), t, reduction="batchmean"), target=REAL),
    "l1_loss": _loss(F.l1_loss, target=REAL),
    "layer_norm": _call(lambda x, w, b: F.layer_norm(x, (8,), w, b), (8,), (8,), kind="sequence"),
    "linear": _call(F.linear, (5, 6), (5,)),
    "linear_cross_entropy": _loss(lambda x, w, t: F.linear_cross_entropy(x, w, t), (7, 6), target=LABELS),
    "local_response_norm": _call(lambda x: F.local_response_norm(x, 3), kind="2d"),
    "log_softmax": _call(lambda x: F.log_softmax(x, -1)),
    "margin_ranking_loss": _loss(lambda x, t: F.margin_ranking_loss(x, torch.tanh(x), t), target=SIGNS),
    "mse_loss": _loss(F.mse_loss, target=REAL),
    "multi_head_attention_forward": _call(_attention, (24, 8), (8, 8), kind="sequence"),
    "multi_margin_loss": _loss(F.multi_margin_loss, target=LABELS),
    "multilabel_margin_loss": _loss(F.multilabel_margin_loss, target=SEVERAL),
    "multilabel_soft_margin_loss": _loss(F.multilabel_soft_margin_loss, target=REAL.round()),
    "nll_loss": _loss(lambda x, t: F.nll_loss(x.log_softmax(-1), t), target=LABELS),
    "one_hot": _call(lambda x, w: F.one_hot(x, 10).to(w) @ w, (10, 6), kind="tokens"),
    "pad": _call(lambda x: F.pad(x, (1, 2, -1, 1), value=0.3), kind="2d"),
    "pairwise_distance": _call(lambda x: F.pairwise_distance(x, torch.tanh(x)), kind="sequence"),
    "pdist": _loss(lambda x: F.pdist(x).sum()),
    "pixel_shuffle": _call(lambda x: F.pixel_shuffle(x, 2), kind="2d"),
    "pixel_unshuffle": _call(lambda x: F.pixel_unshuffle(x, 2), kind="2d"),
    "poisson_nll_loss": _loss(F.poisson_nll_loss, target=REAL),
    "prelu": _call(F.prelu, (6,)),
    "rms_norm": _call(lambda x, w: F.rms_norm(x, (8,), w), (8,), kind="sequence"),
    "scaled_dot_product_attention": _call(
        lambda x: F.scaled_dot_product_attention(x, torch.tanh(x), x), kind="sequence"
    ),
    "smooth_l1_loss": _loss(F.smooth_l1_loss, target=REAL),
    "soft_margin_loss": _loss(F.soft_margin_loss, target=SIGNS),
    "softmax": _call(lambda x: F.softmax(x, -1)),
    "softmin": _call(lambda x: F.softmin(x, -1)),
    "threshold": _call(lambda x: F.threshold(x, 0.1, -0.2)),
    "threshold_": _call(lambda x: F.threshold_(x * 1.0, 0.1, -0.2)),
    "triplet_margin_loss": _loss(lambda x, t: F.triplet_margin_loss(x, torch.tanh(x), t), target=REAL),
    "triplet_margin_with_distance_loss": _loss(
        lambda x, t: F.triplet_margin_with_distance_loss(x, torch.tanh(x), t), target=REAL
    ),
    "unfold": _call(lambda x: F.unfold(x, 2), kind="2d"),
    "upsample": _call(lambda x: F.upsample(x, scale_factor=2), kind="2d"),
    "upsample_bilinear": _call(lambda x: F.upsample_bilinear(x, scale_factor=2), kind="2d"),
    "upsample_nearest": _call(lambda x: F.upsample_nearest(x, scale_factor=2), kind="2d"),
}
