"""The centrelines of a vessel mask: its skeleton as a graph, without spurs, and what is measured along every segment.

A segment runs from a branch point or end to the next. Lengths are in pixels, coordinates are y, x.
"""

from typing import NamedTuple

import cv2
import numpy as np
from scipy.ndimage import gaussian_filter1d, map_coordinates
from skimage.morphology import skeletonize

SMOOTHING = 2.0  # pixels, standard deviation: less leaves the pixels' stairs in a length, more cuts corners
BEND_SHARE, BEND_LEAST = 0.01, 6.0  # of the field's diameter, and pixels: smoothing before curvature is taken
SHORT = 4.0  # pixels: shorter spurs, and shorter links between branch points, mean nothing on a vessel of any calibre
EDGE = 0.4  # pixels from a mask's edge to the middle of the next pixel: 0.5 where it is upright, less where oblique
Graph = dict[int, list[int]]  # skeleton pixel -> its neighbours; flat indices


class Centrelines(NamedTuple):
    """The points of all segments, n, one segment after the other; b branch points; e free ends."""

    points: np.ndarray  # (n, 2) float, smoothed
    segment: np.ndarray  # (n,) int: the number of a point's segment
    length: np.ndarray  # (n,) float: a point's share of the length
    calibre: np.ndarray  # (n,) float; NaN within a radius of the segment's ends
    curvature: np.ndarray  # (n,) float, 1 / radius; NaN beside the segment's ends
    branches: np.ndarray  # (b, 2) float
    ends: np.ndarray  # (e, 2) float


def centrelines(vessels: np.ndarray, fov: np.ndarray, diameter: float) -> Centrelines:
    """The centrelines of `vessels` in the field of view `fov`, (H, W) bool both, of this diameter in pixels."""
    vessels, outside = np.pad(vessels, 1), np.pad(~fov, 1, constant_values=True)
    # outside the field nothing is known, so its rim is no vessel's edge
    distance = cv2.distanceTransform((vessels | outside).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    graph = _graph(_skeleton(vessels, distance))
    radii = distance.ravel() - 0.5
    paths = _prune(graph, radii)
    branches = _branches(graph, paths, radii, distance.shape)
    chains, end_radii, ends = [], [], [np.empty((0, 2))]
    for path in paths:
        chain = np.stack(np.divmod(path, distance.shape[1]), axis=1).astype(float)
        radius = radii[path]
        for end in (path[0], path[-1]):
            if len(graph[end]) == 1:
                chain, radius = _to_edge(chain, radius)
                ends.append(chain[:1])
            chain, radius = chain[::-1], radius[::-1]
        chains.append(chain)
        end_radii.append((radius[0], radius[-1]))
    bend = max(BEND_LEAST, BEND_SHARE * diameter)
    points, *along = _along(chains, np.reshape(end_radii, (-1, 2)), distance, bend)
    return Centrelines._make([points - 1, *along, branches - 1, np.concatenate(ends) - 1])


def at_points(mask: np.ndarray, points: np.ndarray) -> np.ndarray:
    """`mask` (H, W) at the pixels nearest to `points` (n, 2)."""
    y, x = np.rint(points).astype(int).T
    return mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]


