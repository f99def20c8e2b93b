"""Find the place in the user's own code that ran a node, or that is running now."""

from __future__ import annotations

import sys

from torch import fx

from ffebm_compiler.ir import module_path

__all__ = ["place_in_model", "running_line", "source_line"]


def source_line(node: fx.Node) -> str:
    """` (FILE, line N)` of the innermost line outside torch in the captured stack; an empty text if it is unknown."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    places = [line for line in lines if line.startswith('File "')]
    places = [line for line in places if not line.startswith('File "<')]
    own = [line for line in places if "site-packages/torch/" not in line] or places
    if not own:
        return ""
    file, number, *_ = own[-1].removeprefix('File "').split('", line ')
    return f" ({file}, line {number.split(',')[0]})"


def place_in_model(node: fx.Node) -> str:
    """The node's module, or the model's own forward, as the subject of a sentence."""
    path = module_path(node)
    return f"module {path!r}" if path else "the model's forward"


def running_line() -> str:
    """` (FILE, line N)` of the innermost line of the running code that is neither torch's nor this package's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        module = str(frame.f_globals.get("__name__", ""))
        own = module not in ("torch", "contextlib") and not module.startswith(("torch.", "ffebm_compiler."))
        if own and not file.startswith("<"):
            return f" ({file}, line {frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""
