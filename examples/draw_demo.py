"""Draw the demo's network for README.md: how it is split with batch norm folded, and with batch norm kept.

    .venv/bin/python examples/draw_demo.py [FOLDER]

Writes demo-folded.svg and demo-kept.svg into FOLDER, by default docs/pictures.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import ffebm_compiler as ffebm
from ffebm_compiler.demo.models import DigitsCNN


def main(folder: Path) -> None:
    """Write both pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    model = DigitsCNN().eval()
    for name in ("folded", "kept"):
        hybrid = ffebm.convert(model, torch.zeros(2, 1, 8, 8), fold_batchnorm=name == "folded")
        hybrid.save_svg(folder / f"demo-{name}.svg")
        print(f"wrote {folder / f'demo-{name}.svg'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent / "docs" / "pictures")
