"""Draws docs/architecture.svg from the project's real imports.

    python docs/architecture_picture.py [--check]

A row is a floor, a box a file or folder of the package, a line an import, from the box above to the one below (those of
`errors` are left out: nearly every file has one). The floors are the table that `tests/test_architecture.py` holds the
imports to. `--check` writes nothing and exits with 1 where the picture is not that of the present imports.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

__all__ = ["FLOORS", "MODULES", "floor_of", "imports", "picture", "room"]

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
FOLDERS = {"ffebm_compiler": "ffebm_compiler", "passes": "ffebm_compiler.passes", "runtime": "ffebm_compiler.runtime"}

FLOORS: dict[str, str] = {
    "ground": "errors deprecation plain_numbers module_paths garbage inference cuda_capture",
    "files": "files",
    "data": "hardware ir driven plan_data",
    "runtime": "runtime",
    "passes": "passes",
    "calls": "pipeline static_values plan_file signature call_arguments source_view written_state stored_containers "
    "example_inputs conversion",
    "hybrid": "feedback_weights sharded block_operands weight_origins later_hooks later_modules conductances "
    "hybrid_parts bound_block digital_bits device_state hybrid_state gradient_choice kept_gradients recast "
    "failed_calls own_outputs hybrid_core",
    "reports": "reports field_penalties saved_settings storage",
    "pictures and ONNX": "drawing onnx circuit_elements circuit_power spice ngspice_runs ngspice",
    "what people hold": "plan hybrid",
    "what people call": "convert accuracy graphed_gains graphed_step init loading",
    "the package": "ffebm_compiler",
    "commands": "cli demo __main__",
}
"""From the ground up. A file imports from its own floor and from those below; a folder is named as a whole."""

_WIDTH, _LEFT, _ROW, _BOX, _GAP = 1180, 150, 30, 22, 26


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()
"""Every module of the project and its file."""


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports: at its top, inside functions and for its types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "ffebm_compiler"}


def room(name: str) -> str:
    """The file or folder below the package that a module is, or is in."""
    return [*name.split("."), "ffebm_compiler"][1]


def floor_of() -> dict[str, str]:
    """Room -> floor."""
    return {name: floor for floor, rooms in FLOORS.items() for name in rooms.split()}


@dataclass(frozen=True)
class _Box:
    name: str
    x: float
    y: float
    width: float


def _boxes() -> Iterator[_Box]:
    y = 16.0
    for rooms in reversed(FLOORS.values()):
        x = float(_LEFT)
        for name in rooms.split():
            width = 7.5 * len(_label(name)) + 16
            if x + width > _WIDTH - 16:
                x, y = float(_LEFT), y + _ROW
            yield _Box(name, x, y, width)
            x += width + 10
        y += _ROW + _GAP


def _label(name: str) -> str:
    if name == "ffebm_compiler":
        return "__init__"
    return f"{name}/" if sum(room(module) == name for module in MODULES) > 1 else name


def picture() -> str:
    """The SVG."""
    boxes = {box.name: box for box in _boxes()}
    floors = floor_of()
    edges = sorted({(room(name), room(other)) for name, path in MODULES.items() for other in imports(path)})
    height = int(max(box.y for box in boxes.values()) + _BOX + 20)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" '
        'font-size="12" role="img">',
        "<title>Who imports whom: from the commands down to the ground</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for floor in FLOORS:
        own = [box for box in boxes.values() if floors[box.name] == floor]
        top, bottom = min(box.y for box in own) - 7, max(box.y for box in own) + _BOX + 7
        lines.append(f'<rect x="8" y="{top:g}" width="{_WIDTH - 16}" height="{bottom - top:g}" rx="6" fill="#f2f5f9"/>')
        lines.append(f'<text x="18" y="{own[0].y + 15:g}" fill="#456">{escape(floor)}</text>')
    for above, below in edges:
        a, b = boxes[above], boxes[below]
        if a is b or below == "errors":
            continue
        x1, y1, x2, y2 = a.x + a.width / 2, a.y + _BOX, b.x + b.width / 2, b.y
        if floors[above] == floors[below]:
            y1, y2 = a.y, b.y
            bend = min(y1, y2) - 12
            lines.append(f'<path d="M{x1:g} {y1:g} C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2:g}" class="i"/>')
        else:
            middle = (y1 + y2) / 2
            lines.append(f'<path d="M{x1:g} {y1:g} C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" class="i"/>')
    lines.insert(2, "<style>.i{fill:none;stroke:#37c;stroke-opacity:.22}.b{fill:#fff;stroke:#89a}</style>")
    for box in boxes.values():
        lines.append(f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{_BOX}" rx="4" class="b"/>')
        lines.append(f'<text x="{box.x + 8:g}" y="{box.y + 15:g}" fill="#123">{escape(_label(box.name))}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main() -> int:
    """Run the command line."""
    text = picture()
    if "--check" in sys.argv[1:]:
        current = PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == text
        if not current:
            sys.stderr.write("docs/architecture.svg is not that of the present imports: make architecture\n")
        return int(not current)
    PICTURE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
