"""Energies, equilibria and their gradients: what a converted network runs on."""
