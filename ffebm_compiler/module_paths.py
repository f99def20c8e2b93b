"""Find modules by their paths, even if a module has the name of a method (`type`, `train`)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["module_at", "state_of_module"]


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


def state_of_module(module: nn.Module, without: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a module's parameters and persistent buffers, but for those of one child."""
    for path, part in module.named_modules(remove_duplicate=False):
        if path.split(".")[0] == without:
            continue
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            if value is not None and name not in part._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), value
