"""Synthetic fundus images with the exact vessel mask, where no real dataset is at hand. Not medical data.

`_Eye` lays out the anatomy. `_grow_vessels` lets arteries and veins grow from the optic disc as trees by Murray's law.
Then retina, vessels and camera are rendered. Geometry is in units of the field's radius, origin at its centre,
x right, y down; so a seed is the same eye at every size of one shape.
"""

import cmath
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
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
CELL, MAP_HALF, MAP_SIDE = 0.02, 1.12, 113  # map of vessels: side of a cell, half of the map's, cells on a side

# What blood absorbs of red, green and blue where a vessel is opaque; haemoglobin absorbs green most.
ARTERY_ABSORBS = np.array([0.3, 1.0, 0.85], np.float32)
VEIN_ABSORBS = np.array([0.48, 1.0, 0.75], np.float32)
Tree = list[tuple[bool, float, np.ndarray, np.ndarray]]  # vessels: is it an artery, contrast, points (n,), radii (n,)


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
    if eye.notch and abs(eye.notch.imag) < eye.cut - 0.05:
        fov |= np.hypot(x - eye.notch.real, y - eye.notch.imag) <= 0.045
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
    """Where things lie. Points are x + iy in field radii; `radius` and `centre` are in pixels."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, int]) -> None:
        self.cut = rng.uniform(0.78, 0.92) if rng.random() < 0.3 else 1.0  # the field is flat at this |y|; 1: round
        self.notch = cmath.rect(1, math.radians(rng.uniform(-50, -25))) if rng.random() < 0.5 else None  # of the camera
        self.temporal = int(rng.choice([-1, 1]))  # 1: the macula lies right of the disc
        self.disc_radius = rng.uniform(0.135, 0.165)
        self.disc = complex(-self.temporal * rng.uniform(0.42, 0.78), rng.uniform(-0.1, 0.06))
        distance = 5 * self.disc_radius * rng.uniform(0.95, 1.1)  # 2.5 disc diameters
        self.fovea = self.disc + complex(self.temporal * distance, rng.uniform(0.03, 0.12))
        self.tilt = rng.uniform(-0.12, 0.12)  # radians
        self.radius = min(0.48 * shape[1], 0.48 * shape[0] / self.cut)
        self.centre = ((shape[1] - 1) / 2, (shape[0] - 1) / 2)

    def place(self, outward: float, up: float) -> complex:
        """The point `outward` (temporal) and `up` of the disc, both in disc-fovea distances."""
        return self.disc + cmath.rect(abs(self.fovea - self.disc), self.tilt) * complex(self.temporal * outward, -up)


@dataclass(eq=False)
class _Tip:
    """The growing end of a vessel, towards `heading` (radians); `course` lists the points it is to pass."""

    artery: bool
    at: complex
    heading: float
    radius: float
    course: list[complex] = field(default_factory=list)


def _trunks(rng: np.random.Generator, eye: _Eye) -> Iterator[_Tip]:
    """What leaves the disc: an artery and a vein for each of the four arcades, and small vessels in between."""
    temporal = [(0.06, 0.28), (0.34, 0.6), (0.8, 0.76), (1.3, 0.68), (1.75, 0.5)]
    nasal = [(-0.16, 0.3), (-0.42, 0.65), (-0.65, 1.05), (-0.8, 1.5)]
    start = eye.place(-0.03, 0)
    for up, artery in product((1, -1), (True, False)):
        for arcade, thick, outward in ((temporal, 0.0145, 1), (nasal, 0.0095, -1)):
            stretch, apart = rng.uniform(0.82, 1.18), 0.05 if artery else -0.03
            shifts = rng.normal([0, apart], 0.05, (len(arcade), 2)) + [[x, 0] for x, _ in arcade]
            course = [eye.place(x, up * (stretch * y + dy)) for (x, dy), (_, y) in zip(shifts, arcade, strict=True)]
            radius = thick * rng.uniform(0.88, 1.12) * (0.8 if artery else 1.0)
            heading = math.atan2(-up, 0.3 * eye.temporal * outward) + rng.normal(0, 0.15)
            yield _Tip(artery, start + complex(*rng.normal(0, 0.022, 2)), heading, radius, course)
    for outward in (1, 1, 1, -1, -1):
        heading = (0 if outward == eye.temporal else math.pi) + rng.uniform(-1, 1)
        yield _Tip(bool(rng.random() < 0.5), start, heading, rng.uniform(0.0045, 0.007))


def _cells(points: np.ndarray | complex) -> np.ndarray:
    """The x, y of the cells in the map of vessels that points x + iy, (...) complex, lie in: (..., 2) int."""
    xy = np.stack([np.real(points), np.imag(points)], axis=-1)
    return np.clip(np.rint((xy + MAP_HALF) / CELL), 0, MAP_SIDE - 1).astype(int)


def _grow_vessels(rng: np.random.Generator, eye: _Eye) -> Tree:
    """Grow both trees, thick vessels first, until they cover this eye's share of the field."""
    tips, tree = list(_trunks(rng, eye)), []
    taken = np.zeros((2, MAP_SIDE, MAP_SIDE), np.float32)  # where veins and arteries run, 0 (free) to 1
    for layer in taken:
        cv2.circle(layer, _cells(eye.fovea).tolist(), round(0.12 / CELL), 1.0, -1)  # none grow there
    uncovered = 2 * (math.asin(eye.cut) + eye.cut * math.sqrt(1 - eye.cut**2)) * rng.uniform(0.098, 0.124)
    while tips and uncovered > 0:
        tips.remove(tip := max(tips, key=attrgetter("radius")))
        course, radii = _grow_one(rng, eye, taken, tip, tips)
        line = cv2.polylines(np.zeros_like(taken[0]), [_cells(course)], False, 1.0, 3)
        np.maximum(taken[int(tip.artery)], cv2.GaussianBlur(line, (0, 0), 1.0), out=taken[int(tip.artery)])
        tree.append((tip.artery, rng.uniform(0.75, 1.15), course, radii))
        uncovered -= 2 * STEP * float(radii[np.abs(course.imag) < eye.cut].sum())
    return tree


