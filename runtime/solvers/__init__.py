"""Solvers: how a phase is brought to its fixed point."""
