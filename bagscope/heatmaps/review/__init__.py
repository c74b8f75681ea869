"""The review page: a run, slide by slide, for a pathologist to look at."""
