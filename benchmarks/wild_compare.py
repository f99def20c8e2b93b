"""Whether the hybrid of one case of `wild.py` is its source: values, gradients, random draws and written state."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from zoo_models import Case

import ffebm_compiler as ffebm
from ffebm_compiler.errors import FFEBMError
from ffebm_compiler.hardware.fabric import Hardware

ONE_LAYER = Hardware(layers_per_block=1)
VALUES, GRADIENTS = 1e-4, 5e-3
CALLS = ("eval", "train", "train", "eval")
"""The modes of the forwards, each with a backward; the state is compared after the last."""


class Unusable(Exception):
    """The source says nothing about the compiler: it fails, or it is not a function of its inputs and the seed."""


def seed(value: int) -> None:
    """Seed every generator that a network may draw from."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def tensors(value: Any, path: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in a value of any class, with where it lies."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from tensors(item, f"{path}[{index}]")
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}")
    elif type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        for name, item in vars(value).items():
            yield from tensors(item, f"{path}.{name}")


def deviation(found: Tensor, wanted: Tensor, floor: float = 1e-12) -> float:
    """‖found − wanted‖ / max(‖wanted‖, floor); infinite where shapes or what is not a number differ."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if not wanted.numel():
        return 0.0
    if wanted.is_quantized or not (wanted.is_floating_point() or wanted.is_complex()):
        return 0.0 if torch.equal(found, wanted) else float("inf")
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    found, wanted = found.detach().to(wide), wanted.detach().to(wide)
    if not torch.equal(found.isfinite(), wanted.isfinite()):
        return float("inf")
    found, wanted = found.nan_to_num(0, 0, 0), wanted.nan_to_num(0, 0, 0)
    return float((found - wanted).norm() / wanted.norm().clamp_min(floor))


def varied(model: nn.Module) -> nn.Module:
    """Give constant parameters noise: with a last layer that starts at zero any network would compare equal."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel() > 1
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return model


def copied(inputs: Any, differentiable: bool) -> Any:
    """Fresh inputs of the same values, of which the floating-point ones ask for a gradient."""
    if isinstance(inputs, Tensor):
        fresh = inputs.detach().clone()
        return fresh.requires_grad_() if differentiable and fresh.is_floating_point() else fresh
    if isinstance(inputs, dict):
        return {key: copied(item, differentiable) for key, item in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(copied(item, differentiable) for item in inputs)
    return inputs


def run(network: nn.Module, case: Case, mode: str, call: int, nudge: float = 0.0) -> dict[str, Any]:
    """One forward and backward: outputs, gradients and the generator's state."""
    network.train(mode == "train")
    network.zero_grad()
    given = copied((case[1], case[2]), differentiable=True)
    if nudge:
        for _, leaf in tensors(given):
            if leaf.is_floating_point():
                leaf.data *= 1 + nudge * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
    seed(5 + call)
    output = network(*given[0], **given[1])
    drawn = torch.get_rng_state()
    cached = "past_key_values" in given[1]  # a cache that nobody asked for is left out on purpose (`without_cache`)
    found = [(path, leaf) for path, leaf in tensors(output) if cached or "past_key_values" not in path]
    generator = torch.Generator().manual_seed(7)
    reached = [
        (leaf * torch.randn(leaf.shape, generator=generator).to(leaf)).sum()
        for _, leaf in found
        if leaf.requires_grad and leaf.is_floating_point()
    ]
    if reached:
        torch.stack([term.float() for term in reached]).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in network.named_parameters()}
    gradients |= {name: leaf.grad for name, leaf in tensors(given, "gradient of input") if leaf.is_floating_point()}
    kept = {name: None if grad is None else grad.detach().clone() for name, grad in gradients.items()}
    return {
        "class": type(output),
        "values": {name: leaf.detach().clone() for name, leaf in found},
        "gradients": kept,
        "drawn": drawn,
    }


def worst(found: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None], floor: float) -> tuple[float, str]:
    """The largest deviation over named tensors and its name; a missing one counts as zero."""
    largest = (0.0, "")
    for name, want in wanted.items():
        have = found.get(name)
        if want is None and have is None:
            continue
        have = torch.zeros_like(want) if have is None and want is not None else have
        want = torch.zeros_like(have) if want is None and have is not None else want
        assert have is not None
        assert want is not None
        largest = max(largest, (deviation(have, want, floor), name))
    return largest


def scale(gradients: Mapping[str, Tensor | None]) -> float:
    """A thousandth of the largest gradient: what is below is rounding, such as that of a bias before batch norm."""
    norms = [float(g.norm()) for g in gradients.values() if g is not None and bool(g.isfinite().all())]
    return max([1e-3 * norm for norm in norms], default=0.0) + 1e-6