def _skeleton(vessels: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """The skeleton by Zhang and Suen (1984), who lose some diagonal lines from free ends on; then by Lee et al. (1994)."""
    skeleton = skeletonize(vessels)
    away = cv2.distanceTransform((~skeleton).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)
    lost = away[vessels].max(initial=0) > 3 * distance[vessels].max(initial=0) + SHORT
    return skeletonize(vessels, method="lee").astype(bool) if lost else skeleton


def _graph(skeleton: np.ndarray) -> Graph:
    """The graph of `skeleton` (H, W) bool, False along the frame. Diagonal neighbours are linked where no pixel joins both."""
    width, lit = skeleton.shape[1], skeleton.ravel()
    pixels = np.flatnonzero(lit)
    graph: Graph = {pixel: [] for pixel in pixels.tolist()}
    for step, sides in ((1, ()), (width, ()), (width + 1, (1, width)), (width - 1, (-1, width))):
        linked = lit[pixels + step]
        for side in sides:
            linked &= ~lit[pixels + side]
        for pixel in pixels[linked].tolist():
            graph[pixel].append(pixel + step)
            graph[pixel + step].append(pixel)
    return graph


def _paths(graph: Graph) -> list[list[int]]:
    """The pixels of every segment in order, with the branch pixels at its ends; a ring begins and ends at one pixel."""
    inner = {pixel for pixel, near in graph.items() if len(near) == 2}  # not walked yet

    def walk(first: int, second: int) -> list[int]:
        path = [first, second]
        while path[-1] in inner:
            inner.remove(path[-1])
            one, other = graph[path[-1]]
            path.append(other if one == path[-2] else one)
        return path

    paths = []
    for node in [pixel for pixel, near in graph.items() if len(near) != 2]:
        for pixel in graph[node]:
            if pixel in inner or (len(graph[pixel]) != 2 and node < pixel):
                paths.append(walk(node, pixel))
    while inner:
        ring = inner.pop()
        paths.append(walk(ring, graph[ring][0]))
    return paths


def _prune(graph: Graph, radius: np.ndarray) -> list[list[int]]:
    """Remove from `graph` specks, and spurs that stand out of a vessel by less than its radius. Returns the other paths."""
    while True:
        paths = _paths(graph)
        spurs = [path for path in paths if _is_spur(path, graph, radius)]
        if not spurs:
            return paths
        for pixel in [pixel for path in spurs for pixel in path if len(graph[pixel]) <= 2]:
            for neighbour in graph.pop(pixel, ()):
                graph[neighbour].remove(pixel)


def _is_spur(path: list[int], graph: Graph, radius: np.ndarray) -> bool:
    free = [end for end in (path[0], path[-1]) if len(graph[end]) == 1]
    stems = [end for end in (path[0], path[-1]) if len(graph[end]) > 1] or free
    return bool(free) and len(path) - 1 + min(radius[free]) < max(2 * max(radius[stems]), SHORT)


def _branches(graph: Graph, paths: list[list[int]], radius: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The branch points (b, 2): where three segments or more meet. Those within a radius, or `SHORT`, are one."""
    joined = np.zeros(shape, np.uint8)
    branching = [pixel for pixel, near in graph.items() if len(near) > 2]
    joined.ravel()[branching] = 1
    arms = []
    for path in paths:
        nodes = [pixel for pixel in (path[0], path[-1]) if len(graph[pixel]) > 2]
        if len(nodes) == 2 and len(path) <= 1 + max(SHORT, *radius[nodes]):
            joined.ravel()[path] = 1
        else:
            arms += nodes
    count, groups = cv2.connectedComponents(joined)
    number = np.bincount(groups.ravel()[arms], minlength=count)
    group = groups.ravel()[branching]
    where = np.stack(np.divmod(branching, shape[1]), axis=1)
    return np.reshape([where[group == one].mean(axis=0) for one in range(1, count) if number[one] > 2], (-1, 2))


def _to_edge(chain: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points `chain` (n, 2) of a segment and its `radius` (n,), led from its free first end to the edge of the mask.

    A skeleton leaves the middle of the vessel beside an end, where its distance to the edge falls: this part is dropped.
    """
    near = radius[: 2 + int(2 * np.median(radius))]
    start = min(int(np.argmax(near >= near.max() - 0.75)), len(chain) - 2)
    chain, radius = chain[start:], radius[start:]
    heading = chain[0] - chain[min(len(chain) - 1, 5 + int(radius[0]))]
    steps = np.arange(radius[0], 0, -1)[:, None]
    onward = chain[0] + steps * heading / np.hypot(*heading)
    return np.concatenate([onward, chain]), np.append(np.full(len(steps), radius[0]), radius)


def _along(chains: list[np.ndarray], radii: np.ndarray, distance: np.ndarray, bend: float) -> tuple[np.ndarray, ...]:
    """The first five of `Centrelines`. `radii` (segments, 2): at their ends. `bend`: the smoothing before curvature, pixels."""
    if not chains:
        return np.empty((0, 2)), np.empty(0, int), *np.empty((3, 0))
    margin = int(3 * bend) + 2  # mirrored through its ends a segment is smoothed without moving these
    raw = np.concatenate([np.pad(c, ((margin, margin), (0, 0)), "reflect", reflect_type="odd") for c in chains])
    inside = np.concatenate([np.pad(np.ones(len(chain), bool), margin) for chain in chains])
    smooth, bent = (gaussian_filter1d(raw, sigma, axis=0, truncate=3) for sigma in (SMOOTHING, bend))
    points, tangent, velocity = smooth[inside], np.gradient(smooth, axis=0)[inside], np.gradient(bent, axis=0)
    turning = np.gradient(np.unwrap(np.arctan2(*velocity.T)))
    curvature = (turning / np.maximum(np.hypot(*velocity.T), 1e-9))[inside]

    segment = np.repeat(np.arange(len(chains)), [len(chain) for chain in chains])
    step = np.hypot(*np.diff(points, axis=0, prepend=points[:1]).T)
    step[np.diff(segment, prepend=-1) > 0] = 0  # from one segment to the next
    length = (step + np.append(step[1:], 0)) / 2
    whole = np.bincount(segment, step)
    after = np.cumsum(step) - (np.cumsum(whole) - whole)[segment]  # length from the segment's first point
    before = whole[segment] - after

    normal = tangent[:, ::-1] * [1, -1] / np.maximum(np.hypot(*tangent.T), 1e-9)[:, None]
    # from a pixel beside the centreline to the edge on that side: right also where the calibre is even
    sides = [map_coordinates(distance, (points + side * normal).T, order=1) + 1 - EDGE for side in (1, -1)]
    near_end = np.minimum(after - radii[segment, 0], before - radii[segment, 1]) < 1
    calibre = np.where(near_end, np.nan, sides[0] + sides[1])
    curvature[np.minimum(after, before) < bend] = np.nan
    return points, segment, length, calibre, curvature
