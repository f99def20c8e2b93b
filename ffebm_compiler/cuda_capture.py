"""Capture a CUDA graph, and leave the process usable where that fails.

torch 2.11 leaves three things behind where a capture ends with an error: the current stream is still the one that
captured, memory is still taken from the graph's pool, and the generator of random numbers still believes in the
capture, so that the next draw on the GPU raises "Offset increment outside graph capture". A small capture that
succeeds afterwards puts the generator right.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """What runs inside becomes `graph`. An error passes on, and what the failed capture left behind is undone."""
    before = torch.cuda.current_stream(stream.device)
    try:
        with torch.cuda.graph(graph, stream=stream):
            yield
    except BaseException as error:
        _undo(graph, stream, before)
        _let_go(error)
        raise


def _undo(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
    torch.cuda.set_stream(before)
    with contextlib.suppress(RuntimeError, AttributeError):  # where torch had taken the pool back itself
        torch._C._cuda_endAllocateToPool(stream.device.index, graph.pool())
    with torch.cuda.device(stream.device):
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=stream.device)


def _let_go(error: BaseException | None) -> None:
    """Clear the variables of the frames that an error and its causes hold."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
