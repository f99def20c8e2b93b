"""Convert a small network, look at the partition, take one training step, check the gradients.

    .venv/bin/python examples/quickstart.py

The same lines as in README.md.
"""

import torch
from torch.nn.functional import cross_entropy

import ffebm_compiler as ffebm

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
x, y = torch.randn(32, 64), torch.randint(0, 10, (32,))

hybrid = ffebm.convert(model, x)  # an nn.Module: energy blocks and digital parts
print(hybrid.plan)
optimizer = torch.optim.Adam(hybrid.parameters())
cross_entropy(hybrid(x), y).backward()  # gradients by equilibrium propagation
optimizer.step()
print(ffebm.check_gradients(hybrid, x, lambda scores: cross_entropy(scores, y)))
