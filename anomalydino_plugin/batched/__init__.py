"""Batched zero-shot AnomalyDINO: the test set is its own reference."""
