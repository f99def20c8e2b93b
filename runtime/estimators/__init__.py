"""Gradient estimators turn the error at a block's outputs into gradients of weights and inputs."""
