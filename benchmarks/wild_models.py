"""The cases of `wild.py`: `CASES` maps `family:name` to a function that returns (model, args, kwargs)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from wild_diffusers import DIFFUSERS
from wild_families import TIMM, TORCHVISION, TRANSFORMERS
from wild_pictures import MONAI, SEGMENTATION
from wild_vit import VIT
from wild_x_transformers import X_TRANSFORMERS
from zoo_models import Case, load_torchvision

__all__ = ["CASES", "Case", "load"]

FAMILIES: dict[str, tuple[str, dict[str, Callable[[], Case]]]] = {
    # family: (what to import, its cases)
    "vit": ("vit_pytorch", VIT),
    "x_transformers": ("x_transformers", X_TRANSFORMERS),
    "diffusers": ("diffusers.models.transformers diffusers.models.unets diffusers.models.autoencoders", DIFFUSERS),
    "monai": ("monai.networks.nets", MONAI),
    "segmentation": ("segmentation_models_pytorch", SEGMENTATION),
    "timm": ("timm", TIMM),
    "torchvision": ("torchvision", TORCHVISION),
    "transformers": ("transformers", TRANSFORMERS),
}

CASES: dict[str, Callable[[], Case]] = {
    f"{family}:{name}": build for family, (_, cases) in FAMILIES.items() for name, build in cases.items()
}


def load(name: str) -> None:
    """Import the package of a case, so that the processes forked from this one need not."""
    load_torchvision()
    for package in FAMILIES[name.split(":")[0]][0].split():
        import_module(package)
