"""What the method does not see, in figures: the tables of docs/limits.md and of drift in docs/deployment.md.

    ANOMALYDINO_ASSETS=../shared python tests/benchmarks/limits.py [--only drift]

- The same defect in several images of a batched zero-shot set: one bottle with a defect, copied as a camera would see
  it again (shifted by pixels, other noise and brightness), among 20 good bottles.
- Anomalies that no single patch shows: coins on a tray (scikit-image's ``coins``) missing, exchanged or turned, beside
  a scratch.
- Pictures that drift: 20 good bottles darker, brighter, blurred, noisier; threshold from held-out normal ones.
"""

import argparse
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from anomalydino_plugin import BatchedModel, FewShotModel, calibrate, load_backbone, read_image

ASSETS = Path(os.environ.get("ANOMALYDINO_ASSETS", "../shared"))
BOTTLE = ASSETS / "data" / "mvtec" / "bottle"
COPIES = (1, 2, 4, 8, 16)
RADIUS = 23  # pixels, of a coin


class Remembering:
    """A backbone's engine that encodes each picture once; the sets below share nearly all of theirs."""

    def __init__(self, model) -> None:
        self.encode, self.known = model.encode, {}

    def __call__(self, pixels):
        keys = [one.tobytes() for one in pixels]
        for key, one in zip(keys, pixels, strict=True):
            if key not in self.known:
                self.known[key] = self.encode([one])[0]
        return torch.stack([self.known[key] for key in keys])


