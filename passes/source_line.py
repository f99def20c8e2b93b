"""The line of the user's own code that ran a node."""

from __future__ import annotations

from torch import fx

__all__ = ["source_line"]


def source_line(node: fx.Node) -> str:
    """` (FILE, line N)` of the innermost line outside torch, from the captured stack; nothing where it is unknown."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    places = [line for line in lines if line.startswith('File "')]
    places = [line for line in places if not line.startswith('File "<')]
    own = [line for line in places if "site-packages/torch/" not in line] or places
    if not own:
        return ""
    file, number, *_ = own[-1].removeprefix('File "').split('", line ')
    return f" ({file}, line {number.split(',')[0]})"
