"""First principal component -> foreground mask; and the masking test.

Legend: ``P`` patches in row-major order, ``D`` features, ``h w`` patch grid.

arXiv 2405.14529, section 3.2: the first principal component of an image's own patch features separates object from
background; patches above a threshold are foreground. Morphology runs as in the official code, which hands OpenCV
the flattened (P, 1) column: a window of three along the flattened order, wrapping over row ends. ``"grid"`` uses
the true 3 x 3 window instead.
"""

import contextlib
import math
import mmap
import threading
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import cv2
import numpy as np
import scipy.linalg
import threadpoolctl
from numpy.typing import NDArray

from anomalydino_plugin.errors import ConfigError

Morphology = Literal["official", "grid"]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float32]

FOREGROUND_THRESHOLD = 10.0  # official code, compute_background_mask
CENTRE_BORDER = 0.2  # the central window leaves out a fifth on each side
CENTRE_MIN_SHARE = 0.35  # at most this much foreground in the window: the sign was wrong
_WINDOW = np.ones((3, 3), np.uint8)
_WORKING_MEMORY = 128 * 1024**2  # bytes; OpenBLAS took 96 MB for two threads
_OPENBLAS = threadpoolctl.ThreadpoolController().select(internal_api="openblas")  # NumPy's and SciPy's
_ALONE = threading.Lock()  # all threads share their number: two who set it and put it back must not interleave


def first_principal_component(features: FloatArray) -> NDArray[np.float64]:
    """Scores of the first principal component of centred features, deterministic.

    The sign makes the loading of largest magnitude positive (scikit-learn >= 1.5's rule), so that the outcome is
    defined where both signs would pass the central-window test.

    Args:
        features: (P, D) float32, after the backbone's final norm, not L2-normalised.

    Returns:
        (P,) float64.

    Raises:
        MemoryError: too little is left for the eigenvectors.
    """
    _expect_working_memory()
    centred = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    count, width = centred.shape
    with _one_thread():
        if count >= width:
            loading = _leading_eigenvector(centred.T @ centred)
        else:  # the Gram matrix is smaller than the covariance
            loading = centred.T @ _leading_eigenvector(centred @ centred.T)
            loading /= max(float(np.linalg.norm(loading)), np.finfo(np.float64).tiny)
        if loading[np.abs(loading).argmax()] < 0:
            loading = -loading
        return np.asarray(centred @ loading)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """OpenBLAS by itself: its threads wait for each other at every column, busily, and beside other work for long."""
    with _ALONE, _OPENBLAS.limit(limits=1):
        yield


def _expect_working_memory() -> None:
    """OpenBLAS, under NumPy and SciPy, asks again and again, for ever, where the system refuses it working memory."""
    try:
        mmap.mmap(-1, _WORKING_MEMORY).close()  # address space alone: no page of it is touched
    except OSError as error:
        raise MemoryError(f"eigenvectors of a mask need {_WORKING_MEMORY / 1e6:.0f} MB of working memory") from error


