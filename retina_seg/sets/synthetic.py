"""Synthetic fundus images with the exact vessel mask, where no real dataset is at hand. Not medical data.

`_Eye` lays out the anatomy. `_grow_vessels` lets arteries and veins grow from the optic disc as trees by Murray's law.
Then retina, vessels and camera are rendered. Geometry is in units of the field's radius, origin at its centre,
x right, y down; so a seed is the same eye at every size of one shape.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from retina_seg.images import jpeg, list_images, write_image
from retina_seg.sets import atomic_folder
from retina_seg.sets.files import Data, find_set
from retina_seg.utils import UserError, create_dir, user_path, write_csv

SYNTHETIC_SET = Path("results/synthetic-data")
MIN_SIZE, MAX_SIZE = 64, 8192  # px; below not even the main arcades fit, above the memory may not
TEST_SEEDS = 500_000  # each set has a million seeds; those of its test images start here

STEP = 0.012  # length of one step of a growing vessel
THINNEST = 0.0026  # radius at which a vessel ends: 1.3 px wide in a 512 px image
THINNEST_LINE = 1.25  # px; a thinner line falls to pieces
CELL, MAP_HALF = 0.02, 1.12  # the density map: side of a cell; it covers [-MAP_HALF, MAP_HALF] both ways

# What blood absorbs of red, green and blue where a vessel is opaque; haemoglobin absorbs green most.
ARTERY_ABSORBS = np.array([0.3, 1.0, 0.85], np.float32)
VEIN_ABSORBS = np.array([0.48, 1.0, 0.75], np.float32)
Tree = list[tuple[bool, float, np.ndarray]]  # vessels: is it an artery, contrast, (n, 3) points x, y, radius


@dataclass(frozen=True)
class SyntheticImage:
    """A synthetic fundus image and its ground truth."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    mask: np.ndarray  # (H, W) uint8, 255 where vessels cover half of a pixel or more inside `fov`, else 0
    fov: np.ndarray  # (H, W) uint8, 255 inside the camera's field of view, else 0


def synthetic_image(seed: int, height: int = 512, width: int = 512) -> SyntheticImage:
    """The fundus image of `seed` (0 or more), `height` x `width` pixels (each 64 to 8192); each seed is another eye.

    The same to the byte on every call with the same NumPy and OpenCV. Raises `UserError`: a seed or size out of range.
    """
    if seed < 0 or not MIN_SIZE <= min(height, width) <= max(height, width) <= MAX_SIZE:
        needed = f"the seed must be 0 or more, each side {MIN_SIZE} to {MAX_SIZE} pixels"
        raise UserError(f"--seed {seed} --size {height}x{width}: {needed}")
    shape = height, width
    # One random stream a stage: a change to the colours leaves every mask as it was.
    plan, growth, paint, camera = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(4))
    eye = _Eye(plan, shape)
    # Column and row coordinates in field radii: (1, W) and (H, 1) float32, they broadcast to the image.
    x = ((np.arange(shape[1], dtype=np.float32) - eye.centre[0]) / eye.radius)[None, :]
    y = ((np.arange(shape[0], dtype=np.float32) - eye.centre[1]) / eye.radius)[:, None]
    fov = (x**2 + y**2 <= 1) & (np.abs(y) <= eye.cut)
    if eye.notch and abs(eye.notch[1]) < eye.cut - eye.notch[2]:
        fov |= (x - eye.notch[0]) ** 2 + (y - eye.notch[1]) ** 2 <= eye.notch[2] ** 2
    coverage, arteries, veins = _render_vessels(_grow_vessels(growth, eye), eye, shape)
    colour = _paint_retina(paint, eye, x, y)
    colour *= (1 - arteries[..., None] * ARTERY_ABSORBS) * (1 - veins[..., None] * VEIN_ABSORBS)
    mask = (coverage >= 0.5) & fov
    return SyntheticImage(_expose(camera, eye, colour, fov), mask.astype(np.uint8) * 255, fov.astype(np.uint8) * 255)


