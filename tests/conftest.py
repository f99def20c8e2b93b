"""What holds for every test."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Let a test draw the same numbers whatever ran before it: each has a seed of its own, from its name."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
