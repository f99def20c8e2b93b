"""Activations: what an energy block can hold between its layers."""
