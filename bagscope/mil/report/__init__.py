"""What a person reads of a study: figures, first lines, a page that stands alone."""
