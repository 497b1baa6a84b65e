"""Measures of the vessels in a mask, inside the field of view. Undefined is None, never 0.

Definitions, sources and weaknesses stand with the functions: `_area_and_length`, `_calibre`, `_points`, `_tortuosity`,
`fractal_dimensions`. Centrelines are the smoothed skeleton without spurs; segments lie between branch points and ends.

The end of a name is its unit. Lengths: `_px`, pixels; `_pct`, per cent of the field of view's diameter; `_um`, micrometres,
with a pixel size. Densities: `_per_px`, `_per_fov` (the diameter is the unit), `_per_mm`; of points, and squared curvature,
`_per_px2` …. `area_pct` is per cent of the region; tortuosity and the fractal dimensions have no unit.

Regions: the whole field; its quadrants by the middle of its box, `top_left_` …; with the optic disc `zone_b_` and `zone_c_`,
0.5 to 1 and 0.5 to 2 disc diameters from its margin (Knudtson et al. 2003, Cheung et al. 2010). A zone may lie partly outside
the field, `zone_c_inside_pct`, and then says little.
"""

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
Found = dict[str, float]  # in pixels; NaN where undefined
Regions = dict[str, tuple[np.ndarray, float | None]]  # see `_regions`


def measure(
    vessels: np.ndarray,
    fov: np.ndarray,
    pixel_size: float | None = None,
    disc: Sequence[float] | None = None,
    quadrants: bool = True,
) -> dict[str, float | None]:
    """The measures of a mask by name, in the whole field of view, its quadrants, and zones B and C around the optic disc.

    Args:
        vessels, fov: (H, W) bool.
        pixel_size: micrometres a pixel.
        disc: the optic disc's centre x, y and diameter in pixels; adds the zones.
        quadrants: False leaves these out.

    A mirrored mask, or one rotated by 90 degrees, gives the same. In a field that is empty, or vessel all over, all are None.

    Raises `ValueError`: arrays of another shape or dtype; a pixel size or disc that is not finite and positive.
    """
    if vessels.ndim != 2 or vessels.shape != fov.shape or vessels.dtype != bool or fov.dtype != bool:
        raise ValueError(f"vessels, fov must be bool (H, W): {vessels.dtype} {vessels.shape}, {fov.dtype} {fov.shape}")
    numbers = [1 if pixel_size is None else pixel_size, *((0, 0, 1) if disc is None else disc)]
    if not (np.isfinite(numbers).all() and numbers[0] > 0 and numbers[-1] > 0):
        raise ValueError(f"pixel size {pixel_size}, disc {disc}: must be finite, size and diameter above 0")
    fov = fov & (not vessels[fov].all())
    diameter = fov_diameter(fov) if fov.any() else math.nan
    top, left, bottom, right = fov_box(fov)
    fov = fov[top:bottom, left:right]
    vessels = vessels[top:bottom, left:right] & fov
    regions = _regions(fov, quadrants, None if disc is None else (disc[0] - left, disc[1] - top, disc[2]))
    turns, step = _orientation(vessels)
    vessels = np.ascontiguousarray(np.rot90(vessels[:, ::step], turns))
    lines = centrelines(vessels, np.rot90(fov[:, ::step], turns), diameter)
    values = {"fov_diameter_px": diameter}
    for prefix, (region, whole) in regions.items():
        if whole is not None:
            values[f"{prefix}inside_pct"] = 100 * np.count_nonzero(region) / whole + 0 * diameter
        region = np.rot90(region[:, ::step], turns)
        found = _area_and_length(vessels, region, lines) | _calibre(region, lines) | _points(region, lines)
        found |= _tortuosity(region, lines, SHORTEST * diameter) | fractal_dimensions(vessels & region)
        values |= {prefix + name: value for name, value in _in_units(found, diameter, pixel_size).items()}
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}


def _regions(fov: np.ndarray, quadrants: bool, disc: Sequence[float] | None) -> Regions:
    """Prefix of a name -> a part of `fov` (H, W) bool; and of a zone its whole area, in pixels."""
    regions: Regions = {"": (fov, None)}
    height, width = fov.shape
    y, x = np.ogrid[:height, :width]
    if quadrants:  # a line in the middle belongs to both sides
        rows = {"top": 2 * y < height, "bottom": 2 * y >= height - 1}
        columns = {"left": 2 * x < width, "right": 2 * x >= width - 1}
        regions |= {f"{row}_{column}_": (fov & rows[row] & columns[column], None) for row in rows for column in columns}
    if disc is not None:
        away = np.hypot(y - disc[1], x - disc[0]) / disc[2]
        for name, (near, far) in ZONES.items():
            regions[name] = fov & (away >= near) & (away <= far), math.pi * (far**2 - near**2) * disc[2] ** 2
    return regions


