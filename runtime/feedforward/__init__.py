"""Feedforward blocks and the operations in them that are our own."""