def _leading_eigenvector(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    last = matrix.shape[0] - 1
    _, vectors = scipy.linalg.eigh(matrix, subset_by_index=[last, last], check_finite=False)
    return np.asarray(vectors[:, 0])


def foreground_mask(
    component: NDArray[np.float64],
    grid: tuple[int, int],
    *,
    threshold: float = FOREGROUND_THRESHOLD,
    morphology: Morphology = "official",
) -> BoolArray:
    """Threshold, sign test, dilation and closing.

    Args:
        component: (P,) first principal component.
        grid: (h, w) with h * w = P.
        threshold: foreground is above it.
        morphology: ``"official"`` (1-D, along the flattened order) or ``"grid"`` (2-D).

    Returns:
        (P,) bool, true for foreground.

    Raises:
        ConfigError: a grid that does not fit, or an unknown morphology.
    """
    if component.shape != (grid[0] * grid[1],):
        raise ConfigError(f"{component.shape} component values for a grid of {grid}: expected one for each patch.")
    if morphology not in {"official", "grid"}:
        raise ConfigError(f"morphology={morphology!r}: expected 'official' or 'grid'.")
    mask = threshold_component(component, grid, threshold)
    image = mask.astype(np.uint8).reshape((-1, 1) if morphology == "official" else grid)
    image = cv2.morphologyEx(cv2.dilate(image, _WINDOW), cv2.MORPH_CLOSE, _WINDOW)
    return np.asarray(image.reshape(-1) > 0)


def centre_share(mask: BoolArray, grid: tuple[int, int]) -> float:
    """Share of foreground in the central window, rows ``int(.2h):int(.8h)`` and columns likewise.

    The window is empty for grids of one row or column; the whole grid stands in for it then.
    """
    window = mask.reshape(grid)[
        tuple(slice(int(edge * CENTRE_BORDER), int(edge * (1 - CENTRE_BORDER))) for edge in grid)
    ]
    return float(window.mean()) if window.size else float(mask.mean())


def patch_foreground(features: FloatArray, grid: tuple[int, int], morphology: Morphology = "official") -> BoolArray:
    """Foreground mask of one image from its own features; see ``foreground_mask``.

    Args:
        features: (P, D) float32.
        grid: (h, w).
        morphology: see ``foreground_mask``.

    Returns:
        (P,) bool.
    """
    return foreground_mask(first_principal_component(features), grid, morphology=morphology)


def foreground_or_all(mask: BoolArray) -> BoolArray:
    """The mask of an image to score; all of it where the mask would hide every patch.

    Masked patches have distance 0. An image without any foreground (a blank frame, a part that is not there) would
    score 0, the score of a perfect one, whatever it shows.

    Args:
        mask: bool, any shape.

    Returns:
        bool, the same shape.
    """
    return mask if mask.any() else np.ones_like(mask)


class MaskingDecision(NamedTuple):
    """Outcome of the masking test on one reference image.

    Attributes:
        use_mask: whether foreground masks should be used for this object.
        confidence: 0 (a coin toss) to 1 (clear).
        foreground_share: share of all patches kept.
        border_share: share of the grid's outermost patches above the threshold, before morphology.
        outline: length of the mask's outline in patch edges over the square root of its area: 4 for a square,
            3.5 for a disc, above 13 for the ragged masks that textures give.
        reason: one sentence with the numbers.
    """

    use_mask: bool
    confidence: float
    foreground_share: float
    border_share: float
    outline: float
    reason: str

    @property
    def confirm_by_eye(self) -> bool:
        """Whether a person should look at the picture before relying on the decision."""
        return self.confidence < CONFIRM_BELOW


# Limits of the masking test. Measured with DINOv2 S/14 at 448 and 672 on bottle, screw, hazelnut and cookie
# references and on 20 textures and close-ups; docs/masking_test.md has the table. The second number is the
# distance from the limit at which we are sure.
MAX_FOREGROUND_SHARE = (0.50, 0.10)  # screw, hazelnut <= 0.39; bottle >= 0.60: it fills the frame
MAX_BORDER_SHARE = (0.10, 0.07)  # objects on a plain background <= 0.03; most textures >= 0.15
MAX_OUTLINE = (13.0, 3.0)  # objects <= 11.5; textures >= 14.6
MIN_FOREGROUND_SHARE = (0.02, 0.03)  # less is noise, or an object far too small to measure
CONFIRM_BELOW = 0.5
MASK_VOTES = 0.5  # of a set without reference images
_REFERENCE_EDGE = 32  # patches: 448 pixels with patches of 14


def masking_test(features: FloatArray, grid: tuple[int, int], morphology: Morphology = "official") -> MaskingDecision:
    """Decide from one reference image whether its foreground mask can be trusted (paper, section 3.2, figure 2).

    The paper decides by eye. Three shares of the mask stand in for the eye: how much of the image it keeps, how
    much of the border, and how ragged its outline is. A mask is used where all are those of one or a few objects on
    a background; textures and objects that fill the frame fail at least one.

    Args:
        features: (P, D) float32 of one reference image.
        grid: (h, w).
        morphology: see ``foreground_mask``.

    Returns:
        The decision with its evidence.
    """
    return foreground_and_test(features, grid, morphology)[1]


def foreground_and_test(
    features: FloatArray, grid: tuple[int, int], morphology: Morphology = "official"
) -> tuple[BoolArray, MaskingDecision]:
    """``patch_foreground`` and ``masking_test`` of one image for the price of one component.

    Returns:
        (P,) bool, and the decision.
    """
    component = first_principal_component(features)
    mask = foreground_mask(component, grid, morphology=morphology)
    return mask, judge_mask(mask, threshold_component(component, grid), grid)


def vote_on_masks(passed: Iterable[bool]) -> bool:
    """Whether a set without reference images uses masks: the masking test passes on more than half of its images."""
    votes = list(passed)
    return sum(votes) > MASK_VOTES * len(votes)


def judge_mask(mask: BoolArray, thresholded: BoolArray, grid: tuple[int, int]) -> MaskingDecision:
    """The masking test on a mask and on the same mask before morphology; see ``masking_test``."""
    share, border, outline = float(mask.mean()), _border_share(thresholded, grid), _outline(thresholded, grid)
    margins = {
        f"foreground {share:.0%} of the patches (object masks keep less than {MAX_FOREGROUND_SHARE[0]:.0%})": (
            (MAX_FOREGROUND_SHARE[0] - share) / MAX_FOREGROUND_SHARE[1]
        ),
        f"foreground {share:.1%} of the patches (an object keeps at least {MIN_FOREGROUND_SHARE[0]:.0%})": (
            (share - MIN_FOREGROUND_SHARE[0]) / MIN_FOREGROUND_SHARE[1]
        ),
        f"foreground {border:.0%} of the border (objects leave it free, below {MAX_BORDER_SHARE[0]:.0%})": (
            (MAX_BORDER_SHARE[0] - border) / MAX_BORDER_SHARE[1]
        ),
        f"outline {outline:.1f} (objects below {MAX_OUTLINE[0]:g}, textures above)": (
            (MAX_OUTLINE[0] - outline) / MAX_OUTLINE[1]
        ),
    }
    use_mask = min(margins.values()) > 0
    decisive, margin = min(margins.items(), key=lambda item: item[1])
    confidence = float(min(1.0, abs(margin)))
    verdict = "mask" if use_mask else "no mask"
    return MaskingDecision(use_mask, confidence, share, border, outline, f"{verdict}: {decisive}")


def threshold_component(
    component: NDArray[np.float64], grid: tuple[int, int], threshold: float = FOREGROUND_THRESHOLD
) -> BoolArray:
    """(P,) bool: above the threshold on the side that fills the central window; before morphology."""
    mask = component > threshold
    return -component > threshold if centre_share(mask, grid) <= CENTRE_MIN_SHARE else mask


def _border_share(mask: BoolArray, grid: tuple[int, int]) -> float:
    inner = np.zeros(grid, dtype=bool)
    inner[1:-1, 1:-1] = True
    return float(mask.reshape(grid)[~inner].mean())


def _outline(mask: BoolArray, grid: tuple[int, int]) -> float:
    """Patch edges between foreground and background inside the grid, over sqrt(foreground patches).

    Finer grids follow an outline into more of its nooks; the factor refers it to a grid of 32.
    """
    image = mask.reshape(grid)
    edges = np.count_nonzero(image[1:] != image[:-1]) + np.count_nonzero(image[:, 1:] != image[:, :-1])
    return float(edges / math.sqrt(max(1, int(image.sum()))) * math.sqrt(_REFERENCE_EDGE / min(grid)))
