"""VisA in miniature, in both of its layouts."""

from pathlib import Path

import numpy as np
from generated import save, textured

HEADER = "object,split,label,image,mask"


def make_visa(original: Path, one_class: Path, categories: tuple[str, ...] = ("pcb1",)) -> None:
    """Three normal training images, two normal and two anomalous test images for each category.

    Args:
        original: gets the layout as downloaded, with the split file's rows in reverse.
        one_class: gets the layout that the dataset's own script makes of it.
        categories: their names.
    """
    rows = []
    for category in categories:
        for number, (split, label) in enumerate(
            [("train", "normal")] * 3 + [("test", "normal")] * 2 + [("test", "anomaly")] * 2
        ):
            folder, name = ("Normal" if label == "normal" else "Anomaly"), f"{number:04d}.JPG"
            ours = "good" if label == "normal" else "bad"
            image = textured(number, spot=label == "anomaly")
            save(original / category / "Data" / "Images" / folder / name, image)
            save(one_class / category / split / ours / name, image)
            mask = ""
            if label == "anomaly":
                mask = f"{category}/Data/Masks/Anomaly/{number:04d}.png"
                pixels = np.zeros((96, 96), np.uint8)
                pixels[:9, :9] = 1 + number  # a class number
                save(original / mask, pixels)
                truth = one_class / category / "ground_truth" / "bad" / f"{number:04d}.png"
                save(truth, 255 * (pixels > 0).astype(np.uint8))
            rows.append(f"{category},{split},{label},{category}/Data/Images/{folder}/{name},{mask}")
    (original / "split_csv").mkdir()
    (original / "split_csv" / "1cls.csv").write_text("\n".join([HEADER, *reversed(rows)]) + "\n")
