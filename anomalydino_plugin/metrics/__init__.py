"""How good scores and anomaly maps are, where the truth is known; definitions in ``docs/evaluation.md``."""
