"""Find modules by their paths, even if a module has the name of a method (`type`, `train`)."""

from __future__ import annotations

from torch import nn

__all__ = ["module_at"]


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path of `root.named_modules()`.

    Raises:
        AttributeError: where there is none.
    """
    module = root
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"the model has no module {path!r}")
        module = child
    return module
