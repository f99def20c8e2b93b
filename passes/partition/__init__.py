"""Partition: decide which operation is in which energy block."""
