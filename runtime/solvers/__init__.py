"""Solvers bring a phase to its fixed point."""
