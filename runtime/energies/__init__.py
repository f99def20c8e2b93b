"""Energies: what a block of analog layers minimises, each a value that answers all questions about it."""
