"""Batched zero-shot where one defect repeats: the score of a defective image and the AUROC when it is there n times.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/repeated_defects.py [--copies 1 2 5 10] [--defects 5]

bottle and screw of MVTec AD, 448 pixels, S/14, masks for screw, none for bottle. Copies are of the same file: the worst
case, as real defects of one kind only resemble each other. A set with copies is scored exactly, from the lowest distances
of the set without them and those to the copies. For each defective image chosen (evenly over the sorted ones): its rank
among all images and its score over the median of the normal ones, and the AUROC of the whole set with all its copies.
"""

import argparse
import sys

import numpy as np
import torch
from contest import ASSETS, WEIGHTS, circumstances
from sklearn.metrics import roc_auc_score

from anomalydino_plugin import BatchedModel, RunningLowest, image_score, load_backbone, lowest_count, search_rows

BLOCK = 16  # images
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


def lowest_of_all(features: list[torch.Tensor], count: int) -> list[torch.Tensor]:
    """(P, count) highest similarities of each image's patches to those of all others, descending."""
    lengths = [len(rows) for rows in features]
    running = [RunningLowest(rows, count) for rows in features]
    for start in range(0, len(features), BLOCK):
        own = list(range(start, min(start + BLOCK, len(features))))
        block = search_rows(torch.cat([features[index] for index in own]), [lengths[index] for index in own])
        for index, lowest in enumerate(running):
            place = own.index(index) if index in own else None
            lowest.update(block, [lengths[i] for i in own], sum(lengths[:start]), place)
    return [lowest._highest.sort(dim=1, descending=True).values for lowest in running]


def score(highest: torch.Tensor, count: int, foreground: torch.Tensor) -> float:
    distances = (1.0 - highest.double()[:, :count]).clamp(0.0, 2.0).mean(dim=1).float()
    return float(image_score(distances * foreground))


def with_copies(
    features: list[torch.Tensor], base: list[torch.Tensor], foreground: list[torch.Tensor], defect: int, extra: int
) -> np.ndarray:
    """Scores of all images where one is there ``extra`` times more; exact: the lowest of a set and of the copies."""
    patches = sum(map(len, features)) + extra * len(features[defect])
    found = np.empty(len(features))
    for index, others in enumerate(base):
        highest = others
        count = lowest_count("official", len(features) - 1 + extra, patches - len(features[index]))
        if extra:
            similar = features[index] @ features[defect].T
            top = similar.topk(min(count, similar.shape[1]), dim=1).values.repeat(1, extra)
            highest = torch.cat([highest, top], dim=1).sort(dim=1, descending=True).values
        found[index] = score(highest, count, foreground[index])
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
        most = (len(features) + max(options.copies)) * max(map(len, features))
        base = lowest_of_all(features, lowest_count("official", len(features), most))
        normal = float(np.median(with_copies(features, base, foreground, 0, 0)[~defect]))
        bad = np.flatnonzero(defect)
        chosen = bad[np.linspace(0, len(bad) - 1, options.defects).astype(int)]
        for copies in options.copies:
            ratios, ranks, aurocs = [], [], []
            for index in chosen:
                extra = copies - 1
                found = with_copies(features, base, foreground, int(index), extra)
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
