"""Bags → trained models: aggregators, objectives, splits, training, evaluation, prediction."""
