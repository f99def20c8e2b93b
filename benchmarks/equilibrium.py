"""What an equilibrium and its gradient cost, beside peers, in one run.

    python benchmarks/equilibrium.py [--steps 5] [--full] [--out benchmarks/results/equilibrium.json]
    python benchmarks/equilibrium.py --public-code PATH     # a checkout of rain-neuromorphics/energy-based-learning
    python benchmarks/equilibrium.py --device cuda [--tf32]

1. A training step of the deep convolutional Hopfield network 3-128-256-512-512-10 (times `--width`; `--full`: also
   at 1), symmetric feedback, with average and with max pooling. Ours against
   - backprop through the feedforward network of the same weights, and autograd through our sweeps (unrolled);
   - plain EP, the schedule of the public EP code enacted here (60 free, then 20 and 20 nudged asynchronous sweeps,
     classical difference of states, every drive recomputed). With max pooling and at full width its arithmetic is
     the 0.570 GMAC per sample and sweep that were counted in that code;
   - the public code itself with the same weights, where a checkout is given.
   "worst cosine" is the smallest of a parameter's gradient with the exact one (float64 implicit, settled to 1e-12).
   With max pooling there are several equilibria, and from zero, where plain EP starts, the network settles to another
   one than from the feedforward values: there its gradients are not judged.
2. A converted residual block of two convolutions against torchdeq's Anderson solver with implicit gradients on the
   same equations, weights and tolerance, where torchdeq is installed (`pip install --no-deps torchdeq==0.1.0`),
   and against backprop and unrolled.

One thread, or one GPU; the contestants take turns; medians of forward and backward, memory, and the floor under the
time: `measuring.py` says how each is measured.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import Contestant, add_options, measure, prepare, relate, show, step_memory, wanted, write
from peers import DCHN, MARK, SWEEPS, Block, plain_step, public_step, torchdeq_output

import ffebm_compiler as ffebm
from ffebm_compiler.hardware.fabric import Hardware

SIZES = {
    "cpu": {"batch": 16, "width": 0.25, "channels": 32, "side": 16},
    "cuda": {"batch": 128, "width": 1.0, "channels": 128, "side": 32},
}
OURS = "ours"
RTOL = 1e-4
"""Tolerance of both solvers in the second section."""

Build = Callable[[], Contestant]


def cosine(found: Iterable[Tensor | None], exact: Iterable[Tensor]) -> float:
    """The smallest cosine of a gradient with the exact one."""
    pairs = [(g.double().flatten(), e.double().flatten()) for g, e in zip(found, exact, strict=True) if g is not None]
    return min(float(F.cosine_similarity(g, e, dim=0)) for g, e in pairs)


def gradients(model: nn.Module, loss: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor | None]:
    """Gradients of a loss of the model's output, in the order of its parameters."""
    model.zero_grad(set_to_none=True)
    loss(model(x)).backward()
    return [parameter.grad for parameter in model.parameters()]


def sweeps_of(model: nn.Module) -> float | None:
    """Free-phase sweeps of a hybrid's last step."""
    last = model.blocks[0].module.last if isinstance(model, ffebm.HybridModel) else None
    return last.sweeps if last else None


class Exact:
    """The gradients of a converted model in float64, computed when first asked for."""

    def __init__(
        self, convert: Callable[..., nn.Module], source: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]
    ) -> None:
        self.convert, self.source, self.x, self.loss = convert, source, x, loss
        self.known: list[Tensor] = []

    def cosine(self, found: Callable[[], Iterable[Tensor | None]]) -> float:
        """The smallest cosine with them."""
        if not self.known:
            wide = self.convert(copy.deepcopy(self.source).double(), self.x.double(), gradient="implicit")
            self.known = [g for g in gradients(wide, self.loss, self.x.double()) if g is not None]
        return cosine(found(), self.known)

    def contestant(self, model: nn.Module) -> Contestant:
        """A step of the source, which has other gradients, or of a hybrid."""
        run = partial(gradients, model, self.loss, self.x)
        if model is self.source:
            return Contestant(run, model)
        return Contestant(run, model, partial(sweeps_of, model), partial(self.cosine, run))


