"""The energy objective on public networks, beside the partition with the fewest conversions. All figures are modelled.

    python benchmarks/energy_objective.py [--networks resnet18 resnet50 vit_tiny_patch16_224] [--feedback 0.1]

For each network of timm (224 pixels, random weights), batch norm kept or folded, fabric, and inference or training
step: conversions and modelled energy of both partitions, and CPU seconds of `ffebm.plan` with the energy objective.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from measuring import add_out, keep
from zoo_models import load_torchvision

import ffebm_compiler as ffebm
from ffebm_compiler.passes.partition.block_costs import modelled_energy

NETWORKS = ("resnet18", "resnet50", "vit_tiny_patch16_224")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--fabrics", nargs="+", default=("crossbar-256", "pcm-64"))
    parser.add_argument("--feedback", type=float, default=0.1)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load_torchvision()
    import timm

    x = torch.randn(2, 3, 224, 224)
    rows: list[dict[str, Any]] = []
    print("| network | batch norm | fabric | of | fewest conversions | energy | least energy | energy | CPU s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in options.networks:
        model = timm.create_model(name, pretrained=False).eval()
        normed = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
        for fold in (False, True) if normed else (False,):
            for fabric in options.fabrics:
                few = ffebm.plan(model, x, hardware=fabric, fold_batchnorm=fold)
                for for_ in ("inference", "training"):
                    start = time.process_time()
                    least = ffebm.plan(
                        model,
                        x,
                        hardware=fabric,
                        fold_batchnorm=fold,
                        objective="energy",
                        for_=for_,
                        feedback=options.feedback,
                    )
                    seconds = time.process_time() - start
                    cells = [name, ("folded" if fold else "kept") if normed else "none", f"`{fabric}`", for_]
                    energies = [modelled_energy(p, for_ == "training", options.feedback) for p in (few, least)]
                    for plan, energy in zip((few, least), energies, strict=True):
                        cells += [str(plan.conversions), str(energy)]
                    print("|", " | ".join([*cells, f"{seconds:.1f}"]), "|", flush=True)
                    few_pj, least_pj = ([energy.low, energy.high] for energy in energies)
                    row = dict(zip(("network", "norm", "fabric", "of"), cells, strict=False))
                    rows.append({**row, "few": few_pj, "least": least_pj, "seconds": seconds})
                    keep(rows, options.out)


if __name__ == "__main__":
    main()
