"""Whether a fundus image can be trusted: facts with limits, set with `general` (results/log/20-measurements.md)."""

from math import inf

import cv2
import numpy as np

from retina_seg.fov import fov_box

SIDE = 384  # pixels of the field's longer side: all but the size is measured at this scale
GRADES = ("yes", "doubtful", "no")
# a fact of `_facts`: "no" below, doubtful below, doubtful above, "no" above; what is said below and above
LIMITS: dict[str, tuple[float, float, float, float, str, str]] = {
    "diameter": (100, 300, inf, inf, "small: field of view of {:.0f} pixels", ""),
    "lit": (0.05, 0.4, 0.95, inf, "field of view is {:.0%} of the frame", "no field of view found"),
    "dark": (-inf, -inf, 0.3, inf, "", "dark: {:.0%} of the field"),
    "clipped": (-inf, -inf, 0.05, 0.5, "", "overexposed: {:.0%} of the field"),
    "contrast": (0.002, 0.006, inf, inf, "low contrast", ""),
    "detail": (0.05, 0.22, 2.5, 5, "blurred", "noisy"),
    "vessels": (0.02, 0.045, 0.2, 0.35, "few vessels: {:.1%} of the field", "many vessels: {:.0%} of the field"),
    "certain": (0.5, 0.72, inf, inf, "network uncertain", ""),
    "spread": (0.4, 0.55, inf, inf, "vessels in {:.0%} of the field only", ""),
    "connected": (0.3, 0.8, inf, inf, "vessels in pieces", ""),
}


def quality(image: np.ndarray, fov: np.ndarray, probability: np.ndarray, vessels: np.ndarray) -> tuple[str, str]:
    """How gradable an image (H, W, 3) uint8 RGB is, of `GRADES`, and remarks on what is beyond `LIMITS`, joined by "; ".

    `fov` and `vessels`: (H, W) bool; `probability`: (H, W) float32 in [0, 1]. The grade is the worst that a fact gives.
    """
    if not fov.any():
        return "no", "black"
    worst, remarks = 0, []
    for name, value in _facts(image, fov, probability, vessels).items():
        no_below, low, high, no_above, below, above = LIMITS[name]
        if not low <= value <= high:
            remarks.append((below if value < low else above).format(value))
            worst = max(worst, 1 if no_below <= value <= no_above else 2)
        if name == "vessels" and value < no_below:
            break  # the facts after it are of the vessels found
    return GRADES[worst], "; ".join(remarks)


def _facts(image: np.ndarray, fov: np.ndarray, probability: np.ndarray, vessels: np.ndarray) -> dict[str, float]:
    """The facts of `LIMITS`: shares are of the field less its rim, contrast and detail are of the green channel."""
    top, left, bottom, right = fov_box(fov)
    diameter = max(bottom - top, right - left)
    size = [max(1, round(n * min(1, SIDE / diameter))) for n in (right - left, bottom - top)]
    whole = (image, fov * np.uint8(255), probability, vessels * np.uint8(255))
    small = [cv2.resize(array[top:bottom, left:right], size, interpolation=cv2.INTER_AREA) for array in whole]
    image, field, probability, vessels = small
    inside = cv2.erode(field, np.ones((13, 13), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=0) > 127
    inside = inside if inside.any() else field >= field.max()
    green, found = image[..., 1].astype(np.float32), (vessels > 127) & inside
    soft = [green, *(cv2.GaussianBlur(green, (0, 0), sigma) for sigma in (1, 2, 4, 8))]
    fine, _, middle, coarse = (float((a - b)[inside].std()) for a, b in zip(soft, soft[1:], strict=False))
    shares = cv2.resize(np.dstack([found, inside]).astype(np.float32), (8, 8), interpolation=cv2.INTER_AREA)
    cells, filled = shares.transpose(2, 0, 1)
    areas = cv2.connectedComponentsWithStats(found.view(np.uint8), connectivity=8)[2][1:, cv2.CC_STAT_AREA]
    return {
        "diameter": diameter,
        "lit": fov.mean(),
        "dark": (np.max(cv2.split(image), axis=0)[inside] < 32).mean(),
        "clipped": (green[inside] >= 250).mean(),
        "contrast": middle / max(green[inside].mean(), 1),
        "detail": fine / max(coarse, 0.1),  # structures of 1 pixel against those of 4 to 8
        "vessels": found[inside].mean(),
        "certain": probability[found].sum() / max(probability[inside].sum(), 1e-3),  # all of it is 1
        "spread": (cells[filled >= min(0.5, filled.max())] > 0.005).mean(),  # of 8x8 cells, those with vessels
        "connected": areas.max(initial=0) / max(areas.sum(), 1),  # the largest piece's share
    }
