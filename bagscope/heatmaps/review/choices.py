"""What can be asked of a review; imports nothing, so that a command's help is there at once."""

from __future__ import annotations

MAX_PX = 8192
"""The longer edge of a slide's picture, at most."""
QUALITY = 85
"""Of JPEG."""
GALLERY_TILES = 8
"""From either end of a layer."""
THUMB_PX = 160
"""The width of a thumbnail, at most."""

VERDICTS = {
    "agree": "the model is right",
    "disagree": "the model is wrong",
    "unsure": "can't tell",
    "not assessable": "the slide is not fit to judge",
}
"""What a reviewer can say of a slide; an empty word takes an earlier verdict back."""
CSV_COLUMNS = ("slide", "verdict", "comment", "reviewer", "run")
"""Of the table of verdicts that the page exports."""
