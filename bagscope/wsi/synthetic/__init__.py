"""Synthetic slides: see docs/architecture.md."""
