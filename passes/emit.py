"""Emit: add a new node with the module path and source line of another, and with shapes of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["emit_like", "on_fakes"]


@contextmanager
def on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Operations inside run on fake tensors, whose sizes may be free, as `torch.export` runs them.

    It too takes Python's dispatcher for free sizes. Without it torch before 2.9 calls C++ kernels that know none.
    """
    with mode, enable_python_dispatcher():
        yield


def emit_like(
    graph: fx.Graph,
    like: fx.Node,
    target: Callable[..., object],
    *args: object,
    keywords: Mapping[str, object] | None = None,
) -> fx.Node:
    """A call of `target` where the graph inserts at present, as if the module of `like` had made it."""
    keywords = dict(keywords or {})
    fresh = graph.call_function(target, args, keywords)  # type: ignore[arg-type]
    for key in ("nn_module_stack", "stack_trace"):
        if key in like.meta:
            fresh.meta[key] = like.meta[key]
    values: tuple[object, ...] = fx.map_arg(args, lambda node: node.meta["val"])  # type: ignore[type-var]
    with on_fakes(fresh.all_input_nodes[0].meta["val"].fake_mode):
        fresh.meta["val"] = target(*values, **keywords)
    return fresh
