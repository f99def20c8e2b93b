"""EP from scratch on scikit-learn's digits with states driven by a digital value, beside backprop of the source.

    python benchmarks/digital_drive.py [--seeds 3] [--epochs 5] [--out benchmarks/results/digital_drive.json]

Twice [convolution, batch norm, clamp(0, 1), convolution, clamp(0, 1), average pool], then a linear layer: a plain
module. With `digital_drive=True` the first clamp, whose drive is batch norm's result, settles with the second
convolution and its clamp, as in the networks of Nest & Ernoult (2024, arXiv 2409.03306). Convolutions start as matrices
of the Gaussian orthogonal ensemble, with the published variance 8.4e-5 at 512 input channels and as much more as there
are fewer. Everything else is as in `from_scratch.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from from_scratch import Clamp, main

import ffebm_compiler as ffebm


def network(width: int = 32) -> nn.Sequential:
    """Two blocks and a head."""
    layers: list[nn.Module] = []
    inner = 1
    for outer in (width, 2 * width):
        first, second = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, outer, 3, padding=1)
        for conv in (first, second):
            ffebm.init.goe_(conv.weight, 8.4e-5 * 512 / conv.in_channels)
        layers += [first, nn.BatchNorm2d(outer), Clamp(), second, Clamp(), nn.AvgPool2d(2)]
        inner = outer
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * inner, 10))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", network, digital_drive=True))
