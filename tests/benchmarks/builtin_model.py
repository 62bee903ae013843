"""anomalib's built-in AnomalyDINO on our weights, one image at a time, for `speed_few_shot.py`."""

import tempfile
from collections.abc import Callable

from compare_builtin import build_builtin, build_datamodule
from contest import ASSETS


def few_shot(resolution: int, category: str) -> Callable[[int], float]:
    """Scores one test image a turn: its reader, its resize (squashed to a square), its torch module."""
    import torch
    from anomalib.data.utils import read_image
    from anomalib.engine import Engine

    torch.set_num_threads(2)
    model = build_builtin(category, resolution)
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, logger=False, accelerator="cpu", enable_progress_bar=False)
        engine.fit(model, datamodule=build_datamodule(category, 1, "built-in"))
    module = model.model.eval()
    tests = sorted((ASSETS / "data" / "mvtec" / category / "test").rglob("*.png"))

    @torch.inference_mode()
    def score(turn: int) -> float:
        image = read_image(tests[turn * 7 % len(tests)], as_tensor=True)
        return float(module(model.pre_processor.transform(image[None])).pred_score)

    return score
