"""Partition: which operation is in which energy block."""