def _orientation(vessels: np.ndarray) -> tuple[int, int]:
    """Quarter turns and step (-1: mirrored) before `vessels` is measured: a skeleton differs between the eight ways."""
    ways = itertools.product(range(4), (1, -1))
    return min(ways, key=lambda way: np.packbits(np.rot90(vessels[:, :: way[1]], way[0])).tobytes())


def _in_units(found: Found, diameter: float, pixel_size: float | None) -> Found:
    """Lengths in pixels, and densities by pixels, in the other units too."""
    lengths, densities = {"px": 1.0, "pct": diameter / 100}, {"px": 1.0, "fov": diameter}  # a unit's pixels
    if pixel_size is not None:
        lengths["um"], densities["mm"] = 1 / pixel_size, 1000 / pixel_size
    values: Found = {}
    for name, value in found.items():
        if name.endswith("_per_px2"):
            values |= {f"{name[:-3]}{unit}2": value * pixels**2 for unit, pixels in densities.items()}
        elif name.endswith("_per_px"):
            values |= {name[:-2] + unit: value * pixels for unit, pixels in densities.items()}
        elif name.endswith("_px"):
            values |= {name[:-2] + unit: value / pixels for unit, pixels in lengths.items()}
        else:
            values[name] = value
    return values


def _area_and_length(vessels: np.ndarray, region: np.ndarray, lines: Centrelines) -> Found:
    """`area_pct`: vessel pixels. It follows the threshold of the mask: read it beside the calibre.

    `length`: of the smoothed centrelines, up to the edge of the mask at free ends; `length_density`: over the region's area.
    Thin vessels, found or not, change it most.
    """
    area = np.count_nonzero(region) or math.nan
    length = lines.length[at_points(region, lines.points)].sum() + 0 * area
    share = 100 * np.count_nonzero(vessels & region) / area
    return {"area_pct": share, "length_px": length, "length_density_per_px": length / area}


def _calibre(region: np.ndarray, lines: Centrelines) -> Found:
    """`calibre_*`: from edge to edge, straight across the centreline, weighted by length; quantiles of it.

    Left out within a radius of ends and branch points. It follows the threshold of the mask, and one pixel is a large share
    of a thin vessel: compare calibres of one resolution and one network only.
    """
    kept = at_points(region, lines.points) & np.isfinite(lines.calibre)
    calibre, length = lines.calibre[kept], lines.length[kept]
    shares = {"median": 0.5, "p10": 0.1, "p90": 0.9}
    quantiles = {f"calibre_{name}_px": _quantile(calibre, length, share) for name, share in shares.items()}
    return {"calibre_mean_px": _mean(calibre, length), **quantiles}


def _points(region: np.ndarray, lines: Centrelines) -> Found:
    """`branch_points`: where three segments or more meet, one where several lie within a radius, or 4 pixels.

    `end_points`: free ends, spurs left out. A gap in a mask adds two ends, a hole two branch points; a crossing counts once
    or, oblique, twice.
    """
    area = np.count_nonzero(region) or math.nan
    found: Found = {}
    for name, points in (("branch", lines.branches), ("end", lines.ends)):
        number = np.count_nonzero(at_points(region, points)) + 0 * area
        found |= {f"{name}_points": number, f"{name}_density_per_px2": number / area}
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
    for name, unit, values in (("tortuosity", "", ratios), ("curvature2", "_per_px2", bends)):
        known = np.isfinite(values)
        pieces = np.array(values)[known], np.array(arcs)[known]
        found |= {f"{name}_mean{unit}": _mean(*pieces), f"{name}_median{unit}": _quantile(*pieces, 0.5)}
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
        return dict.fromkeys(names, math.nan)
    total, moments = cv2.integral(np.ascontiguousarray(mask).view(np.uint8)), []
    for count in counts:  # boxes of whole pixels that fill the mask's own box
        edges = [np.linspace(0, n, max(1, round(count * n / longest)) + 1) for n in mask.shape]
        rows, columns = (np.rint(edge).astype(int) for edge in edges)
        pixels = np.diff(np.diff(total[np.ix_(rows, columns)], axis=0), axis=1)
        share = pixels[pixels > 0] / total[-1, -1]
        moments.append((math.log(len(share)), -(share @ np.log(share)), -math.log(share @ share)))
    slopes = np.polyfit(np.log(counts), moments, 1)[0]
    with np.errstate(invalid="ignore"):  # two pixels fill two boxes of any side
        r2 = np.corrcoef(np.log(counts), moments, rowvar=False)[0, 1:] ** 2
    values = (*slopes, r2.min(), longest / counts[-1], longest / counts[0])
    return dict(zip(names, values, strict=True))


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float(values @ weights / weights.sum()) if len(values) else math.nan


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The weighted quantile of `values` (n,), interpolated; NaN of none."""
    if not len(values):
        return math.nan
    order = values.argsort(kind="stable")
    total = weights[order].cumsum()
    return float(np.interp(share * total[-1], total - weights[order] / 2, values[order]))
