"""Record the structure and shapes of the example inputs that a hybrid was converted with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from ffebm_compiler.example_inputs import described
from ffebm_compiler.passes.containers import PLAIN, Form, Recipe

__all__ = ["Conversion"]


@dataclass(frozen=True)
class Conversion:
    """The arguments of `convert` that a plan does not hold."""

    structure: str
    """The pytree of (args, kwargs), as JSON."""
    leaves: tuple[dict[str, Any], ...]
    """For each leaf of the example inputs: shape and dtype of a tensor, the value of anything else."""
    dynamic_shapes: str | None
    """`"batch"`, None, or `"custom"` for an argument that cannot be stored."""
    containers: Recipe = PLAIN
    """How to build input containers whose classes are the user's."""

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Conversion:
        """The record of a call."""
        leaves, form = Form.of((args, kwargs))
        kept = dynamic_shapes if dynamic_shapes in ("batch", None) else "custom"
        return cls(pytree.treespec_dumps(form.spec), tuple(map(described, leaves)), kept, form.recipe)

    def examples(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Example inputs of the same shapes: zeros."""
        leaves = [
            torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"]), device="cpu")
            if "shape" in leaf
            else leaf["value"]
            for leaf in self.leaves
        ]
        args, kwargs = Form(pytree.treespec_loads(self.structure), self.containers).build(leaves)
        return args, kwargs