def _grow_one(
    rng: np.random.Generator, eye: _Eye, taken: np.ndarray, tip: _Tip, tips: list[_Tip]
) -> tuple[np.ndarray, np.ndarray]:
    """Grow one vessel to its end, adding its branches to `tips`; returns its points (n,) complex and radii (n,)."""
    first_heading, bend, next_twig, points = tip.heading, 0.0, rng.uniform(0.06, 0.16), [(tip.at, tip.radius)]

    def ahead(turn: float, far: float) -> float:
        x, y = _cells(tip.at + cmath.rect(far, tip.heading + turn))
        # arteries and veins do cross, so the other kind counts less
        return float(taken[int(tip.artery), y, x] + 0.4 * taken[int(not tip.artery), y, x])

    while tip.radius > THINNEST and abs(tip.at) < 1.03 and len(points) < 400:
        # curvature is a mean-reverting walk: the vessel winds, and smoothly
        bend += -bend * 14 * STEP + 14 * math.sqrt(STEP) * rng.standard_normal()
        if tip.course:
            steer = 7 * math.remainder(cmath.phase(tip.course[0] - tip.at) - tip.heading, 2 * math.pi)
            if abs(tip.course[0] - tip.at) < 0.13:
                del tip.course[0]
        else:  # away from others, and not in circles
            steer = 13 * (ahead(-0.6, 0.08) - ahead(0.6, 0.08)) + 3 * math.sin(first_heading - tip.heading)
        tip.heading += (bend + steer) * STEP
        tip.at += cmath.rect(STEP, tip.heading)
        tip.radius -= (0.0015 if tip.course else 0.0035) * STEP
        points.append((tip.at, tip.radius))
        next_twig -= STEP
        if abs(tip.at - eye.disc) < 1.7 * eye.disc_radius:
            continue
        if len(points) > 8 and not tip.course and ahead(0, 0.05) > 0.75:
            break
        thin = tip.radius * rng.uniform(*((0.2, 0.7) if tip.course else (0.4, 0.8)))
        if next_twig < 0 and thin > THINNEST:
            next_twig = rng.exponential(0.06) + 0.04
            # Murray's law and angles of least work, to the freer side; the vessel goes on thinner and turned the other way
            thick, rest = tip.radius, (tip.radius**3 - thin**3) ** (1 / 3)
            away = math.acos(min(1, (thick**4 + thin**4 - rest**4) / (2 * thick**2 * thin**2)))
            aside = math.acos(min(1, (thick**4 + rest**4 - thin**4) / (2 * thick**2 * rest**2)))
            side = -1 if ahead(-away, 0.12) + rng.normal(0, 0.3) < ahead(away, 0.12) else 1
            tips.append(_Tip(tip.artery, tip.at, tip.heading + side * (0.85 * away + rng.normal(0, 0.12)), thin))
            tip.heading, tip.radius = tip.heading - side * 0.8 * aside, rest
    course, radii = zip(*points, strict=True)
    return np.array(course), np.array(radii)


