"""Fused operations on long bags of very different length, packed end to end."""
