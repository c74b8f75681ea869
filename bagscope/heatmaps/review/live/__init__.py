"""The review page served live from the original slides, to be looked at and not to be changed."""
