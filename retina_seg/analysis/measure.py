"""Measures of the vessels in a mask, inside the field of view. Undefined is None, never 0.

Regions: the whole field; its quadrants by the middle of its box, `top_left_` …; with the optic disc `zone_b_` and `zone_c_`,
0.5 to 1 and 0.5 to 2 disc diameters from its margin (Knudtson et al. 2003, Cheung et al. 2010). A zone may lie partly outside
the field, `zone_c_inside_pct`, and then says little.

The end of a name is its unit. Lengths: `_px`, pixels; `_pct`, per cent of the field of view's diameter; `_um`, micrometres,
with a pixel size. Densities: `_per_px`, `_per_fov` (the diameter is the unit), `_per_mm`; of points, and squared curvature,
`_per_px2` …. `area_pct` is per cent of the region; tortuosity and the fractal dimensions have no unit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import cv2
import numpy as np

from retina_seg.analysis.centrelines import Centrelines, at_points, centrelines
from retina_seg.fov import fov_box, fov_diameter

SHORTEST = 0.02  # of the field's diameter: shorter pieces have no tortuosity
ZONES = {"zone_b_": (1.0, 1.5), "zone_c_": (1.0, 2.5)}  # disc diameters from the disc's centre
PARTS = np.rint(2 ** np.arange(2, 13, 0.5)).astype(int)  # boxes along the mask's longer side, of 2 pixels or more
Measurements = dict[str, float | None]
Found = dict[str, tuple[float, int]]  # name -> value in pixels, NaN where undefined; power of the length in its unit


def measure(
    vessels: np.ndarray,
    fov: np.ndarray,
    pixel_size: float | None = None,
    disc: Sequence[float] | None = None,
    quadrants: bool = True,
) -> Measurements:
    """The measures of a mask by name, in the whole field of view, its quadrants, and zones B and C around the optic disc.

    Args:
        vessels, fov: (H, W) bool.
        pixel_size: micrometres a pixel.
        disc: the optic disc's centre x, y and diameter in pixels; adds the zones.

    A mirrored mask, or one rotated by 90 degrees, gives the same. In a field that is empty, or vessel all over, all are None.

    Raises `ValueError`: arrays of another shape or dtype; a pixel size or disc that is not finite and positive.
    """
    if vessels.ndim != 2 or vessels.shape != fov.shape or vessels.dtype != bool or fov.dtype != bool:
        raise ValueError(f"vessels, fov must be bool (H, W): {vessels.dtype} {vessels.shape}, {fov.dtype} {fov.shape}")
    scale, size = 1 if pixel_size is None else pixel_size, 1 if disc is None else disc[2]
    if not (all(map(math.isfinite, (scale, size, *(disc or ())))) and scale > 0 and size > 0):
        raise ValueError(f"pixel size {pixel_size}, disc {disc}: must be finite, size and diameter above 0")
    fov = fov & (not vessels[fov].all())
    diameter = fov_diameter(fov) if fov.any() else math.nan
    top, left, bottom, right = fov_box(fov)
    fov = fov[top:bottom, left:right]
    vessels = vessels[top:bottom, left:right] & fov
    regions = {"": fov}
    if quadrants:
        regions |= _quadrants(fov)
    values = {"fov_diameter_px": diameter}
    if disc is not None:
        zones = _zones(fov, disc[0] - left, disc[1] - top, disc[2])
        for name, (near, far) in ZONES.items():
            whole = math.pi * (far**2 - near**2) * disc[2] ** 2
            values[f"{name}inside_pct"] = 100 * np.count_nonzero(zones[name]) / whole + 0 * diameter
        regions |= zones

    turns, step = _orientation(vessels)
    regions = {name: np.rot90(region[:, ::step], turns) for name, region in regions.items()}
    vessels = np.ascontiguousarray(np.rot90(vessels[:, ::step], turns))
    lines = centrelines(vessels, regions[""], diameter)
    for prefix, region in regions.items():
        found = _area_and_length(vessels, region, lines)
        found |= _calibre(region, lines)
        found |= _points(region, lines)
        found |= _tortuosity(region, lines, SHORTEST * diameter)
        found |= fractal_dimensions(vessels & region)
        for name, (value, power) in found.items():
            values |= _in_units(prefix + name, value, power, diameter, pixel_size)
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _quadrants(fov: np.ndarray) -> dict[str, np.ndarray]:
    """The quarters of `fov` (H, W) bool; a line in the middle belongs to both sides."""
    height, width = fov.shape
    y, x = np.ogrid[:height, :width]
    rows = {"top": 2 * y < height, "bottom": 2 * y >= height - 1}
    columns = {"left": 2 * x < width, "right": 2 * x >= width - 1}
    return {f"{row}_{column}_": fov & rows[row] & columns[column] for row in rows for column in columns}


def _zones(fov: np.ndarray, x: float, y: float, diameter: float) -> dict[str, np.ndarray]:
    """What of `ZONES` around the disc lies in `fov` (H, W) bool."""
    rows, columns = np.ogrid[: fov.shape[0], : fov.shape[1]]
    away = np.hypot(rows - y, columns - x) / diameter
    return {name: fov & (away >= near) & (away <= far) for name, (near, far) in ZONES.items()}


def _orientation(vessels: np.ndarray) -> tuple[int, int]:
    """Quarter turns and step (-1: mirrored) before `vessels` is measured: a skeleton differs between the eight ways."""

    def key(way: tuple[int, int]) -> tuple[tuple[int, ...], bytes]:
        turned = np.rot90(vessels[:, :: way[1]], way[0])
        return turned.shape, np.packbits(turned).tobytes()

    return min(itertools.product(range(4), (1, -1)), key=key)


def _in_units(name: str, value: float, power: int, diameter: float, pixel_size: float | None) -> dict[str, float]:
    """A measure in all its units: name with unit -> value."""
    if power == 0:
        return {name: value}
    if power == 1:
        units = {"px": 1.0, "pct": 100 / diameter, "um": pixel_size}
    else:
        units = {"per_px": 1.0, "per_fov": diameter, "per_mm": pixel_size and 1000 / pixel_size}
    square = "2" if power == -2 else ""
    return {f"{name}_{unit}{square}": value * one ** abs(power) for unit, one in units.items() if one is not None}


def _area_and_length(vessels: np.ndarray, region: np.ndarray, lines: Centrelines) -> Found:
    """`area_pct`: vessel pixels. It follows the threshold of the mask: read it beside the calibre.

    `length`: of the smoothed centrelines, up to the edge of the mask at free ends; `length_density`: over the region's area.
    Thin vessels, found or not, change it most.
    """
    area = np.count_nonzero(region) or math.nan
    length = lines.length[at_points(region, lines.points)].sum() + 0 * area
    share = 100 * np.count_nonzero(vessels & region) / area
    return {"area_pct": (share, 0), "length": (length, 1), "length_density": (length / area, -1)}


def _calibre(region: np.ndarray, lines: Centrelines) -> Found:
    """`calibre_*`: from edge to edge, straight across the centreline, weighted by length; quantiles of it.

    Left out within a radius of ends and branch points. It follows the threshold of the mask, and one pixel is a large share
    of a thin vessel: compare calibres of one resolution and one network only.
    """
    kept = at_points(region, lines.points) & np.isfinite(lines.calibre)
    calibre, length = lines.calibre[kept], lines.length[kept]
    found: Found = {"calibre_mean": (_mean(calibre, length), 1)}
    for name, share in (("median", 0.5), ("p10", 0.1), ("p90", 0.9)):
        found[f"calibre_{name}"] = (_quantile(calibre, length, share), 1)
    return found


def _points(region: np.ndarray, lines: Centrelines) -> Found:
    """`branch_points`: where three segments or more meet, one where several lie within a radius, or 4 pixels.

    `end_points`: free ends, spurs left out. A gap in a mask adds two ends, a hole two branch points; a crossing counts once
    or, oblique, twice.
    """
    area = np.count_nonzero(region) or math.nan
    found: Found = {}
    for name, points in (("branch", lines.branches), ("end", lines.ends)):
        number = np.count_nonzero(at_points(region, points)) + 0 * area
        found |= {f"{name}_points": (number, 0), f"{name}_density": (number / area, -2)}
    return found


def _tortuosity(region: np.ndarray, lines: Centrelines, shortest: float) -> Found:
    """`tortuosity_*`: arc over chord of each piece (Lotmar et al. 1979), mean and median weighted by the pieces' length.

    `curvature2_*`: squared curvature of each piece, integrated and divided by its length (Hart et al. 1999), weighted alike.
    A piece is what of a segment lies in the region, if longer than `shortest`. Gaps and crossings cut vessels, and bends
    as short as the smoothing, 1 % of the field's diameter, are lost.
    """
    here = at_points(region, lines.points)
    cuts = np.flatnonzero((np.diff(lines.segment) > 0) | (here[1:] != here[:-1])) + 1
    arcs, ratios, bends = [], [], []
    for start, stop in zip(np.append(0, cuts), np.append(cuts, len(here)), strict=True):
        piece = lines.points[start:stop]
        arc = np.hypot(*np.diff(piece, axis=0).T).sum()
        if stop > start and here[start] and arc >= shortest:
            chord = np.hypot(*(piece[-1] - piece[0]))
            squared = lines.curvature[start:stop] ** 2
            curved = np.isfinite(squared)
            arcs.append(arc)
            ratios.append(arc / chord if chord >= 1 else math.nan)  # a ring has none
            bends.append(_mean(squared[curved], lines.length[start:stop][curved]))
    found: Found = {}
    for name, values, power in (("tortuosity", ratios, 0), ("curvature2", bends, -2)):
        known = np.isfinite(values)
        pieces = np.array(values)[known], np.array(arcs)[known]
        found |= {f"{name}_mean": (_mean(*pieces), power), f"{name}_median": (_quantile(*pieces, 0.5), power)}
    return found


def fractal_dimensions(mask: np.ndarray) -> Found:
    """`fractal_d0`, `_d1`, `_d2`: box counting, information and correlation dimension of `mask` (H, W) bool.

    Slopes over the logarithm of the boxes' side, from `box_min_px` to `box_max_px` (Stosic and Stosic 2006); `fractal_r2`: the
    least R2 of the three fits. They change with resolution and calibre: compare images of one kind only.
    """
    names = ("fractal_d0", "fractal_d1", "fractal_d2", "fractal_r2", "box_min_px", "box_max_px")
    top, left, bottom, right = fov_box(mask)
    mask = mask[top:bottom, left:right]
    longest = max(mask.shape)
    counts = PARTS[longest >= 2 * PARTS]
    if len(counts) < 4 or not mask.any():
        return dict.fromkeys(names, (math.nan, 0))
    total, moments = cv2.integral(np.ascontiguousarray(mask).view(np.uint8)), []
    for count in counts:  # boxes of whole pixels that fill the mask's own box
        rows, columns = (
            np.linspace(0, n, max(1, round(count * n / longest)) + 1).round().astype(int) for n in mask.shape
        )
        pixels = np.diff(np.diff(total[np.ix_(rows, columns)], axis=0), axis=1)
        share = pixels[pixels > 0] / total[-1, -1]
        moments.append((math.log(len(share)), -(share @ np.log(share)), -math.log(share @ share)))
    slopes = np.polyfit(np.log(counts), moments, 1)[0]
    r2 = np.corrcoef(np.log(counts), moments, rowvar=False)[0, 1:] ** 2
    values = (*slopes, r2.min(), longest / counts[-1], longest / counts[0])
    return {name: (value, 0) for name, value in zip(names, values, strict=True)}


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(values @ weights / weights.sum()) if len(values) else math.nan


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The weighted quantile of `values` (n,), interpolated; NaN of none."""
    if not len(values):
        return math.nan
    order = values.argsort(kind="stable")
    total = weights[order].cumsum()
    return float(np.interp(share * total[-1], total - weights[order] / 2, values[order]))
