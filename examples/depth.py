"""Experiment 7: EP against backprop as a network gets deeper, by activation, loop gain and learning rate.

    .venv/bin/python examples/depth.py [--quick] [--blocks 8] [--rate 2e-3 1e-3] [--out results/depth]

Convolutional networks of n blocks, convolution, batch norm, activation, convolution, activation, and a linear readout:
2n + 1 layers. The two activations of a block settle together, its first state is driven by batch norm. Two tables:

    gradients   per layer, of one batch of the untrained network: the cosine of EP's gradient in float32 to implicit
                differentiation in float64, both at γ held; to the gradient with the part through γ, which follows the
                weights where the loop gain is held; and to backpropagation through the source
    training    test accuracy by epoch: Adam with a cosine schedule, batches of 64, torch's initialisation

`runs.csv` of the first has a column for each layer. `--gradient through` trains with the part through γ. By default 17
layers, ReLU, two rates: ten minutes on one thread.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import add_options, chosen, device_of, feedback_of, positive, positive_number, read_options, told
from experiment import Experiment
from experiment_data import Data, load
from experiment_training import Recipe, Row, training_and_accuracy
from torch import Tensor, nn

import ffebm_compiler as ffebm


class Clamp(nn.Module):
    """clamp(h/2, 0, 1), the hard sigmoid of the papers."""

    def forward(self, h: Tensor) -> Tensor:
        """Of the same shape."""
        return torch.clamp(0.5 * h, 0, 1)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "clamp": Clamp}
GRADIENTS = {"held": False, "through": True}
"""Whether the gradient goes through γ."""


def source(
    shape: Sequence[int], classes: int, blocks: int = 8, activation: str = "relu", width: int = 16, norm: bool = True
) -> nn.Sequential:
    """The network of 2·blocks + 1 layers for images of a shape (channels, side, side), the side a multiple of 4."""
    layers: list[nn.Module] = []
    for index in range(blocks):
        between = [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.Conv2d(width if index else shape[0], width, 3, padding=1), *between, ACTIVATIONS[activation]()]
        layers += [nn.Conv2d(width, width, 3, padding=1), ACTIVATIONS[activation]()]
        halved = (index == max(0, blocks // 2 - 1)) + (index == max(0, blocks * 3 // 4 - 1))
        layers += [nn.AvgPool2d(2)] * halved
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (shape[-1] // 4) ** 2, classes))


def network(data: Data, key: Row, width: int, norm: bool = True) -> nn.Module:
    """The network of a run, with its gradient, and torch's initialisation by the seed.

    Raises:
        InputError: the data are no square images whose side two poolings can halve.
    """
    shape = data.training[0].shape[1:]
    if len(shape) != 3 or shape[-1] != shape[-2] or shape[-1] % 4:
        raise ffebm.InputError(f"{data.name} has inputs of shape {tuple(shape)}; expected square images, side 4n")
    torch.manual_seed(key["seed"])
    model = source(shape, data.classes, key["blocks"], key["activation"], width, norm).to(data.device)
    if key["feedback"] == "backprop":
        return model
    estimator = ffebm.EquilibriumPropagation(through_feedback=GRADIENTS[key["gradient"]])
    example = data.scaled(data.training[0][:2])
    return ffebm.convert(model, example, feedback=feedback_of(key["feedback"]), digital_drive=norm, gradient=estimator)


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradients of the mean cross-entropy by the weights of the layers, without those of the norms."""
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    named = model.named_parameters()
    return {name: p.grad.flatten().double() for name, p in named if p.grad is not None and p.dim() > 1}


def cosines(data: Data, key: Row, width: int, batch: int) -> Row:
    """The cosine of every layer's gradient by EP to the three others, and the worst of each."""
    x, y = data.scaled(data.training[0][:batch]), data.training[1][:batch]
    hybrid = network(data, key, width)
    backprop = gradients(network(data, {**key, "feedback": "backprop"}, width), x, y)
    assert isinstance(hybrid, ffebm.HybridModel)
    exact = copy.deepcopy(hybrid).double()
    exact.set_solver(ffebm.GaussSeidel(rtol=1e-12, max_sweeps=500, relaxation=1.0))
    others = {"to backprop": backprop}
    for name, through in (("to implicit", False), ("to the one through γ", True)):
        exact.set_gradient(ffebm.Implicit(through_feedback=through))
        others[name] = gradients(exact, x.double(), y)
    found = gradients(hybrid, x, y)
    row: Row = {"epoch": 0}
    for name, other in others.items():
        each = {layer: float(F.cosine_similarity(gradient, other[layer], 0)) for layer, gradient in found.items()}
        row[name] = f"{min(each.values()):.6f}"
        row |= {f"{layer} {name}": f"{cosine:.6f}" for layer, cosine in each.items()}
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, "results/depth", epochs=12)
    parser.add_argument("--tables", nargs="+", choices=("gradients", "training"), default=["gradients", "training"])
    parser.add_argument("--activation", nargs="+", choices=tuple(ACTIVATIONS), default=["relu"])
    parser.add_argument("--blocks", nargs="+", type=positive, default=[8])
    parser.add_argument("--feedback", nargs="+", default=["backprop", "0.1", "0.5", "0.9"], help="loop gains, backprop")
    parser.add_argument("--gradient", nargs="+", choices=tuple(GRADIENTS), default=["held"])
    parser.add_argument("--rate", nargs="+", type=positive_number, default=[2e-3, 1e-3])
    parser.add_argument("--width", type=positive, default=16)
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--no-norm", action="store_true", help="without batch norm")
    few = {"blocks": [2], "rate": [2e-3], "feedback": ["backprop", "0.5"]}
    options = read_options(parser, epochs=1, seeds=1, width=4, **few)
    torch.set_num_threads(1)
    with told(parser):
        data = load(options.data, options.folder).to(device_of(options))
        if options.quick:
            data = data.first(256, 64)
        shared = chosen(options, "data", "folder", "device", "width", "batch")
        kinds = [
            {"activation": activation, "blocks": blocks, "feedback": feedback, "gradient": gradient}
            for activation, blocks, feedback, gradient in product(
                options.activation, options.blocks, options.feedback, options.gradient
            )
            if feedback != "backprop" or gradient == options.gradient[0]
        ]
        seeds = range(options.seeds)
        if "gradients" in options.tables:
            near = Experiment(options.out / "gradients", "gradients", shared)
            near.run(
                [{**k, "seed": s} for k in kinds if k["feedback"] != "backprop" for s in seeds],
                lambda key, _: iter([cosines(data, key, options.width, options.batch)]),
            )
            for name in ("to implicit", "to the one through γ", "to backprop"):
                print(f"cosine of the worst layer, {name}")
                print(near.table(("activation", "blocks"), "feedback", name, ".4f"))
        if "training" not in options.tables:
            return
        settings = {**shared, **chosen(options, "epochs", "no_norm", "quick")}
        experiment = Experiment(options.out / "training", "depth", settings)

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            model = network(data, key, options.width, not options.no_norm)
            recipe = Recipe(options.epochs, key["rate"], options.batch)
            yield from training_and_accuracy(model, data, recipe, key["seed"], checkpoint)

        experiment.run([{**k, "rate": rate, "seed": s} for k in kinds for rate in options.rate for s in seeds], one)
        print("test accuracy, %")
        print(experiment.table(("activation", "blocks", "gradient", "rate"), "feedback", "test"))
        values = {"test": "test accuracy, %", "loss": "loss", "sweeps": "free sweeps"}
        print(f"curves: {experiment.picture(('activation', 'blocks', 'rate'), 'feedback', values)}")


if __name__ == "__main__":
    main()
