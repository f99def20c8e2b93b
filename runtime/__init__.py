"""The runtime of converted networks: energies, equilibria and their gradients."""
