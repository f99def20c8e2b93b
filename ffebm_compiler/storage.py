"""Save and load hybrids: JSON and safetensors, no pickle.

A folder holds `hybrid.json` (settings, and the structure of the example inputs), `plan.json` and
`weights.safetensors` (the `state_dict`, each tensor once). Loading needs the model's code, as any
`state_dict` does: the model is captured again, with zeros of the stored shapes as example inputs.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ffebm_compiler.errors import ExportError, InputError
from ffebm_compiler.plan import Plan
from ffebm_compiler.runtime.anderson import Anderson
from ffebm_compiler.runtime.gradients import (
    EquilibriumPropagation,
    Estimator,
    ImplicitDifferentiation,
    Unrolled,
)
from ffebm_compiler.runtime.newton import NewtonCG
from ffebm_compiler.runtime.solvers import GaussSeidel, Solver

if TYPE_CHECKING:
    from ffebm_compiler.hybrid import HybridModel

__all__ = ["Conversion", "load", "save"]

_SCHEMA = 1
_FILES = ("hybrid.json", "plan.json", "weights.safetensors")
_ESTIMATORS: dict[str, type[Estimator]] = {
    kind.__name__: kind for kind in (EquilibriumPropagation, ImplicitDifferentiation, Unrolled)
}
_SOLVERS: dict[str, type[Solver]] = {kind.__name__: kind for kind in (GaussSeidel, Anderson, NewtonCG)}


@dataclass(frozen=True)
class Conversion:
    """What `convert` was called with, as far as a plan does not hold it."""

    structure: str
    """The pytree of (args, kwargs), as JSON."""
    leaves: tuple[dict[str, Any], ...]
    """Shape and dtype of each tensor among the example inputs; the value of what is none."""
    dynamic_shapes: str | None
    """`"batch"` or None; `"custom"` for what cannot be stored."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Conversion:
        """The record of a call."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        described = tuple(
            {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
            if isinstance(leaf, Tensor)
            else {"value": leaf}
            for leaf in leaves
        )
        kept = dynamic_shapes if dynamic_shapes in ("batch", None) else "custom"
        return cls(pytree.treespec_dumps(spec), described, kept)

    def examples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example inputs of the stored shapes: zeros."""
        leaves = [
            torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"])) if "shape" in leaf else leaf["value"]
            for leaf in self.leaves
        ]
        args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(self.structure))
        return args, kwargs


def save(hybrid: HybridModel, path: str | Path) -> None:
    """Write a hybrid into a folder; an earlier save there is replaced as a whole.

    Raises:
        ExportError: where the path cannot be written or holds something else, or a setting of the
            hybrid cannot be stored.
    """
    target = Path(path)
    conversion = hybrid.conversion
    if conversion is None or conversion.dynamic_shapes == "custom":
        raise ExportError(
            "a hybrid converted with dynamic_shapes of your own cannot be saved: save hybrid.plan.to_json() and "
            "hybrid.state_dict(), and call convert(..., plan=...) again"
        )
    if target.exists() and not (target.is_dir() and {f.name for f in target.iterdir()} <= set(_FILES)):
        raise ExportError(f"{target} exists and is no saved hybrid: choose another folder, or remove it first")
    blocks = [block.module for block in hybrid.blocks]
    settings = {
        "schema": _SCHEMA,
        "model": hybrid.plan.model,
        "training": hybrid.training,
        "energy": "hopfield",
        "feedback": blocks[0].feedback if blocks else 0.1,
        "gradient": _named(blocks[0].estimator, _ESTIMATORS) if blocks else None,
        "solver": _named(blocks[0].solver, _SOLVERS) if blocks and blocks[0].solver else None,
        "conversion": asdict(conversion),
    }
    temporary: Path | None = None
    try:
        text = json.dumps(settings, indent=1)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        (temporary / "hybrid.json").write_text(text + "\n", encoding="utf-8")
        hybrid.plan.to_json(temporary / "plan.json")
        save_file(_unique(hybrid.state_dict()), temporary / "weights.safetensors")
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
    except TypeError as error:
        raise ExportError(
            f"an example input cannot be written as JSON ({error}): pass tensors, numbers or texts"
        ) from error
    except OSError as error:
        raise ExportError(f"the hybrid cannot be saved to {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)


def load(path: str | Path, model: nn.Module) -> HybridModel:
    """Read a hybrid that `save` wrote, for a model of the same class and sizes.

    Args:
        path: the folder.
        model: the source, with any weights; never changed.

    Raises:
        InputError: where a file is missing or malformed.
        PlanError: where the model is another than the saved one.
    """
    from ffebm_compiler.convert import convert

    folder = Path(path)
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder} is no saved hybrid: {', '.join(missing)} is missing; write one with hybrid.save()")
    try:
        settings = json.loads((folder / "hybrid.json").read_text(encoding="utf-8"))
        if settings["schema"] != _SCHEMA:
            raise InputError(f"{folder} has schema {settings['schema']}, this version reads {_SCHEMA}: save it again")
        stored = settings["conversion"]
        conversion = Conversion(stored["structure"], tuple(stored["leaves"]), stored["dynamic_shapes"])
        args, kwargs = conversion.examples()
        gradient = _made(settings["gradient"], _ESTIMATORS) if settings["gradient"] else EquilibriumPropagation()
        solver = _made(settings["solver"], _SOLVERS) if settings["solver"] else None
        state = load_file(folder / "weights.safetensors")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder} is malformed ({type(error).__name__}: {error}): save the hybrid again") from error
    assert isinstance(gradient, Estimator)
    assert solver is None or isinstance(solver, Solver)
    plan = Plan.from_json(folder / "plan.json")
    first = next(model.parameters(), None)
    if first is not None and first.is_floating_point():
        args, kwargs = pytree.tree_map(
            lambda leaf: leaf.to(first.device) if isinstance(leaf, Tensor) else leaf, (args, kwargs)
        )
    hybrid = convert(
        model,
        args,
        kwargs,
        hardware=plan.hardware,
        feedback=settings["feedback"],
        gradient=gradient,
        solver=solver,
        dynamic_shapes=conversion.dynamic_shapes,
        plan=plan,
    )
    aliases = {id(tensor): name for name, tensor in reversed(hybrid.state_dict(keep_vars=True).items())}
    full = {
        name: state[aliases[id(tensor)]] if aliases[id(tensor)] in state else state[name]
        for name, tensor in hybrid.state_dict(keep_vars=True).items()
        if aliases[id(tensor)] in state or name in state
    }
    try:
        hybrid.load_state_dict(full)
    except RuntimeError as error:
        raise InputError(f"the saved weights do not fit the model: {error}") from error
    hybrid.train(settings["training"])
    return hybrid


def _unique(state: dict[str, Any]) -> dict[str, Tensor]:
    """Each tensor once, under its first name: safetensors refuses shared memory."""
    seen: set[tuple[int, torch.Size]] = set()
    kept = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        kept[name] = tensor.detach().contiguous().clone()
    return kept


def _named(value: object, kinds: dict[str, Any]) -> dict[str, Any]:
    name = type(value).__name__
    if name not in kinds:
        raise ExportError(f"a {name} of your own cannot be stored: set one of {', '.join(kinds)} before saving")
    return {"kind": name, **asdict(value)}  # type: ignore[call-overload]


def _made(stored: dict[str, Any], kinds: dict[str, Any]) -> object:
    fields = dict(stored)
    return kinds[fields.pop("kind")](**fields)