def write_set(
    destination: str | Path,
    train: int = 12,
    test: int = 4,
    size: tuple[int, int] = (512, 512),
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a synthetic dataset of `train` and `test` images in the Data1 layout to `destination`, which is returned.

    No image is in both parts, nor in a set of another `seed`. `size` is (height, width). Whole or not at all.

    Raises `UserError`: `destination` is a file or not empty, or cannot be written; a count, size or seed out of range.
    """
    if min(seed, train, test) < 0 or max(train, test) > TEST_SEEDS:
        raise UserError(f"--seed {seed}, --train {train}, --test {test}: from 0 on, images {TEST_SEEDS} at most")
    first = seed * 2 * TEST_SEEDS
    jobs = [("train", i, first + i) for i in range(train)] + [("test", i, first + TEST_SEEDS + i) for i in range(test)]
    rows = []
    with atomic_folder(destination := user_path(destination)) as folder:
        for part, i, image_seed in tqdm(jobs, desc="synthetic images", unit="image", disable=not progress):
            for kind, pixels in vars(synthetic_image(image_seed, *size)).items():
                write_image(create_dir(folder / part / kind) / f"{i}.png", pixels)
            rows.append({"part": part, "name": i, "photo": i, "variant": 0, "source": f"synthetic seed {image_seed}"})
        write_csv(folder / "photos.csv", ("part", "name", "photo", "variant", "source"), rows)
    return destination


def data_or_synthetic(
    data: Data, fallback: str | Path = SYNTHETIC_SET, progress: bool = True, **size: Any
) -> tuple[Path | dict[str, str], bool]:
    """(`find_set(data)`, False), or (`fallback`, True) where `data` holds no image: a synthetic set, written there if need be.

    `size`: other arguments of `write_set`.

    Raises `UserError`: `data` holds images, but not in the layout; `fallback` holds something else or cannot be written.
    """
    fallback = user_path(fallback)
    folders = [] if isinstance(data, dict) else [user_path(data), *user_path(data).rglob("*/")]
    if not folders or folders[0].is_file() or any(list_images(folder) for folder in folders if folder.is_dir()):
        return find_set(data), False
    if not (fallback / "photos.csv").is_file():
        write_set(fallback, progress=progress, **size)
    return find_set(fallback), True


class _Eye:
    """Where things lie. Points are (x, y) in field radii; `radius` and `centre` are in pixels."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int]) -> None:
        self.cut = rng.uniform(0.78, 0.92) if rng.random() < 0.3 else 1.0  # the field is flat at this |y|; 1: round
        angle = math.radians(rng.uniform(-50, -25))
        # x, y, radius of the camera's index mark
        self.notch = (math.cos(angle), math.sin(angle), rng.uniform(0.035, 0.05)) if rng.random() < 0.5 else None
        self.temporal = int(rng.choice([-1, 1]))  # 1: the macula lies right of the disc
        self.disc_radius = rng.uniform(0.135, 0.165)
        self.disc = (-self.temporal * rng.uniform(0.42, 0.78), rng.uniform(-0.1, 0.06))
        distance = 5 * self.disc_radius * rng.uniform(0.95, 1.1)  # 2.5 disc diameters
        self.fovea = (self.disc[0] + self.temporal * distance, self.disc[1] + rng.uniform(0.03, 0.12))
        self.tilt = rng.uniform(-0.12, 0.12)  # radians
        self.radius = min(0.48 * shape[1], 0.48 * shape[0] / self.cut)
        self.centre = ((shape[1] - 1) / 2, (shape[0] - 1) / 2)

    def place(self, outward: float, up: float) -> tuple[float, float]:
        """The point `outward` (temporal) and `up` of the disc, both in disc-fovea distances."""
        unit = math.dist(self.disc, self.fovea)
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        dx, dy = self.temporal * outward * unit, -up * unit
        return self.disc[0] + cos * dx - sin * dy, self.disc[1] + sin * dx + cos * dy


@dataclass
class _Tip:
    """The growing end of a vessel at (x, y), towards `heading` (radians); `course` lists the points it is to pass."""

    artery: bool
    x: float
    y: float
    heading: float
    radius: float
    course: list[tuple[float, float]] = field(default_factory=list)


class _DensityMap:
    """Where vessels of each kind already run, 0 (free) to 1; what grows bends away from its own kind."""

    def __init__(self, eye: _Eye) -> None:
        axis = np.arange(int(2 * MAP_HALF / CELL) + 1) * CELL - MAP_HALF
        from_fovea = (axis[None, :] - eye.fovea[0]) ** 2 + (axis[:, None] - eye.fovea[1]) ** 2
        self.maps = [0.9 * np.exp(-from_fovea / (2 * 0.09**2)) for _ in range(2)]  # no vessels grow in the fovea
        offset = np.arange(-4, 5)
        self.stamp = np.exp(-(offset[None, :] ** 2 + offset[:, None] ** 2) / (2 * 1.6**2))

    def mark(self, artery: bool, x: float, y: float) -> None:
        i, j = round((y + MAP_HALF) / CELL), round((x + MAP_HALF) / CELL)
        around = self.maps[artery][i - 4 : i + 5, j - 4 : j + 5]
        np.maximum(around, self.stamp, out=around)

    def ahead(self, tip: _Tip, turn: float, far: float) -> float:
        """The density for the vessel of `tip` at `far` ahead of it, `turn` radians aside."""
        x, y = tip.x + far * math.cos(tip.heading + turn), tip.y + far * math.sin(tip.heading + turn)
        last = len(self.maps[0]) - 1
        i, j = (min(max(round((v + MAP_HALF) / CELL), 0), last) for v in (y, x))
        # Arteries and veins do cross, so the other kind counts less.
        return float(self.maps[tip.artery][i, j] + 0.4 * self.maps[not tip.artery][i, j])


def _trunks(rng: np.random.Generator, eye: _Eye) -> Iterator[_Tip]:
    """What leaves the disc: an artery and a vein for each of the four arcades, and small vessels in between."""
    temporal = np.array([(0.06, 0.28), (0.34, 0.6), (0.8, 0.76), (1.3, 0.68), (1.75, 0.5)])
    nasal = np.array([(-0.16, 0.3), (-0.42, 0.65), (-0.65, 1.05), (-0.8, 1.5)])
    x0, y0 = eye.place(-0.03, 0)
    for up in (1, -1):
        for arcade, thick, outward in ((temporal, 0.0145, 1), (nasal, 0.0095, -1)):
            for artery in (True, False):
                course = arcade * [1, up * rng.uniform(0.82, 1.18)]
                course += rng.normal([0, 0.05 * up if artery else -0.03 * up], 0.05, arcade.shape)
                radius = thick * rng.uniform(0.88, 1.12) * (0.8 if artery else 1.0)
                x, y = rng.normal([x0, y0], 0.022).tolist()
                heading = math.atan2(-up, 0.3 * eye.temporal * outward) + rng.normal(0, 0.15)
                yield _Tip(artery, x, y, heading, radius, [eye.place(*point) for point in course.tolist()])
    for outward in (1, 1, 1, -1, -1):
        heading = (0 if outward == eye.temporal else math.pi) + rng.uniform(-1, 1)
        yield _Tip(bool(rng.random() < 0.5), x0, y0, heading, rng.uniform(0.0045, 0.007))


def _grow_vessels(rng: np.random.Generator, eye: _Eye) -> Tree:
    """Grow both trees, thick vessels first, until they cover this eye's share of the field."""
    thickness = attrgetter("radius")
    density, tips, tree = _DensityMap(eye), sorted(_trunks(rng, eye), key=thickness), []
    uncovered = 2 * (math.asin(eye.cut) + eye.cut * math.sqrt(1 - eye.cut**2)) * rng.uniform(0.098, 0.124)
    while tips and uncovered > 0:
        tip = tips.pop()
        points, twigs = _grow_one(rng, eye, density, tip)
        for twig in twigs:
            insort(tips, twig, key=thickness)
        tree.append((tip.artery, rng.uniform(0.75, 1.15), points))
        uncovered -= 2 * STEP * float(points[np.abs(points[:, 1]) < eye.cut, 2].sum())
    return tree


def _grow_one(rng: np.random.Generator, eye: _Eye, density: _DensityMap, tip: _Tip) -> tuple[np.ndarray, list[_Tip]]:
    """Grow one vessel to its end; returns its points, (n, 3) x, y, radius, and the tips of its side branches."""
    points, twigs = [(tip.x, tip.y, tip.radius)], []
    first_heading, bend, next_twig = tip.heading, 0.0, rng.uniform(0.06, 0.16)
    wander = rng.uniform(9.0, 20.0)
    for step in range(1, 400):
        # Curvature is a mean-reverting walk: the vessel winds, and smoothly.
        bend += -bend * 14 * STEP + wander * math.sqrt(STEP) * rng.standard_normal()
        if tip.course:
            x, y = tip.course[0]
            steer = 7 * math.remainder(math.atan2(y - tip.y, x - tip.x) - tip.heading, 2 * math.pi)
            if math.dist((tip.x, tip.y), (x, y)) < 0.13:
                del tip.course[0]
        else:
            left, right = (density.ahead(tip, turn, 0.08) for turn in (-0.6, 0.6))
            steer = 13 * (left - right) + 3 * math.sin(first_heading - tip.heading)  # so that none runs in circles
        tip.heading += (bend + steer) * STEP
        tip.x, tip.y = tip.x + STEP * math.cos(tip.heading), tip.y + STEP * math.sin(tip.heading)
        tip.radius -= (0.0015 if tip.course else 0.0035) * STEP
        points.append((tip.x, tip.y, tip.radius))
        from_disc = math.dist((tip.x, tip.y), eye.disc) / eye.disc_radius
        blocked = step > 8 and not tip.course and from_disc > 1.6 and density.ahead(tip, 0, 0.05) > 0.75
        if blocked or tip.radius < THINNEST or math.hypot(tip.x, tip.y) > 1.03:
            break
        next_twig -= STEP
        if next_twig < 0 and from_disc > 1.7:
            next_twig = rng.exponential(0.07 if tip.course else 0.055) + (0.05 if tip.course else 0.035)
            # An arcade keeps its calibre: twigs, and now and then a large branch. Thinner vessels divide more evenly.
            shares = ((0.2, 0.4) if rng.random() < 0.5 else (0.45, 0.7)) if tip.course else (0.4, 0.8)
            thin = tip.radius * rng.uniform(*shares)
            if thin > THINNEST:
                twigs.append(_branch(rng, density, tip, thin))
    for x, y, _ in points:
        density.mark(tip.artery, x, y)
    return np.array(points), twigs


def _branch(rng: np.random.Generator, density: _DensityMap, tip: _Tip, r2: float) -> _Tip:
    """Split a twig of radius `r2` off `tip`, to the freer side; `tip` goes on thinner and turned the other way.

    By Murray's law r0^3 = r1^3 + r2^3, at his angles of least work.
    """
    r0 = tip.radius
    r1 = (r0**3 - r2**3) ** (1 / 3)
    away = math.acos(min(1, (r0**4 + r2**4 - r1**4) / (2 * r0**2 * r2**2)))
    aside = math.acos(min(1, (r0**4 + r1**4 - r2**4) / (2 * r0**2 * r1**2)))
    left, right = (density.ahead(tip, turn, 0.12) for turn in (-away, away))
    side = -1 if left + rng.normal(0, 0.3) < right else 1
    twig = _Tip(tip.artery, tip.x, tip.y, tip.heading + side * (0.85 * away + rng.normal(0, 0.12)), r2)
    tip.heading, tip.radius = tip.heading - side * 0.8 * aside, r1
    return twig


def _render_vessels(tree: Tree, eye: _Eye, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Three layers (H, W) float32 in [0, 1]: coverage by vessels, opacity of arteries and of veins."""
    fine = 4 if max(shape) <= 1024 else 2
    covered, arteries, veins = (np.zeros((shape[0] * fine, shape[1] * fine), np.uint8) for _ in range(3))
    segments = []
    for artery, contrast, points in tree:
        # The pixel's centre is at (fine - 1) / 2 of its fine pixels; OpenCV takes 4 bits of fraction.
        ends = np.rint(((points[:, :2] * eye.radius + eye.centre) * fine + (fine - 1) / 2) * 16).astype(int).tolist()
        calibres = (2 * eye.radius * points[1:, 2]).tolist()
        segments += [(c, artery, contrast, *line) for c, *line in zip(calibres, ends, ends[1:], strict=False)]
    segments.sort(key=lambda s: s[0])  # thick ones last, on top
    # In a small image the lines are wider than the vessels; the thinnest are left out until the covered share is right.
    calibres = np.array([s[0] for s in segments])
    left_out = np.cumsum(np.maximum(calibres, THINNEST_LINE)[::-1])[::-1] > calibres.sum()
    for calibre, artery, contrast, start, end in segments[int(left_out.sum()) :]:
        thickness = round(max(calibre, THINNEST_LINE) * fine)
        strength = contrast * (0.085 + 0.27 * min(1.0, calibre / (0.026 * eye.radius)) ** 0.8)
        cv2.line(covered, start, end, 255, thickness, cv2.LINE_8, 4)
        cv2.line(arteries if artery else veins, start, end, round(255 * strength), thickness, cv2.LINE_8, 4)
    layers = (cv2.resize(c, shape[::-1], interpolation=cv2.INTER_AREA) for c in (covered, arteries, veins))
    return tuple(layer.astype(np.float32) / 255 for layer in layers)


def _paint_retina(rng: np.random.Generator, eye: _Eye, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The fundus without vessels, (H, W, 3) float32, about [0, 1]."""
    shape = y.shape[0], x.shape[1]

    def noise(scale: float) -> np.ndarray:
        """A smooth random field of mean 0 and standard deviation 1, with bumps of `scale` field radii."""
        size = [math.ceil(2.5 * n / (scale * eye.radius)) + 6 for n in shape]
        lattice = cv2.GaussianBlur(rng.standard_normal(size, dtype=np.float32), (0, 0), 1.25)
        return cv2.resize((lattice - lattice.mean()) / lattice.std(), shape[::-1], interpolation=cv2.INTER_CUBIC)

    def from_point(point: Sequence[float]) -> np.ndarray:
        return np.hypot(x - point[0], y - point[1])

    def step(distance: np.ndarray, width: float) -> np.ndarray:
        """From 1 inside of distance 1 to 0 outside."""
        return 0.5 * (1 - np.tanh((distance - 1) / width))

    light = 1.08 - rng.uniform(0.15, 0.4) * from_point(rng.uniform(-0.35, 0.35, 2)) ** 2 + 0.07 * noise(0.9)
    pigment = 0.03 * noise(0.3) + 0.024 * noise(0.1) + 0.024 * noise(0.035)
    stripes = np.exp(-((noise(0.16) / 0.4) ** 2)) - 0.4  # vessels of the choroid
    fovea = from_point(eye.fovea)
    macula = rng.uniform(0.12, 0.24) * np.exp(-((fovea / 0.28) ** 2)) + rng.uniform(0.08, 0.2) * np.exp(
        -((fovea / 0.085) ** 2)
    )
    shade = pigment + rng.uniform(0.03, 0.12) * stripes - macula
    tint = np.cumprod(rng.uniform([0.56, 0.46, 0.42], [0.8, 0.58, 0.66]))
    colour = tint * (1 + shade[..., None] * (0.6, 1.0, 0.9))
    pale = rng.uniform([0.88, 0.54, 0.26], [1.0, 0.66, 0.36])
    # the optic disc, a pale oval with a soft edge, and its cup, which is paler still
    from_disc = from_point(eye.disc) / eye.disc_radius
    cup = step(from_disc / rng.uniform(0.35, 0.6), 0.16)[..., None] * (0.05, 0.2, 0.17)
    colour += step(from_disc, rng.uniform(0.06, 0.12))[..., None] * (0.95 * pale + cup - colour)
    return (colour * light[..., None]).astype(np.float32)


def _expose(rng: np.random.Generator, eye: _Eye, colour: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """What the camera makes of the fundus: cast, black surround, blur, noise, JPEG; returns (H, W, 3) uint8 RGB."""
    cast = rng.uniform(0.86, 1.14) * rng.uniform([0.96, 0.95, 0.9], [1.04, 1.04, 1.1])
    seen = np.where(fov[..., None], colour * cast, rng.uniform(0.008, 0.03, 3)).astype(np.float32)
    blur = rng.uniform(0.5, 0.9) * eye.radius / 245  # 245 px is the field's radius in a 512 px image
    seen = cv2.GaussianBlur(seen, (0, 0), max(0.35, blur))
    # Shot noise grows with the light; it is smeared over neighbours, as demosaicing does.
    noise = cv2.GaussianBlur(rng.standard_normal(seen.shape, dtype=np.float32), (0, 0), 0.5)
    seen += noise * rng.uniform(0.025, 0.045) * np.sqrt(np.clip(seen, 0, 1) + 0.01)
    return jpeg(np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8), int(rng.integers(82, 97)))
