"""Aggregators: from the tiles of a bag to its logits. One file each, found by name."""
