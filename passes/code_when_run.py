"""Code when run: graphs that are rewritten and never run have no Python code made of them.

An fx graph module writes its forward as Python code, and compiles it, whenever its graph is set. The exporter and the
passes set a graph eight times, a fifteenth of the exporter's time, and run none of them.

Promise: a graph module that is run after all computes the same, since torch's own lazy ones make their code then.
"""

from __future__ import annotations

import contextlib
import importlib.util
from contextlib import AbstractContextManager

from torch import fx, nn

__all__ = ["code_when_run", "graph_module_without_code"]

_LAZY = "torch.fx._lazy_graph_module"
"""torch's module with lazy graph modules, which `torch.compile` uses."""


def code_when_run() -> AbstractContextManager[None]:
    """Let the exporter's graph modules make their code when they are run. A torch without lazy ones does so at once."""
    if importlib.util.find_spec(_LAZY) is None:
        return contextlib.nullcontext()
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    return _use_lazy_graph_module(True)


def graph_module_without_code(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module that makes its code when it is run."""
    if importlib.util.find_spec(_LAZY) is None:
        return fx.GraphModule(root, graph)
    from torch.fx._lazy_graph_module import _LazyGraphModule

    return _LazyGraphModule(root, graph)