def _render_vessels(tree: Tree, eye: _Eye, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Three layers (H, W) float32 in [0, 1]: coverage by vessels, opacity of arteries and of veins."""
    fine = 4 if max(shape) <= 1024 else 2
    covered, arteries, veins = (np.zeros((shape[0] * fine, shape[1] * fine), np.uint8) for _ in range(3))
    segments = []
    for artery, contrast, course, radii in tree:
        points = np.stack([course.real, course.imag], axis=1) * eye.radius + eye.centre
        # The pixel's centre is at (fine - 1) / 2 of its fine pixels; OpenCV takes 4 bits of fraction.
        ends = np.rint((points * fine + (fine - 1) / 2) * 16).astype(int).tolist()
        calibres = (2 * eye.radius * radii[1:]).tolist()
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

    def from_point(point: complex) -> np.ndarray:
        return np.hypot(x - point.real, y - point.imag)

    def step(distance: np.ndarray, width: float) -> np.ndarray:
        """From 1 inside of distance 1 to 0 outside."""
        return 0.5 * (1 - np.tanh((distance - 1) / width))

    light = 1.08 - rng.uniform(0.15, 0.4) * from_point(complex(*rng.uniform(-0.35, 0.35, 2))) ** 2 + 0.07 * noise(0.9)
    pigment = 0.03 * noise(0.3) + 0.024 * noise(0.1) + 0.024 * noise(0.035)
    stripes = np.exp(-((noise(0.16) / 0.4) ** 2)) - 0.4  # vessels of the choroid
    fovea = from_point(eye.fovea)
    macula = rng.uniform(0.12, 0.24) * np.exp(-((fovea / 0.28) ** 2))
    macula += rng.uniform(0.08, 0.2) * np.exp(-((fovea / 0.085) ** 2))
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
    seen: Any = np.where(fov[..., None], colour * cast, rng.uniform(0.008, 0.03, 3)).astype(np.float32)
    blur = rng.uniform(0.5, 0.9) * eye.radius / 245  # 245 px is the field's radius in a 512 px image
    seen = cv2.GaussianBlur(seen, (0, 0), max(0.35, blur))
    # Shot noise grows with the light; it is smeared over neighbours, as demosaicing does.
    noise = cv2.GaussianBlur(rng.standard_normal(seen.shape, dtype=np.float32), (0, 0), 0.5)
    seen += noise * rng.uniform(0.025, 0.045) * np.sqrt(np.clip(seen, 0, 1) + 0.01)
    return jpeg(np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8), int(rng.integers(82, 97)))
