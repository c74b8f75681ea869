"""Heatmaps: what a model says of each tile, as pictures and as files that viewers open."""
