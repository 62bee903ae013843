"""Opt-in registration with anomalib's ``get_model``."""

import anomalib.models

from anomalydino_plugin.batched.lightning_model import AnomalyDINOBatched
from anomalydino_plugin.few_shot.lightning_model import AnomalyDINOFewShot

_MODULE = "anomalydino_plugin"


def register() -> list[str]:
    """Let ``get_model`` find our models by name and by class path.

    Importing a model class registers its name with anomalib; a class path must also lie in a module that anomalib
    allows, and this adds ours.

    Returns:
        Names for ``get_model``.
    """
    anomalib.models.ALLOWED_MODULES.add(_MODULE)
    models = (AnomalyDINOFewShot, AnomalyDINOBatched)
    return [f"{_MODULE}.{model.__name__}" for model in models]