def seen_again(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The same scene in a second shot: up to 3 pixels away, 1 % brighter or darker, with noise of 2 grey levels."""
    shift = np.float32([[1, 0, rng.integers(-3, 4)], [0, 1, rng.integers(-3, 4)]])
    moved = cv2.warpAffine(image, shift, image.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)
    return np.clip(moved * rng.uniform(0.99, 1.01) + rng.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def repeated_defect(backbone) -> None:
    """AUROC of m shots of one defective bottle among 20 good ones, batched and few-shot."""
    good = [read_image(path) for path in sorted((BOTTLE / "test" / "good").glob("*.png"))]
    few = FewShotModel(backbone, masking="off").fit([BOTTLE / "train" / "good" / "000.png"])
    few.encode = encode = Remembering(few)
    print("| defect | images with it | lowest of their places, batched | AUROC, batched | AUROC, few-shot |")
    print("| --- | --- | --- | --- | --- |")
    for defect in ("broken_small/000", "contamination/000"):
        image = read_image(BOTTLE / "test" / f"{defect}.png")
        rng = np.random.default_rng(0)
        shots = [image, *(seen_again(image, rng) for _ in range(COPIES[-1] - 1))]
        single = [few.score(one).score for one in [*good, *shots]]
        for count in COPIES:
            model = BatchedModel(backbone, masking="off")
            model.encode = encode
            scores = np.array([found.score for found in model.score_set([*good, *shots[:count]])])
            truth = np.arange(len(scores)) >= len(good)
            place = int(np.argsort(np.argsort(-scores))[truth].max()) + 1
            few_auroc = roc_auc_score(truth, single[: len(scores)])
            print(
                f"| {defect} | {count} of {len(scores)} | {place} | {100 * roc_auc_score(truth, scores):.1f} | "
                f"{100 * few_auroc:.1f} |",
                flush=True,
            )


def coin_tray() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The tray, and what may be wrong with it."""
    import skimage

    tray = read_image(Path(skimage.__file__).parent / "data" / "coins.png")
    one, other = (196, 154), (124, 103)  # (row, column) of two coins

    def pasted(image: np.ndarray, source: np.ndarray, at: tuple[int, int]) -> np.ndarray:
        """A round piece with soft edges."""
        alpha = np.zeros(image.shape[:2], np.float32)
        cv2.circle(alpha, at[::-1], RADIUS, 1.0, -1)
        alpha = cv2.GaussianBlur(alpha, (0, 0), 1.5)[..., None]
        return np.round(image * (1 - alpha) + source * alpha).astype(np.uint8)

    def moved(start: tuple[int, int], end: tuple[int, int]) -> np.ndarray:
        shift = np.float32([[1, 0, end[1] - start[1]], [0, 1, end[0] - start[0]]])
        return cv2.warpAffine(tray, shift, tray.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)

    scratched = tray.copy()
    cv2.line(scratched, (one[1] - 14, one[0] - 10), (one[1] + 14, one[0] + 12), (25, 25, 25), 3, cv2.LINE_AA)
    place = np.zeros(tray.shape[:2], np.uint8)
    cv2.circle(place, one[::-1], RADIUS, 255, -1)
    found = {
        "a scratch across one coin": scratched,
        "one coin missing": cv2.inpaint(tray, place, 5, cv2.INPAINT_TELEA),
        "one coin replaced by a second one of another kind": pasted(tray, moved(other, one), one),
        "two coins exchanged": pasted(pasted(tray, moved(other, one), one), moved(one, other), other),
        "upside down": np.ascontiguousarray(tray[::-1, ::-1]),
        "mirrored": np.ascontiguousarray(tray[:, ::-1]),
    }
    return tray, found


def no_patch_shows_it(backbone) -> None:
    """Scores of a tray with something wrong, beside shots in which nothing is."""
    tray, wrong = coin_tray()
    rng = np.random.default_rng(0)
    normal = [seen_again(tray, rng) for _ in range(20)]
    print("| tray of coins | score, 8 rotations | score, no rotations |\n| --- | --- | --- |")
    models = [FewShotModel(backbone, masking="off", rotations=kind).fit([tray]) for kind in ("agnostic", "informed")]
    scores = [[model.score(one).score for one in normal] for model in models]
    print("| nothing wrong, 20 shots: highest |" + "|".join(f" {max(own):.3f} " for own in scores) + "|")
    for name, image in wrong.items():
        shot = seen_again(image, rng)
        print(f"| {name} |" + "|".join(f" {model.score(shot).score:.3f} " for model in models) + "|")


def drift(backbone) -> None:
    """False alarms of good bottles whose pictures change, at a threshold that was set before."""
    normal = sorted((BOTTLE / "train" / "good").glob("*.png"))
    good = [read_image(path) for path in sorted((BOTTLE / "test" / "good").glob("*.png"))]
    model = FewShotModel(backbone, masking="off").fit(normal[:4])
    threshold = calibrate(model, normal[4:]).image_threshold
    rng = np.random.default_rng(0)
    changes = {
        "none": lambda image: image,
        **{f"light x {x}": (lambda image, x=x: np.clip(image * x, 0, 255)) for x in (0.95, 0.9, 0.8, 1.1)},
        **{f"blur, sigma {s}": (lambda image, s=s: cv2.GaussianBlur(image, (0, 0), s)) for s in (1, 2, 4)},
        **{
            f"noise, {n} levels": (lambda image, n=n: np.clip(image + rng.normal(0, n, image.shape), 0, 255))
            for n in (4, 12)
        },
        "turned by 3 degrees": lambda image: cv2.warpAffine(
            image, cv2.getRotationMatrix2D((450, 450), 3, 1), (900, 900), borderMode=cv2.BORDER_REFLECT_101
        ),
    }
    print("| change | median score | false alarms |\n| --- | --- | --- |")
    for name, change in changes.items():
        scores = np.array([model.score(np.asarray(change(image), dtype=np.uint8)).score for image in good])
        print(f"| {name} | {np.median(scores):.3f} | {int((scores > threshold).sum())} of {len(scores)} |", flush=True)
    print(f"\nthreshold {threshold:.3f}, from {len(normal) - 4} held-out images")


PARTS = {part.__name__: part for part in (no_patch_shows_it, repeated_defect, drift)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(2)
    backbone = load_backbone("dinov2_vits14", ASSETS / "weights" / "dinov2_vits14.safetensors")
    for part in (PARTS[name] for name in options.only):
        print(f"\n## {part.__name__}\n", flush=True)
        part(backbone)
    return 0


if __name__ == "__main__":
    sys.exit(main())