def faults(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The two deviations of one call, and a sentence for each thing that differs."""
    sentences = []
    if found["class"] is not wanted["class"]:
        sentences.append(f"returns a {found['class'].__name__}, the source a {wanted['class'].__name__}")
    if list(found["values"]) != list(wanted["values"]):
        missing = [n for n in wanted["values"] if n not in found["values"]]
        more = [n for n in found["values"] if n not in wanted["values"]]
        sentences.append(f"outputs differ: missing {missing[:3]}, more {more[:3]}")
        return {"values": float("inf"), "gradients": float("inf")}, sentences
    value, where = worst(found["values"], wanted["values"], 1e-6)
    if value > VALUES:
        sentences.append(f"{where} deviates by {value:.1e}")
    gradient, what = worst(found["gradients"], wanted["gradients"], scale(wanted["gradients"]))
    if gradient > GRADIENTS:
        sentences.append(f"{what} deviates by {gradient:.1e}")
    if not torch.equal(found["drawn"], wanted["drawn"]):
        sentences.append("another number of random draws")
    return {"values": value, "gradients": gradient}, sentences


def conditioned(build: Callable[[], Case], mode: str, call: int, before: dict[str, Tensor]) -> dict[str, float]:
    """What a relative change of the inputs and weights of 3e-7, that of rounding, does to the source itself."""
    runs = []
    for nudge in (0.0, 3e-7):
        seed(0)
        case = build()
        network = varied(case[0])
        network.load_state_dict(before)
        with torch.no_grad():
            for index, parameter in enumerate(network.parameters()):
                generator = torch.Generator().manual_seed(index)
                if parameter.is_floating_point():
                    parameter *= 1 + nudge * torch.randn(parameter.shape, generator=generator).to(parameter)
        runs.append(run(network, case, mode, call, nudge))
    return faults(runs[1], runs[0])[0]


def compare(build: Callable[[], Case]) -> dict[str, Any]:
    """Convert one case and compare it over `CALLS`."""
    started = time.perf_counter()
    try:
        seed(0)
        case = build()
        seed(0)
        reference = build()
        source = varied(reference[0])
        model = varied(case[0])
        source.load_state_dict(model.state_dict())
        inputs = copied((case[1], case[2]), differentiable=False)
        row: dict[str, Any] = {
            "class": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
        }
        seed(0)
        twin = varied(build()[0])
        twin.load_state_dict(model.state_dict())
        wanted, states = [], []
        for call, mode in enumerate(CALLS):
            states.append({name: t.detach().clone() for name, t in source.state_dict().items()})
            wanted.append(run(source, case, mode, call))
        for call, mode in enumerate(CALLS[:2]):
            _, sentences = faults(run(twin, case, mode, call), wanted[call])
            if sentences:
                raise Unusable(f"the source differs from itself in {mode} mode: {'; '.join(sentences)}")
        del twin
    except Unusable as error:
        return {"verdict": "unusable", "stage": "source", "text": str(error)}
    except Exception as error:
        return {"verdict": "unusable", "stage": "source", "text": f"{type(error).__name__}: {error}"[:600]}
    row["source_seconds"] = round(time.perf_counter() - started, 2)
    stage = "convert"
    try:
        started = time.perf_counter()
        hybrid = ffebm.convert(model, *inputs, hardware=ONE_LAYER)
        row["convert_seconds"] = round(time.perf_counter() - started, 2)
        row["notes"] = list(hybrid.plan.notes)
        sentences = []
        for call, mode in enumerate(CALLS):
            stage = f"call {call} ({mode})"
            numbers, differ = faults(run(hybrid, case, mode, call), wanted[call])
            row.setdefault("calls", []).append({"mode": mode, **numbers})
            if differ:
                own = conditioned(build, mode, call, states[call])
                row["calls"][-1]["rounding"] = own
                if numbers["values"] <= 10 * own["values"] and numbers["gradients"] <= 10 * own["gradients"]:
                    differ = [s for s in differ if "deviates" not in s]
            sentences += [f"{stage}: {sentence}" for sentence in differ]
        stage = "state"
        state = hybrid.state_dict()
        if list(state) != list(source.state_dict()):
            sentences.append("the state dict has other keys")
        if not any("deviates" in sentence for sentence in sentences):
            off, name = worst(state, source.state_dict(), 1e-6)
            if off > VALUES and "rounding" not in str(row["calls"]):
                sentences.append(f"state: {name} deviates by {off:.1e}")
        stage = "the user's model afterwards"
        _, differ = faults(run(model, case, CALLS[0], 0), wanted[0])
        sentences += [f"{stage}: {sentence}" for sentence in differ]
    except FFEBMError as error:
        return {**row, "verdict": "refused", "stage": stage, "text": f"{type(error).__name__}: {error}"}
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        where = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in frames]
        return {
            **row,
            "verdict": "raw",
            "stage": stage,
            "text": f"{type(error).__name__}: {error}"[:600],
            "where": where,
        }
    return {**row, "verdict": "wrong" if sentences else "right", "text": "; ".join(sentences)}
