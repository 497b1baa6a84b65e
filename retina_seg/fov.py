"""The field of view: the lit disc of a fundus image, found where a dataset gives no mask for it.

The rest of the frame is black: nothing to segment or to score. The disc's diameter in pixels is the image's scale.
"""

from __future__ import annotations

import cv2
import numpy as np

DETECTION_SIDE = 640  # longest side the search works at: finer only costs time
LARGEST_SIDE = 8192  # pixels an image may be scaled to: more is a mistake, or meant to exhaust the memory
BLACK = 8  # grey levels: an image that is nowhere brighter shows nothing


def find_fov(image: np.ndarray) -> np.ndarray:
    """The field of view (H, W) bool of `image` (H, W, 3) uint8 RGB; all False for a black image.

    The surround is as dark as the corners. The result is the convex hull of the largest part that is clearly brighter:
    dark patches at the rim belong to the disc. Where the corners are lit, it is the whole frame.
    """
    height, width = image.shape[:2]
    scale = min(1.0, DETECTION_SIDE / max(height, width))
    small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA) if scale < 1 else image
    red, green, blue = cv2.split(small)
    light = cv2.medianBlur(cv2.max(cv2.max(red, green), blue), 5)  # red in most images; grey ones work too
    bright = float(np.percentile(light, 95))
    if bright <= BLACK:
        return np.zeros((height, width), bool)
    surround = _surround_level(light)
    if surround > 0.4 * bright:
        return np.ones((height, width), bool)
    lit = (light > surround + max(4.0, 0.1 * (bright - surround))).astype(np.uint8)
    lit = cv2.morphologyEx(lit, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))  # letters and specks beside the disc
    count, labels, stats, _ = cv2.connectedComponentsWithStats(lit, connectivity=4)
    if count < 2:
        return np.ones((height, width), bool)
    largest = labels == 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    rows = np.flatnonzero(largest.any(axis=1))  # a hull's corners are among the ends of the rows
    ends = largest[rows].argmax(axis=1), largest.shape[1] - 1 - largest[rows, ::-1].argmax(axis=1)
    pixels = np.concatenate([np.stack([column, rows], axis=1) for column in ends])
    squares = np.concatenate([pixels + [x, y] for x in (-0.5, 0.5) for y in (-0.5, 0.5)]).astype(np.float32)
    hull = cv2.convexHull(squares)[:, 0].astype(float)
    return _fill_convex((hull + 0.5) * [width / small_size[0], height / small_size[1]] - 0.5, height, width)


def _fill_convex(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels (height, width) bool with their middle in the convex polygon of `corners`, (n, 2) float x, y in order.

    By half-planes, a row's bounds at a time: so a mirrored or rotated polygon gives the mirrored or rotated pixels.
    """
    rows = np.arange(height)
    left, right = np.zeros(height), np.full(height, width - 1.0)
    middle = corners.mean(axis=0)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 == y1:
            continue  # a level edge bounds rows, below
        slope = (x1 - x0) / (y1 - y0)
        crossing = x0 + (rows - y0) * slope
        if x0 + (middle[1] - y0) * slope < middle[0]:
            left = np.maximum(left, crossing)
        else:
            right = np.minimum(right, crossing)
    slack = 1e-4  # a middle on the edge counts, whichever way it was rounded
    right[(rows < corners[:, 1].min() - slack) | (rows > corners[:, 1].max() + slack)] = -width
    columns = np.arange(width, dtype=np.float32)
    left, right = (bound.astype(np.float32)[:, None] for bound in (left - slack, right + slack))
    return (columns >= left) & (columns <= right)


def _surround_level(light: np.ndarray) -> float:
    """The brightness of the darkest two corners (a twentieth of each side): printed text or a lamp may light the others."""
    rows, columns = (max(1, side // 20) for side in light.shape)
    corners = [light[:rows, :columns], light[:rows, -columns:], light[-rows:, :columns], light[-rows:, -columns:]]
    return float(sorted(np.median(corner) for corner in corners)[1])


def fov_box(fov: np.ndarray) -> tuple[int, int, int, int]:
    """The box (top, left, bottom, right), ends exclusive, around the True pixels of `fov` (H, W); the frame if none."""
    left, top, width, height = cv2.boundingRect(fov.astype(np.uint8))
    return (top, left, top + height, left + width) if width else (0, 0, *fov.shape)


def fov_diameter(fov: np.ndarray) -> float:
    """The diameter in pixels: the longer side of the box, since many cameras cut the disc flat on two sides."""
    top, left, bottom, right = fov_box(fov)
    return float(max(bottom - top, right - left))
