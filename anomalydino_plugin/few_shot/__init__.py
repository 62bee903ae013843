"""Few-shot AnomalyDINO: a memory bank of k normal images."""
