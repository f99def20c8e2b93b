"""Experiment 5: a character transformer whose MLPs settle, trained by EP, implicit differentiation and backprop.

    .venv/bin/python examples/character_transformer.py [--quick] [--text FILE_OR_FOLDER] [--out results/transformer]

Three layers of width 64 on the standard library's own source text, or on a text of yours (Penn Treebank, WikiText).
Attention is digital; the two layers of every MLP are one energy block. All runs have the same seed, initial weights,
batches and number of steps; the loop gain is held in every step. Bits a character on the held-out text. Half an hour on
one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from command_line import device_of, positive, positive_number, read_options, told
from experiment import Experiment
from experiment_data import Text, load_text
from experiment_training import Checkpoint, Row, differentiated, seconds
from torch import Tensor, nn

import ffebm_compiler as ffebm

METHODS: dict[str, dict[str, object] | None] = {
    "backprop": None,
    "ep, κ 0.1": {"feedback": 0.1},
    "ep, κ 0.5": {"feedback": 0.5},
    "implicit, κ 0.5": {"feedback": 0.5, "gradient": "implicit"},
    "ep, symmetric": {"feedback": "symmetric"},
}


class Layer(nn.Module):
    """Causal attention, then an MLP of two layers, each after a layer norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.mixed = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, characters, width), as x."""
        parts = self.mixed(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.joined(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Scores of the next character at every place of a text."""

    def __init__(self, characters: int, context: int, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        """(batch, context) -> (batch, context, characters)."""
        scores: Tensor = self.scores(self.norm(self.layers(self.characters(text) + self.places)))
        return scores


def bits(model: nn.Module, text: Tensor, context: int, batch: int = 32) -> float:
    """Bits a character on a text, read in pieces of `context` characters."""
    model.eval()
    count = (len(text) - 1) // context
    x, y = text[: count * context].view(count, context), text[1 : count * context + 1].view(count, context)
    with torch.no_grad():
        total = sum(
            float(F.cross_entropy(model(a).flatten(0, 1), b.flatten(), reduction="sum"))
            for a, b in zip(x.split(batch), y.split(batch), strict=True)
        )
    model.train()
    return total / (count * context) / math.log(2)


def train(model: nn.Module, text: Text, seed: int, options: argparse.Namespace, checkpoint: Path) -> Iterator[Row]:
    """Train, and yield a row every `every` steps.

    Raises:
        Diverged: the loss is not finite, or a block does not settle; names it.
    """
    optimizer = torch.optim.AdamW(model.parameters(), options.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(seed)
    kept = Checkpoint(checkpoint, model, {"optimizer": optimizer, "schedule": schedule}, generator)
    device = text.training.device
    losses, started = [], seconds(device)
    model.train()
    for step in range(kept.resume(), options.steps + 1):
        starts = torch.randint(len(text.training) - options.context - 1, (options.batch,), generator=generator)
        pieces = torch.stack([text.training[s : s + options.context + 1] for s in starts.tolist()])
        optimizer.zero_grad()
        losses.append(differentiated(model, partial(_loss, model, pieces), f"step {step}") / math.log(2))
        optimizer.step()
        schedule.step()
        if step % options.every == 0 or step == options.steps:
            row = {"epoch": step, "training": statistics.mean(losses), "seconds": seconds(device) - started}
            yield {**row, "bits": bits(model, text.validation[: options.held], options.context)}
            kept.save(step)
            losses, started = [], seconds(device)


def _loss(model: nn.Module, pieces: Tensor) -> Tensor:
    return F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file, or a folder with *train* and *valid* files")
    parser.add_argument("--method", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--steps", type=positive, default=400)
    parser.add_argument("--every", type=positive, default=50, help="steps between two rows of curves.csv")
    parser.add_argument("--batch", type=positive, default=32)
    parser.add_argument("--context", type=positive, default=64)
    parser.add_argument("--rate", type=positive_number, default=2e-3)
    parser.add_argument("--seeds", type=positive, default=1)
    parser.add_argument("--held", type=positive, default=20_000, help="characters of the held-out text")
    parser.add_argument("--quick", action="store_true", help="six steps of small batches")
    parser.add_argument("--out", type=Path, default=Path("results/transformer"))
    options = read_options(parser, steps=6, every=3, batch=4, context=16, held=600)
    torch.set_num_threads(1)
    with told(parser):
        text, device = load_text(options.text), device_of(options)
        text = replace(text, training=text.training.to(device), validation=text.validation.to(device))
        shortest = min(len(text.training) - 1, min(len(text.validation), options.held))
        if shortest <= options.context:
            raise ffebm.InputError(
                f"the text has {len(text.training)} characters to train on and {len(text.validation)} held out, of "
                f"which --held takes {options.held}; both must be more than --context {options.context}"
            )
        names = ("text", "device", "steps", "every", "batch", "context", "rate", "held")
        experiment = Experiment(options.out, "transformer", {name: getattr(options, name) for name in names})

        def one(key: Row, checkpoint: Path) -> Iterator[Row]:
            torch.manual_seed(key["seed"])
            model: nn.Module = Transformer(len(text.characters), options.context).to(device)
            settings = METHODS[key["method"]]
            if settings is not None:
                model = ffebm.convert(model, text.training[None, : options.context].repeat(2, 1), **settings)
            yield from train(model, text, key["seed"], options, checkpoint)

        keys = [{"layers": 3, "method": m, "seed": seed} for m in options.method for seed in range(options.seeds)]
        experiment.run(keys, one)
        print("bits a character, and CPU seconds of the last steps")
        print(experiment.table("method", "layers", "bits", ".3f"))
        print(experiment.table("method", "layers", "seconds", ".1f"))
        print(f"curves: {experiment.picture('layers', 'method', {'bits': 'bits a character'})}")


if __name__ == "__main__":
    main()
