"""The field of view: the lit disc of a fundus image, found where a dataset gives no mask for it.

The rest of the frame is surround: nothing to segment or to score. The disc's diameter in pixels is the image's scale.
"""

from typing import NamedTuple

import cv2
import numpy as np

DETECTION_SIDE = 256  # longest side the search works at: finer only costs time
LARGEST_SIDE = 8192  # pixels an image may be scaled to: more is a mistake, or meant to exhaust the memory
BLACK = 8  # grey levels: an image that is nowhere brighter, and has no disc, shows nothing
LEVELS = (0.12, 0.04, 0.35)  # of the contrast, for what is lit: low ones for dark sides, high ones for a glow
CLEAR, SURE, LEAST = 0.75, 0.7, 0.4  # step across the rim: no other level is tried; needs no flat surround; is a disc
CIRCLE = np.stack([np.cos(np.linspace(0, 2 * np.pi, 721)), np.sin(np.linspace(0, 2 * np.pi, 721))], axis=1)[:-1]
TOLERANCE = 1.2  # pixels between an ellipse and a point that agrees with it
SAMPLES = np.random.default_rng(0).random((192, 4))  # of the points, in [0, 1): four an ellipse
JITTER = np.random.default_rng(1).random((192, 4, 4)) * 1e-9  # a point may be drawn twice
ROUND = np.array([[1.0, -1.0, 0.0, 0.0]])  # times (A, B, C, D) is 0 for a circle


class _Disc(NamedTuple):
    ellipse: np.ndarray  # (4,) float: centre x, y and radii x, y; pixels of the search
    low: np.ndarray  # (2,) float: least x, y that a flat cut leaves, or -inf
    high: np.ndarray  # (2,) float: greatest x, y, or inf
    step: float  # mean relative step of the contrast across the rim, 0 to 1
    tabs: np.ndarray  # (n, 2) float: ends that lie outside, of a notch or tab that many cameras cut into the rim


def find_fov(image: np.ndarray) -> np.ndarray:
    """The field of view (H, W) bool of `image` (H, W, 3) uint8 RGB: its discs together; all False for a black image."""
    discs = find_discs(image)
    return discs[0] if len(discs) == 1 else np.any([np.zeros(image.shape[:2], bool), *discs], axis=0)


def find_discs(image: np.ndarray) -> list[np.ndarray]:
    """The discs of `image` (H, W, 3) uint8 RGB, a mask (H, W) bool each, the largest first; none for a black image.

    A disc is an ellipse that the rim of a lit part agrees with, less what the frame and flat cuts leave out. Without one,
    the only entry is the convex hull of the largest lit part, or the whole frame where no surround is dark.
    """
    small, bright, zoom, offset = _shrink(image)
    surrounds, found = _surrounds(small), list[_Disc]()
    for surround in [*surrounds, np.percentile(small[:, ::3, ::3], 2, axis=(1, 2))]:  # bars may hide all corners
        found = found or _discs(np.abs(small - surround[:, None, None]).max(axis=0))
    if not found and bright <= BLACK:
        return []
    # a little larger: a vessel lost outside costs more than a rim scored inside
    rims = [np.clip(d.ellipse[:2] + (d.ellipse[2:] + 0.2) * CIRCLE, d.low, d.high) for d in found]
    points = [np.concatenate([rim, d.tabs]).astype(np.float32) for rim, d in zip(rims, found, strict=True)]
    outlines = [cv2.convexHull(some)[:, 0].astype(float) for some in points] or [_hull(small, surrounds[0])]
    return [_fill(outline * zoom + offset, *image.shape[:2]) for outline in outlines]


