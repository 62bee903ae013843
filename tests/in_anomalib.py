"""anomalib's folders and engine as the tests of its Engine set them up."""

from pathlib import Path

from anomalib.data import Folder
from anomalib.engine import Engine

DATA = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/spot"}


def folder(root: Path, **options) -> Folder:
    """One category of the fixture ``mvtec_tree``."""
    defaults = {"mask_dir": "ground_truth/spot", "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder(name="part", root=root, **DATA, **{**defaults, **options})


def engine(tmp_path: Path, **options) -> Engine:
    defaults = {"logger": False, "accelerator": "cpu", "enable_progress_bar": False}
    return Engine(default_root_dir=tmp_path, **{**defaults, **options})
