"""Gradient estimators: from the error at a block's outputs to gradients of weights and inputs."""
