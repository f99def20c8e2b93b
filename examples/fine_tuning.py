"""Experiment 6: convert trained networks at rising loop gain, and fine-tune them by EP.

    .venv/bin/python examples/fine_tuning.py [--quick] [--network digits] [--out results/fine_tuning]

A trained network is converted, which changes its answers the more the larger the loop gain is, and is then trained on
by EP with that loop gain held. Test accuracy before and after, beside the source's. Three networks:

    digits              17 layers, 8 residual blocks with batch norm folded, trained here by backprop on --data
    digit-recognizer    a CNN for 28×28 digits out of a package on PyPI, on scikit-learn's digits, unlike what it was
                        trained on: so the source is trained on too, by backprop, as far as the hybrids
    efficientnet-lite0  trained on ImageNet, out of a package, 17 blocks of several layers with batch norm folded. There
                        are no labels here: it learns the source's own probabilities of random views of some pictures,
                        half of them mixed with a second one, and is tested on views of other pictures of which the
                        source is sure, against its answer there. A few pictures are enough for that, if their views are
                        many and mixed (Beyer et al. 2021, arXiv 2106.05237; Asano & Saeed 2021, arXiv 2112.00725)

`make trained` installs the packages. The pictures are those that scikit-learn and matplotlib ship, and scikit-image
where it is installed, or --pictures DIR. An hour on one thread, most of it for efficientnet-lite0.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from command_line import add_options, chosen, device_of, feedback_of, positive, positive_number, read_options, told
from experiment import Experiment, once
from experiment_data import Data, load
from experiment_training import Recipe, Row, accuracy, training, training_and_accuracy
from safetensors.torch import load_file, save
from torch import Tensor, nn
from trained_models import (
    MissingPackage,
    digit_recognizer,
    efficientnet_lite0,
    framed_digits,
    package_folder,
    shipped_pictures,
)

import ffebm_compiler as ffebm
from ffebm_compiler.files.whole_files import write_whole

CLASSES, SURE = 1000, 0.5
VIEWS = 32
"""Inputs of a batch in evaluation: large pictures want few."""


@dataclass(frozen=True)
class Task:
    """A trained network, the data it is trained on further, and how."""

    source: nn.Module
    data: Data
    recipe: Recipe
    options: dict[str, Any] = field(default_factory=dict)
    """Of `convert`."""
    labelled: bool = True
    """Whether labels are true ones, so that the source itself has something to learn."""


class Residual(nn.Module):
    """x + two convolutions with batch norm, and ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        h = F.relu(self.norms[0](self.convs[0](x)))
        return F.relu(x + self.norms[1](self.convs[1](h)))


