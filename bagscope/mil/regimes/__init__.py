"""Regimes: what is done around an aggregator while it learns."""
