"""An ellipse through the rim of a disc: robust to the many points that do not lie on it.

Fischler and Bolles, "Random sample consensus" (1981), with the same samples for every image; then least squares.
"""

from __future__ import annotations

import numpy as np

TOLERANCE = 1.2  # pixels between an ellipse and a point that agrees with it
SAMPLES = np.random.default_rng(0).random((192, 4))  # of the points, in [0, 1): four an ellipse
JITTER = np.random.default_rng(1).random((192, 4, 4)) * 1e-9  # a point may be drawn twice
ROUND = np.array([[1.0, -1.0, 0.0, 0.0]])  # times (A, B, C, D) is 0 for a circle


def outside(ellipse: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far outside the ellipse, (4, ...) float, points x, y lie, in their unit; negative inside. Broadcasts."""
    x0, y0, rx, ry = ellipse
    return (np.sqrt(((x - x0) / rx) ** 2 + ((y - y0) / ry) ** 2) - 1) * (rx + ry) / 2


def fit_ellipse(points: np.ndarray, longest: int) -> np.ndarray | None:
    """The ellipse (4,) with level axes, of ratio 0.8 to 1.25, that most of `points` (n, 2) agree with, or None.

    A x^2 + B y^2 + C x + D y = 1 from four points, or a circle from three, many times; then by least squares.
    """
    if len(points) < 16:
        return None
    middle, near = (points.min(axis=0) + points.max(axis=0)) / 2, TOLERANCE / longest
    x, y = ((points - middle) / longest).T
    terms, few = np.stack([x * x, y * y, x, y], axis=1), slice(None, None, max(1, len(x) // 128))
    samples, ones = terms[(SAMPLES * len(points)).astype(int)], np.ones((len(SAMPLES), 4, 1))
    samples[::2, 3], ones[::2, 3] = ROUND, 0
    found = _ellipses(np.linalg.solve(samples + JITTER, ones)[..., 0])
    best = found[:, np.argmax((np.abs(outside(found[..., None], x[few], y[few])) < near).sum(axis=1))]
    for tolerance in (1.5 * near, near, near):
        chosen = np.abs(outside(best, x, y)) < tolerance
        count = int(chosen.sum())
        if count < 16:
            return None
        system = np.concatenate([terms[chosen], 0.005 * np.sqrt(count) * ROUND])  # of a short arc rather a circle
        best = _ellipses(np.linalg.lstsq(system, np.append(np.ones(count), 0), rcond=None)[0])
    return None if np.isnan(best[0]) else best * longest + np.append(middle, [0, 0])


def _ellipses(found: np.ndarray) -> np.ndarray:
    """Centre x, y and radii x, y (4, n) of A, B, C, D (n, 4); NaN where they are none, or too long or too large a one."""
    a, b, c, d = found.T
    with np.errstate(all="ignore"):
        x, y = -c / (2 * a), -d / (2 * b)
        rx, ry = (np.sqrt((1 + a * x**2 + b * y**2) / k) for k in (a, b))
        valid = (rx / ry > 0.8) & (rx / ry < 1.25) & (rx > 0.08) & (rx < 1)
        return np.where(valid, [x, y, rx, ry], np.nan)


def flat_cut(ends: np.ndarray, ellipse: np.ndarray, side: int) -> float:
    """The x or y of a flat cut at the ellipse's `side` (least x, greatest x, least y, greatest y), or infinity.

    There half of the chord's `ends`, (n, 2) float x, y, lie in line.
    """
    axis, sign = side // 2, 1 - 2 * (side % 2)
    inside = ends[outside(ellipse, *ends.T) < -1.5, axis]
    if len(inside) >= 4:
        common = np.bincount(np.maximum(np.rint(inside), 0).astype(int)).argmax()
        there = inside[np.abs(inside - common) <= 1]
        height = (common - ellipse[axis]) / ellipse[2 + axis]
        if height * sign < 0 and len(there) > ellipse[3 - axis] * np.sqrt(max(0.0, 1 - height**2)):
            return float(np.median(there))
    return -np.inf * sign
