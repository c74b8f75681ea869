"""Objectives: from logits and labels to the loss, and from logits to what is reported.

One file per task, each a `Criterion`; `objective` lays several targets side by side and adds the
terms that an aggregator brings.
"""
