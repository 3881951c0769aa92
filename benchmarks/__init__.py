"""Measurements that anyone can repeat: ``python -m benchmarks.ops``, ``python -m benchmarks.resources``."""
