"""Batched zero-shot where one defect repeats: the score of a defective image and the AUROC when it is there n times.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/repeated_defects.py [--copies 1 2 5 10] [--defects 5]

bottle and screw of MVTec AD, 448 pixels, S/14, masks for screw, none for bottle. Copies are of the same file: the worst
case, as real defects of one kind only resemble each other. Features are computed once; a set with copies is scored by
`RunningLowest`, as the job does it. For each defective image chosen (evenly over the sorted ones): its rank among all
images and its score over the median of the normal ones, and the AUROC of the whole set with all its copies.
"""

import argparse
import sys

import numpy as np
import torch
from contest import ASSETS, WEIGHTS, circumstances
from sklearn.metrics import roc_auc_score

from anomalydino_plugin import BatchedModel, RunningLowest, image_score, load_backbone, lowest_count, search_rows

MASKING = {"bottle": "off", "screw": "on"}


def features_of(category: str) -> tuple[list[torch.Tensor], list[torch.Tensor], np.ndarray]:
    """(P, D) normalised features, (P,) foreground, and which images are defective."""
    files = sorted((ASSETS / "data" / "mvtec" / category / "test").rglob("*.png"))
    model = BatchedModel(load_backbone("dinov2_vits14", WEIGHTS), masking=MASKING[category])
    from anomalydino_plugin import read_image

    model.collect((str(path), read_image(path)) for path in files)
    features = [model.store.features(index) for index in range(len(files))]
    foreground = [torch.from_numpy(image.foreground.reshape(-1)) for image in model.store.images]
    return features, foreground, np.array([path.parent.name != "good" for path in files])


def scores(features: list[torch.Tensor], foreground: list[torch.Tensor], wanted: list[int]) -> np.ndarray:
    """Scores of some images against all others."""
    lengths = [len(rows) for rows in features]
    found = np.empty(len(wanted))
    running = [
        RunningLowest(
            features[index], lowest_count("official", len(features) - 1, sum(lengths) - lengths[index]), "official"
        )
        for index in wanted
    ]
    step = 16
    for start in range(0, len(features), step):
        own = list(range(start, min(start + step, len(features))))
        block = search_rows(torch.cat([features[index] for index in own]), [lengths[index] for index in own])
        for index, lowest in zip(wanted, running, strict=True):
            place = own.index(index) if index in own else None
            lowest.update(block, [lengths[i] for i in own], sum(lengths[:start]), place)
    for place, (index, lowest) in enumerate(zip(wanted, running, strict=True)):
        found[place] = float(image_score(lowest.result().distances * foreground[index]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--copies", nargs="+", type=int, default=[1, 2, 5, 10])
    parser.add_argument("--defects", type=int, default=5)
    parser.add_argument("--categories", nargs="+", default=list(MASKING), choices=list(MASKING))
    options = parser.parse_args()
    print(circumstances())
    print("\n| category | same image, times | its score / median normal | its rank of all images | AUROC |")
    print("| --- | --- | --- | --- | --- |")
    for category in options.categories:
        features, foreground, defect = features_of(category)
        base = scores(features, foreground, list(range(len(features))))
        normal = float(np.median(base[~defect]))
        bad = np.flatnonzero(defect)
        chosen = bad[np.linspace(0, len(bad) - 1, options.defects).astype(int)]
        for copies in options.copies:
            ratios, ranks, aurocs = [], [], []
            for index in chosen:
                extra = copies - 1
                more, shown = features + [features[index]] * extra, foreground + [foreground[index]] * extra
                found = scores(more, shown, list(range(len(features)))) if extra else base
                labels = np.concatenate([defect, np.ones(extra, bool)])
                everything = np.concatenate([found, np.full(extra, found[index])])
                ratios.append(found[index] / normal)
                ranks.append(1 + int((found > found[index]).sum()))
                aurocs.append(100 * roc_auc_score(labels, everything))
            print(
                f"| {category} | {copies} | {np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
                f"{np.mean(ranks):.0f} ({min(ranks)} to {max(ranks)}) of {len(features)} | "
                f"{np.mean(aurocs):.2f} ({min(aurocs):.2f} to {max(aurocs):.2f}) |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