def residual(data: Data, width: int, blocks: int) -> nn.Sequential:
    """A convolution, residual blocks with a pooling after the first half, and a readout."""
    shape = data.training[0].shape[1:]
    if len(shape) != 3:
        raise ffebm.InputError(f"{data.name} has inputs of shape {tuple(shape)}; expected images")
    layers: list[nn.Module] = [nn.Conv2d(shape[0], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    for index in range(blocks):
        layers += [Residual(width), *[nn.AvgPool2d(2)] * (index == (blocks - 1) // 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, data.classes))


def digits(options: argparse.Namespace, seed: int) -> Task:
    """A residual network, trained here."""
    data = load(options.data, options.folder).to(device_of(options))
    torch.manual_seed(seed)
    source = residual(data, 4 if options.quick else 16, 2 if options.quick else 8).to(data.device)
    recipe = Recipe(1 if options.quick else 12, 2e-3)

    def train(path: Path) -> None:
        checkpoint = path.with_suffix(".pt")
        for _ in training(source, data, recipe, seed, checkpoint):
            pass
        write_whole(path, save(source.state_dict()))
        checkpoint.unlink()

    source.load_state_dict(load_file(once(options.out / f"source-{seed}.safetensors", train)))
    return Task(source, data, Recipe(6, 5e-4), {"fold_batchnorm": True, "block_ops": ("add",)})


def recognizer(options: argparse.Namespace, seed: int) -> Task:
    """digit-recognizer-py's network."""
    data = load("digits")
    parts = [(framed_digits((x + 1) / 2), y) for x, y in (data.training, data.test)]
    data = replace(data, training=parts[0], test=parts[1]).to(device_of(options))
    return Task(digit_recognizer().to(data.device), data, Recipe(4, 2e-4))


def efficientnet(options: argparse.Namespace, seed: int) -> Task:
    """EfficientNet-Lite0 on views of pictures; its drops are off, since it is to stay as it is."""
    device = device_of(options)
    source = efficientnet_lite0().to(device)
    source._global_params = source._global_params._replace(drop_connect_rate=0.0)  # type: ignore[union-attr, operator]
    source._dropout.p = 0.0  # type: ignore[union-attr]
    given, held = ([picture.to(device) for picture in part] for part in pictures(options.pictures))
    x = mixed(views(given, 2 * options.views, options.side, 1 + seed, smallest=0.15), seed)
    test = views(held, options.held, options.side, 0)
    with torch.no_grad():
        soft, answers = (torch.cat([source(part).softmax(1) for part in inputs.split(32)]) for inputs in (x, test))
    sure = answers.amax(1) >= SURE
    if not sure.any():
        raise ffebm.InputError(
            f"the source network is sure of its answer for none of {len(test)} held-out views: raise --held"
        )
    data = Data("pictures", (x, soft), (test[sure], answers[sure].argmax(1)), CLASSES)
    return Task(source, data, Recipe(1, 2e-5, batch=8), {"fold_batchnorm": True}, labelled=False)


def pictures(folder: Path | None) -> tuple[list[Tensor], list[Tensor]]:
    """Pictures to train on and others to test on, every third one, [1, 3, height, width] in 0 to 255.

    Raises:
        InputError: there are fewer than three, or a file is no complete picture.
    """
    from PIL import Image, UnidentifiedImageError

    found: list[Tensor] = []
    if folder is not None:
        paths = sorted([*folder.glob("*.png"), *folder.glob("*.jpg")])
    else:
        found, paths = shipped_pictures(), []
        with contextlib.suppress(MissingPackage):
            place = package_folder("skimage") / "data"
            names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg", "retina.jpg")
            paths = [place / name for name in names]
    for path in paths:
        try:
            with Image.open(path) as picture:
                values = np.array(picture.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ffebm.InputError(f"{path} is no complete picture ({error})") from None
        found.append(torch.from_numpy(values).permute(2, 0, 1).float()[None])
    if len(found) < 3:
        raise ffebm.InputError(f"{folder} has {len(found)} pictures (.png, .jpg); expected at least 3")
    return [picture for i, picture in enumerate(found) if i % 3 != 1], found[1::3]


def mixed(given: Tensor, seed: int) -> Tensor:
    """Half as many views: those of the first half, every second one of them mixed with a random one of the others."""
    generator = torch.Generator().manual_seed(seed)
    alone, others = given.chunk(2)
    shares = torch.rand(len(alone), generator=generator).to(given.device)
    shares[torch.randperm(len(alone), generator=generator)[::2]] = 0
    return torch.lerp(alone, others[torch.randperm(len(others), generator=generator)], shares[:, None, None, None])


def views(given: list[Tensor], count: int, side: int, seed: int, smallest: float = 0.4) -> Tensor:
    """Square parts of the pictures in turn, from `smallest` of the shorter side on, some mirrored: (v − 127)/128."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        picture = given[index % len(given)]
        height, width = picture.shape[2:]
        part, down, right, mirrored = torch.rand(4, generator=generator).tolist()
        size = round((smallest + (1 - smallest) * part) * min(height, width))
        top, left = round(down * (height - size)), round(right * (width - size))
        view = picture[..., top : top + size, left : left + size]
        view = F.interpolate(view, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        found.append(view.flip(-1) if mirrored < 0.5 else view)
    return (torch.cat(found) - 127) / 128


TASKS: dict[str, Callable[[argparse.Namespace, int], Task]] = {
    "digits": digits,
    "digit-recognizer": recognizer,
    "efficientnet-lite0": efficientnet,
}


def deviation(model: nn.Module, source: nn.Module, x: Tensor) -> float:
    """‖model(x) − source(x)‖/‖source(x)‖ in evaluation mode."""
    with torch.no_grad():
        expected, found = (torch.cat([net.eval()(part) for part in x.split(VIEWS)]) for net in (source, model))
    return float((found - expected).norm() / expected.norm())


def fine_tuned(task: Task, key: Row, recipe: Recipe, checkpoint: Path) -> Iterator[Row]:
    """A row before any training, and one for each epoch."""
    data, x = task.data, task.data.scaled(task.data.test[0])
    source = accuracy(task.source, data, data.test, VIEWS)
    model: nn.Module = copy.deepcopy(task.source)
    if key["feedback"] != "backprop":
        model = ffebm.convert(task.source.eval(), x[:2], feedback=feedback_of(key["feedback"]), **task.options)
    before: Row = {
        "source": source,
        "before": accuracy(model, data, data.test, VIEWS),
        "away": deviation(model, task.source, x),
    }
    yield {"epoch": 0, **before, "test": before["before"]}
    for row in training_and_accuracy(model, data, recipe, key["seed"], checkpoint, VIEWS):
        yield {**row, **before}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/fine_tuning", epochs=0)
    parser.add_argument("--network", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--feedback", nargs="+", default=["backprop", "0.03", "0.1", "0.3", "0.5", "0.9"])
    parser.add_argument("--rate", type=positive_number, help="instead of each network's own")
    parser.add_argument("--batch", type=positive, help="instead of each network's own")
    parser.add_argument("--pictures", type=Path, help="folder of .png and .jpg pictures for efficientnet-lite0")
    parser.add_argument(
        "--side", type=positive, default=128, help="pixels of a view's side; the network was trained at 224"
    )
    parser.add_argument("--views", type=positive, default=640, help="views to train on")
    parser.add_argument("--held", type=positive, default=600, help="views of other pictures")
    options = read_options(parser, network=["digits"], feedback=["0.3"], seeds=1, epochs=1)
    torch.set_num_threads(1)
    names = ("data", "folder", "device", "epochs", "rate", "batch", "pictures", "side", "views", "held", "quick")
    with told(parser):
        experiment = Experiment(options.out, "fine-tuning", chosen(options, *names))
        for name in options.network:
            task_of = cache(lambda seed, name=name: TASKS[name](options, seed))

            def one(key: Row, checkpoint: Path, task_of: Callable[[int], Task] = task_of) -> Iterator[Row]:
                task = task_of(key["seed"])
                given = {name: getattr(options, name) for name in ("epochs", "rate", "batch") if getattr(options, name)}
                yield from fine_tuned(task, key, replace(task.recipe, **given), checkpoint)

            gains = [g for g in options.feedback if g != "backprop" or name != "efficientnet-lite0"]
            try:
                keys = product([name], gains, range(options.seeds))
                experiment.run([dict(zip(("network", "feedback", "seed"), key, strict=True)) for key in keys], one)
            except MissingPackage as missing:
                print(f"{name}: {missing}")
        for column, text in (("source", "source"), ("before", "converted"), ("test", "fine-tuned")):
            print(f"{text}: test accuracy, %")
            print(experiment.table("network", "feedback", column))
        values = {"test": "test accuracy, %", "loss": "loss", "sweeps": "free sweeps"}
        print(f"curves: {experiment.picture('network', 'feedback', values)}")


if __name__ == "__main__":
    main()
