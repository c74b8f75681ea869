"""Continual learning: tasks one after the other, with one body for all of them."""
