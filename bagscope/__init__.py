"""From whole-slide images to slide-level answers, and back to the tissue."""

__version__ = "0.1.0"