def hopfield(options: argparse.Namespace, device: torch.device, width: float, pool: str) -> dict[str, Build]:
    """Section 1."""
    torch.manual_seed(0)
    source = DCHN(width, pool).to(device)
    x, labels = torch.rand(options.batch, 3, 32, 32).to(device), torch.randint(0, 10, (options.batch,)).to(device)
    big = Hardware(tile_rows=None, tile_cols=None, tiles_per_core=None, layers_per_block=5)
    convert = partial(ffebm.convert, hardware=big, feedback="symmetric", block_ops=("add", "reshape", f"{pool}_pool"))

    def loss(output: Tensor) -> Tensor:
        return 0.5 * (output - F.one_hot(labels, 10)).square().sum(1).mean()

    exact = Exact(convert, source, x, loss)

    def enacted(run: Callable[[], list[Tensor]]) -> Contestant:
        judged = pool == "avg"
        return Contestant(run, source, lambda: SWEEPS[0], partial(exact.cosine, run) if judged else lambda: None)

    found: dict[str, Build] = {
        "source, backprop": lambda: exact.contestant(source),
        OURS: lambda: exact.contestant(convert(source, x)),
        "unrolled": lambda: exact.contestant(convert(source, x, gradient="unrolled")),
        "plain EP": lambda: enacted(partial(plain_step, source, x, labels)),
    }
    if options.public_code:
        found["public code"] = lambda: enacted(public_step(options.public_code, source, x, labels))
    return found


def residual(options: argparse.Namespace, device: torch.device) -> dict[str, Build]:
    """Section 2."""
    torch.manual_seed(0)
    source = Block(options.channels).to(device)
    x = torch.randn(options.batch, options.channels, options.side, options.side).to(device)

    def loss(output: Tensor) -> Tensor:
        return output.square().mean()

    exact = Exact(ffebm.convert, source, x, loss)

    def ours(gradient: str) -> nn.Module:
        return ffebm.convert(source, x, gradient=gradient, solver=ffebm.GaussSeidel(rtol=RTOL))

    def torchdeq() -> Contestant:
        hybrid = ffebm.convert(source, x)
        scales = hybrid.blocks[0].module.scales

        def run() -> list[Tensor | None]:
            source.zero_grad(set_to_none=True)
            loss(torchdeq_output(source, x, scales[1] / scales[0], RTOL)).backward()
            return [parameter.grad for parameter in source.parameters()]

        return Contestant(run, source, cosine=partial(exact.cosine, run))

    found: dict[str, Build] = {
        "source, backprop": lambda: exact.contestant(source),
        OURS: lambda: exact.contestant(ours("implicit")),
        "unrolled": lambda: exact.contestant(ours("unrolled")),
    }
    if importlib.util.find_spec("torchdeq"):
        found["torchdeq"] = torchdeq
    return found


def sections(options: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], dict[str, Build]]]:
    """What is measured, by title."""
    widths = [options.width, *([1.0] if options.full and options.width != 1 else [])]
    found: dict[str, Callable[[], dict[str, Build]]] = {}
    for width in widths:
        for pool in ("avg", "max"):
            title = f"DCHN at {width:g} width, {pool} pooling, batch {options.batch}, one training step"
            found[title] = partial(hopfield, options, device, width, pool)
    title = f"a residual block of two convolutions of {options.channels} channels, implicit, tolerance {RTOL:g}"
    return found | {title: partial(residual, options, device)}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=5)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--width", type=float, help="of the Hopfield network; 1 is 3-128-256-512-512-10")
    parser.add_argument("--full", action="store_true", help="also at width 1")
    parser.add_argument("--channels", type=int, help="of the residual block")
    parser.add_argument("--side", type=int, help="of the residual block's images")
    parser.add_argument("--public-code", type=Path, metavar="PATH", help="checkout of energy-based-learning")
    options = parser.parse_args()
    for key, value in SIZES[options.device].items():
        setattr(options, key, getattr(options, key) or value)
    if options.public_code and not (options.public_code / MARK).is_file():
        parser.exit(2, f"{parser.prog}: --public-code {options.public_code}: there is no {MARK} in it\n")
    device = prepare(options, parser)
    asked = sections(options, device)
    if options.memory_of:
        title, name = options.memory_of
        print(step_memory(asked[title]()[name](), device))
        return
    tables = []
    for title, section in asked.items():
        if not wanted(title, options.table):
            continue
        builds = {name: build for name, build in section().items() if name == OURS or wanted(name, options.only)}
        rows = measure(title, {name: build() for name, build in builds.items()}, options, device)
        relate(rows, OURS, inverse=True)
        show(title, rows, options, ratio="ours/it")
        tables.append({"title": title, "rows": rows})
    if not importlib.util.find_spec("torchdeq"):
        print("torchdeq is not installed: its comparison is left out")
    write(tables, options)


if __name__ == "__main__":
    main()
