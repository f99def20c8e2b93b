"""The description of a chip, and the constants of its cost model."""
