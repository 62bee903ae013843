"""AnomalyDINO (arXiv 2405.14529): training-free anomaly detection with DINOv2 patch features.

Everything public is listed here and loaded on first use, so that importing the package costs nothing:

    >>> from anomalydino_plugin import FewShotModel, load_backbone
    >>> model = FewShotModel(load_backbone()).fit(["good.png"])
    >>> model.score("part.png").score

In anomalib: ``from anomalydino_plugin import AnomalyDINOFewShot``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from anomalydino_plugin.errors import (
    AnomalyDINOError,
    BankError,
    ConfigError,
    ImageError,
    InputError,
    ResourceError,
    WeightsError,
)

if TYPE_CHECKING:
    from anomalydino_plugin.backbone import Backbone, embed_dim_of, load_backbone, patch_size_of
    from anomalydino_plugin.bank_editing import (
        BankEstimate,
        drop_images,
        estimate_bank,
        merge_banks,
        subsample_randomly,
    )
    from anomalydino_plugin.batched.lightning_model import AnomalyDINOBatched
    from anomalydino_plugin.batched.torch_model import BatchedModel
    from anomalydino_plugin.batched.whole_set import match_set
    from anomalydino_plugin.calibration import normalise_score, threshold_from_normals
    from anomalydino_plugin.coreset import subsample_coreset
    from anomalydino_plugin.decoding import read_image, read_mask
    from anomalydino_plugin.detection import Detection, detect
    from anomalydino_plugin.engines.choice import engine_for, reduced_precision
    from anomalydino_plugin.few_shot.calibrate import Calibration, calibrate
    from anomalydino_plugin.few_shot.explain import PatchMatch, explain_picture, matched_patches, save_explanation
    from anomalydino_plugin.few_shot.lightning_model import AnomalyDINOFewShot
    from anomalydino_plugin.few_shot.search import search_bank
    from anomalydino_plugin.few_shot.torch_model import FewShotModel, masking_decision_of
    from anomalydino_plugin.image_tensors import prepare_image
    from anomalydino_plugin.kernels.rows import SearchRows, block_rows, kernel_for, search_rows
    from anomalydino_plugin.masking import (
        MaskingDecision,
        first_principal_component,
        foreground_and_test,
        foreground_mask,
        foreground_or_all,
        masking_test,
        patch_foreground,
        vote_on_masks,
    )
    from anomalydino_plugin.matching import Match, nearest
    from anomalydino_plugin.memory_bank import MemoryBank, PatchSource, check_fingerprint
    from anomalydino_plugin.metrics.image import ErrorRate, ImageMetrics, error_rate, image_metrics
    from anomalydino_plugin.metrics.pixel import AnomalousLevels, PixelCounts, PixelMetrics, anomaly_map_metrics
    from anomalydino_plugin.mutual import MutualMatch, RunningLowest, lowest_count
    from anomalydino_plugin.patch_model import PatchModel, feature_fingerprint, refuse_unusable
    from anomalydino_plugin.preprocessing import (
        Geometry,
        plan_geometry,
        prepare_pixels,
        rotate_image,
    )
    from anomalydino_plugin.registration import register
    from anomalydino_plugin.scoring import anomaly_map, image_score
    from anomalydino_plugin.weights import WeightsFile, load_weights, resolve_weights

__version__ = "0.1.0"

_HOMES = {
    "AnomalousLevels": "metrics.pixel",
    "AnomalyDINOBatched": "batched.lightning_model",
    "AnomalyDINOFewShot": "few_shot.lightning_model",
    "Backbone": "backbone",
    "BankEstimate": "bank_editing",
    "BatchedModel": "batched.torch_model",
    "Calibration": "few_shot.calibrate",
    "Detection": "detection",
    "ErrorRate": "metrics.image",
    "FewShotModel": "few_shot.torch_model",
    "Geometry": "preprocessing",
    "ImageMetrics": "metrics.image",
    "MaskingDecision": "masking",
    "Match": "matching",
    "MemoryBank": "memory_bank",
    "MutualMatch": "mutual",
    "PatchMatch": "few_shot.explain",
    "PatchModel": "patch_model",
    "PatchSource": "memory_bank",
    "PixelCounts": "metrics.pixel",
    "PixelMetrics": "metrics.pixel",
    "RunningLowest": "mutual",
    "SearchRows": "kernels.rows",
    "WeightsFile": "weights",
    "anomaly_map": "scoring",
    "anomaly_map_metrics": "metrics.pixel",
    "block_rows": "kernels.rows",
    "calibrate": "few_shot.calibrate",
    "check_fingerprint": "memory_bank",
    "detect": "detection",
    "drop_images": "bank_editing",
    "embed_dim_of": "backbone",
    "engine_for": "engines.choice",
    "error_rate": "metrics.image",
    "estimate_bank": "bank_editing",
    "explain_picture": "few_shot.explain",
    "feature_fingerprint": "patch_model",
    "first_principal_component": "masking",
    "foreground_and_test": "masking",
    "foreground_mask": "masking",
    "foreground_or_all": "masking",
    "image_metrics": "metrics.image",
    "image_score": "scoring",
    "kernel_for": "kernels.rows",
    "load_backbone": "backbone",
    "load_weights": "weights",
    "lowest_count": "mutual",
    "masking_decision_of": "few_shot.torch_model",
    "masking_test": "masking",
    "match_set": "batched.whole_set",
    "matched_patches": "few_shot.explain",
    "merge_banks": "bank_editing",
    "nearest": "matching",
    "normalise_score": "calibration",
    "patch_foreground": "masking",
    "patch_size_of": "backbone",
    "plan_geometry": "preprocessing",
    "prepare_image": "image_tensors",
    "prepare_pixels": "preprocessing",
    "read_image": "decoding",
    "read_mask": "decoding",
    "reduced_precision": "engines.choice",
    "refuse_unusable": "patch_model",
    "register": "registration",
    "resolve_weights": "weights",
    "rotate_image": "preprocessing",
    "save_explanation": "few_shot.explain",
    "search_bank": "few_shot.search",
    "search_rows": "kernels.rows",
    "subsample_coreset": "coreset",
    "subsample_randomly": "bank_editing",
    "threshold_from_normals": "calibration",
    "vote_on_masks": "masking",
}

__all__ = [
    "AnomalousLevels",
    "AnomalyDINOBatched",
    "AnomalyDINOError",
    "AnomalyDINOFewShot",
    "Backbone",
    "BankError",
    "BankEstimate",
    "BatchedModel",
    "Calibration",
    "ConfigError",
    "Detection",
    "ErrorRate",
    "FewShotModel",
    "Geometry",
    "ImageError",
    "ImageMetrics",
    "InputError",
    "MaskingDecision",
    "Match",
    "MemoryBank",
    "MutualMatch",
    "PatchMatch",
    "PatchModel",
    "PatchSource",
    "PixelCounts",
    "PixelMetrics",
    "ResourceError",
    "RunningLowest",
    "SearchRows",
    "WeightsError",
    "WeightsFile",
    "anomaly_map",
    "anomaly_map_metrics",
    "block_rows",
    "calibrate",
    "check_fingerprint",
    "detect",
    "drop_images",
    "embed_dim_of",
    "engine_for",
    "error_rate",
    "estimate_bank",
    "explain_picture",
    "feature_fingerprint",
    "first_principal_component",
    "foreground_and_test",
    "foreground_mask",
    "foreground_or_all",
    "image_metrics",
    "image_score",
    "kernel_for",
    "load_backbone",
    "load_weights",
    "lowest_count",
    "masking_decision_of",
    "masking_test",
    "match_set",
    "matched_patches",
    "merge_banks",
    "nearest",
    "normalise_score",
    "patch_foreground",
    "patch_size_of",
    "plan_geometry",
    "prepare_image",
    "prepare_pixels",
    "read_image",
    "read_mask",
    "reduced_precision",
    "refuse_unusable",
    "register",
    "resolve_weights",
    "rotate_image",
    "save_explanation",
    "search_bank",
    "search_rows",
    "subsample_coreset",
    "subsample_randomly",
    "threshold_from_normals",
    "vote_on_masks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # the second access is a plain attribute
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
