"""Phases: the fixed-point problems of an energy block."""
