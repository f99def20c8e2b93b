"""Feedforward blocks, and the operations in them that torch does not have."""
