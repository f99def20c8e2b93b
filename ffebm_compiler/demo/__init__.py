"""The demo: the whole idea end to end on real data."""
