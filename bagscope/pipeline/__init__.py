"""One function per verb, and the study folder."""