def _shrink(image: np.ndarray) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """`image` (H, W, 3) uint8 for the search, (3, h, w) float32 in 0 to 255, brightened if dim; its light in grey levels;
    zoom and offset, (2,) float each: x, y of the search times zoom plus offset is x, y of the image."""
    step = max(1, min(max(image.shape[:2]) * 2 // (3 * DETECTION_SIDE), *image.shape[:2]))  # fewer pixels to read
    part = image[step // 2 :: step, step // 2 :: step]
    size = np.array(part.shape[1::-1])
    new = np.maximum(1, np.rint(size * min(1.0, DETECTION_SIDE / size.max()))).astype(int)
    bright = float(np.percentile(part[::6, ::6].reshape(-1, 3).T.max(axis=0), 95))
    if bright < 64:  # the mean of few grey levels would be rounded
        part = cv2.convertScaleAbs(np.ascontiguousarray(part), alpha=128 / max(bright, 1.0))
    small = cv2.resize(part, new.tolist(), interpolation=cv2.INTER_AREA).reshape(new[1], new[0], 3)
    zoom = size / new * step
    return np.ascontiguousarray(small.transpose(2, 0, 1), np.float32), bright, zoom, (zoom - step) / 2 + step // 2


def _surrounds(small: np.ndarray) -> list[np.ndarray]:
    """What may be the surround's colour, (3,) float32 each, darkest first: of corners that agree, else the second darkest."""
    rows, columns = (max(1, side // 20) for side in small.shape[1:])
    patches = [small[:, ::y, ::x][:, :rows, :columns].reshape(3, -1) for y in (1, -1) for x in (1, -1)]
    corners = np.median(patches, axis=2)  # of text, less than half is ink
    near = max(4.0, 0.1 * np.percentile(small[:, ::2, ::2].max(axis=0), 95))
    alike = np.abs(corners[:, None] - corners).max(axis=2) <= near
    colours = [np.median(corners[row], axis=0) for row in np.unique(alike[alike.sum(axis=1) > 1], axis=0)]
    return sorted(colours or [corners[corners.sum(axis=1).argsort()[1]]], key=np.sum)


def _discs(contrast: np.ndarray) -> list[_Disc]:
    """The discs in `contrast` (h, w) float32, distances to the surround's colour, at the level that shows them best."""
    low, high = np.percentile(contrast[::2, ::2], [7, 95]).tolist()
    floor = 1.5 + 2 * min(low, 0.03 * high)  # of noise
    best: list[_Disc] = []
    for level in LEVELS:
        found = _discs_above(contrast, max(floor, level * high), 0.03 * high + floor)
        best = max(best, found, key=lambda discs: sum(disc.step * disc.ellipse[2:].mean() for disc in discs))
        if best and best[0].step > CLEAR:
            break
    return best


def _discs_above(contrast: np.ndarray, threshold: float, floor: float) -> list[_Disc]:
    """The discs that the lit parts show, the largest first; none of less than half the largest one's area."""
    above, whole, contrast = (contrast > threshold).astype(np.uint8), contrast, contrast.copy()
    views = [np.rot90(above, turn) for turn in range(4)]
    bars = [int((view.sum(axis=1, dtype=int) <= 0.9 * view.shape[1]).argmax()) for view in views]
    for turn, bar in enumerate(bars):  # full rows or columns from a side of the frame on
        views[turn][:bar] = np.rot90(contrast, turn)[:bar] = 0
    lit = cv2.morphologyEx(above, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))  # letters and specks beside the disc
    grid, discs, least = np.ogrid[: lit.shape[0], : lit.shape[1]][::-1], list[_Disc](), 0.05 * lit.size
    for _ in range(16):
        _, labels, stats, _ = cv2.connectedComponentsWithStats(lit, connectivity=4)
        area = stats[1:, cv2.CC_STAT_AREA].max(initial=0)
        if area < least:
            break
        part = labels == 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
        disc = _fit(part, contrast, floor)
        if disc is not None and all(_outside(other.ellipse, *disc.ellipse[:2]) > 0 for other in discs):
            discs.append(disc)
            least = max(least, 0.3 * area)
        lit[part if disc is None else _outside(disc.ellipse, *grid) < 3] = 0
        if cv2.countNonZero(lit) < least:
            break
    discs.sort(key=lambda disc: -disc.ellipse[2] * disc.ellipse[3])
    if discs and (discs[0].step < SURE or discs[0].ellipse[2:].prod() < 0.06 * lit.size):  # not of an optic disc?
        beside = np.all([_outside(disc.ellipse, *grid) > 2 for disc in discs], axis=0)
        if np.median(whole[beside]) > 0.08 * np.percentile(whole, 95):
            return []
    return [disc for disc in discs if disc.ellipse[2:].prod() >= 0.5 * discs[0].ellipse[2:].prod()]


def _fit(part: np.ndarray, contrast: np.ndarray, floor: float) -> _Disc | None:
    """The disc whose rim the lit `part` (h, w) bool shows, or None."""
    ends = [_ends(part, contrast, side) for side in range(4)]
    ellipse = _fit_ellipse(np.concatenate(ends), max(part.shape))
    if ellipse is None:
        return None
    low, high = np.array([_flat_cut(some, ellipse, side) for side, some in enumerate(ends)]).reshape(2, 2).T
    rim = [ellipse[:2] + (ellipse[2:] + further) * CIRCLE[::8] for further in (-2, 2)]
    last = np.array(part.shape[::-1]) - 1
    seen = np.all([(xy > 0) & (xy < last) & (xy > low) & (xy < high) for xy in rim], axis=(0, 2))
    inside, beyond = (contrast[tuple(np.rint(xy[seen]).astype(int).T[::-1])] for xy in rim)
    steps = np.maximum(inside - beyond, 0) / (inside + beyond + floor)
    step = float(steps.sum()) / max(len(steps), 20)  # too little of the arc shows little
    far = _outside(ellipse, *np.concatenate(ends).T)
    tabs = np.concatenate(ends)[(far > 1.5) & (far < 0.07 * ellipse[2])]
    return _Disc(ellipse, low, high, step, tabs[: len(tabs) * (len(tabs) < 0.1 * len(far))]) if step >= LEAST else None


def _ends(part: np.ndarray, contrast: np.ndarray, side: int) -> np.ndarray:
    """The ends (n, 2) float x, y of the rows (side 0: first, 1: last) or columns (2, 3) of `part`, but at the frame.

    Between pixels: the contrast there, as a share of that further inside, is how much of a pixel is covered.
    """
    if side > 1:
        part, contrast = part.T, contrast.T
    if side % 2:
        part, contrast = part[:, ::-1], contrast[:, ::-1]
    first = part.argmax(axis=1)
    rows = np.flatnonzero(first)  # none lit, or lit from the frame on: 0
    values = contrast[rows[:, None], np.clip(first[rows, None] + np.arange(-4, 3), 0, part.shape[1] - 1)]
    beyond, inside = values[:, :1], values[:, 6:]
    share = (values[:, 2:6] - beyond) / np.maximum(0.8 * (inside - beyond), 1e-3)  # 0.8: the rim is not sharp
    edge = first[rows] + 1.5 - np.clip(share, 0, 1).sum(axis=1)
    edge = part.shape[1] - 1 - edge if side % 2 else edge
    return np.stack([rows, edge] if side > 1 else [edge, rows], axis=1).astype(float)


def _outside(ellipse: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How far outside the ellipse, (4, ...) float, points x, y lie, in their unit; negative inside. Broadcasts."""
    x0, y0, rx, ry = ellipse
    return (np.sqrt(((x - x0) / rx) ** 2 + ((y - y0) / ry) ** 2) - 1) * (rx + ry) / 2


def _fit_ellipse(points: np.ndarray, longest: int) -> np.ndarray | None:
    """The ellipse (4,) with level axes, of ratio 0.8 to 1.25, that most of `points` (n, 2) agree with, or None.

    A x^2 + B y^2 + C x + D y = 1 from four points, or a circle from three, many times; then by least squares. Source:
    Fischler and Bolles, "Random sample consensus" (1981), here with the same samples for every image.
    """
    if len(points) < 16:
        return None
    middle, near = (points.min(axis=0) + points.max(axis=0)) / 2, TOLERANCE / longest
    x, y = ((points - middle) / longest).T
    terms, few = np.stack([x * x, y * y, x, y], axis=1), slice(None, None, max(1, len(x) // 128))
    samples, ones = terms[(SAMPLES * len(points)).astype(int)], np.ones((len(SAMPLES), 4, 1))
    samples[::2, 3], ones[::2, 3] = ROUND, 0
    found = _ellipses(np.linalg.solve(samples + JITTER, ones)[..., 0])
    best = found[:, np.argmax((np.abs(_outside(found[..., None], x[few], y[few])) < near).sum(axis=1))]
    for tolerance in (1.5 * near, near, near):
        chosen = np.abs(_outside(best, x, y)) < tolerance
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


def _flat_cut(ends: np.ndarray, ellipse: np.ndarray, side: int) -> float:
    """The x or y of a flat cut at the ellipse's `side` (least x, greatest x, least y, greatest y), or infinity.

    There half of the chord's `ends`, (n, 2) float x, y, lie in line.
    """
    axis, sign = side // 2, 1 - 2 * (side % 2)
    inside = ends[_outside(ellipse, *ends.T) < -1.5, axis]
    if len(inside) >= 4:
        common = np.bincount(np.maximum(np.rint(inside), 0).astype(int)).argmax()
        there = inside[np.abs(inside - common) <= 1]
        height = (common - ellipse[axis]) / ellipse[2 + axis]
        if height * sign < 0 and len(there) > ellipse[3 - axis] * np.sqrt(max(0.0, 1 - height**2)):
            return float(np.median(there))
    return -np.inf * sign


def _hull(small: np.ndarray, surround: np.ndarray) -> np.ndarray:
    """The convex hull (n, 2) float x, y of the largest lit part; the frame where the surround is lit, or nothing is."""
    contrast = np.abs(small - surround[:, None, None]).max(axis=0)
    lit = (contrast > max(4.0, 0.1 * np.percentile(contrast, 95))).astype(np.uint8)
    lit = cv2.morphologyEx(lit, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    count, labels, stats, _ = cv2.connectedComponentsWithStats(lit, connectivity=4)
    if count < 2 or surround.max() > 0.2 * np.percentile(small.max(axis=0), 95):
        return np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (np.array(lit.shape[::-1]) + 1.0) - 1
    squares = np.argwhere(stats[1:, -1].argmax() == labels.T - 1)[:, None] + np.indices((2, 2)).reshape(2, 4).T - 0.5
    return cv2.convexHull(squares.reshape(-1, 2).astype(np.float32))[:, 0].astype(float)


def _fill(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels (height, width) bool with their middle in the convex `outline`, (n, 2) float x, y in order."""
    outline = np.roll(outline, -outline[:, 1].argmin(), axis=0)
    turn, rows = outline[:, 1].argmax(), np.arange(height)
    sides = outline[: turn + 1], np.append(outline[turn:], outline[:1], axis=0)[::-1]
    ends = np.sort([np.interp(rows, side[:, 1], side[:, 0], np.nan, np.nan) for side in sides], axis=0)
    first, last = np.clip(np.nan_to_num(ends + [[0], [1]], nan=-1), 0, width)
    mask = np.zeros((height, width), bool)
    for row, start, end in zip(mask, np.ceil(first).astype(int).tolist(), last.astype(int).tolist(), strict=True):
        row[start:end] = True
    return mask


def fov_box(fov: np.ndarray) -> tuple[int, int, int, int]:
    """The box (top, left, bottom, right), ends exclusive, around the True pixels of `fov` (H, W); the frame if none."""
    left, top, width, height = cv2.boundingRect(fov.astype(np.uint8))
    return (top, left, top + height, left + width) if width else (0, 0, *fov.shape)


def fov_diameter(fov: np.ndarray) -> float:
    """The diameter in pixels: the longer side of the box, since many cameras cut the disc flat on two sides."""
    top, left, bottom, right = fov_box(fov)
    return float(max(bottom - top, right - left))
