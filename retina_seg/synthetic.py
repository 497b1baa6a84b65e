"""Procedural fundus photos with the exact vessel mask: the set to use when no real one is at hand, and the tests' material.

A photo is drawn in three stages. `_Eye` lays out the anatomy (disc, fovea, field of view), `_grow_vessels` lets arteries and
veins grow from the disc as trees whose calibres keep Murray's law, and the rest paints: retina, vessels, lesions, camera.
Geometry is in units of the field's radius, origin at its centre, x right, y down; so a seed is the same eye at every size.

Nothing here is medical data, and scores on these photos say nothing about real ones.
"""

from __future__ import annotations

import csv
import heapq
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

MIN_SIZE = 64  # px; a smaller field has no room for even the main arcades
TEST_SEEDS = 500_000  # within the million seeds of one set, the test photos' seeds start here

STEP = 0.012  # length of one step of a growing vessel
THINNEST = 0.0026  # radius at which a vessel ends: 1.3 px wide in a 512 px photo
CELL = 0.02  # the growth's map of where vessels already run: side of a cell
MAP_HALF = 1.12  # that map covers [-MAP_HALF, MAP_HALF] both ways

# What blood takes from red, green and blue where a vessel is opaque; haemoglobin absorbs green most.
ARTERY_ABSORBS = np.array([0.22, 1.0, 0.85], np.float32)
VEIN_ABSORBS = np.array([0.42, 1.0, 0.75], np.float32)


@dataclass(frozen=True)
class SyntheticPhoto:
    """A drawn photo and its truth.

    Attributes:
        photo: (H, W, 3) uint8, RGB.
        mask: (H, W) uint8, 255 where a vessel covers at least half of the pixel, else 0; 0 outside the field of view.
        fov: (H, W) uint8, 255 inside the camera's field of view, else 0.
    """

    photo: np.ndarray
    mask: np.ndarray
    fov: np.ndarray


def draw_photo(seed: int, height: int = 512, width: int = 512) -> SyntheticPhoto:
    """Draw the fundus photo of `seed`, the same to the byte on every call (with the same NumPy and OpenCV).

    Args:
        seed: any integer from 0 up; each is another eye, camera and exposure.
        height: rows of the photo, at least 64.
        width: columns of the photo, at least 64.

    Raises:
        ValueError: a size that is no integer or under 64 px, or a seed that is no integer or negative.
    """
    for name, value, least in (("seed", seed, 0), ("height", height, MIN_SIZE), ("width", width, MIN_SIZE)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    shape = int(height), int(width)
    # One stream a stage: a change to the colours leaves every mask as it was.
    plan, growth, paint, camera = (np.random.default_rng(s) for s in np.random.SeedSequence(int(seed)).spawn(4))
    eye = _Eye.of(plan, shape)
    x, y = _grid(eye, shape)
    fov = _field_of_view(eye, x, y)
    vessels = _grow_vessels(growth, eye)
    coverage, arteries, veins, reflex = _render_vessels(vessels, eye, shape)
    colour = _paint_retina(paint, eye, x, y)
    colour *= 1 - arteries[..., None] * ARTERY_ABSORBS
    colour *= 1 - veins[..., None] * VEIN_ABSORBS
    colour *= 1 + reflex[..., None]
    _paint_lesions(paint, eye, colour)
    mask = (coverage >= 0.5) & fov
    return SyntheticPhoto(_expose(camera, eye, colour, fov), _black_white(mask), _black_white(fov))


def write_set(
    destination: str | Path,
    train: int = 12,
    test: int = 4,
    size: tuple[int, int] = (512, 512),
    seed: int = 0,
    progress: bool = True,
) -> Path:
    """Write a synthetic set in the Data1 layout: `destination/{train,test}/{image,mask,fov}/<i>.png` and `photos.csv`.

    Every file is its own photo (there are no variants); no photo is in both parts, nor in a set of another `seed`.
    `photos.csv` is written last: a folder without it was interrupted.

    Args:
        destination: a folder that is empty or not there yet.
        train: number of training photos.
        test: number of test photos.
        size: (height, width) of the photos.
        seed: which set to draw, from 0 up.
        progress: show a progress bar.

    Returns:
        `destination` as a `Path`.

    Raises:
        FileExistsError: `destination` is a file, or a folder with something in it.
        ValueError: a count or size that cannot be drawn.
    """
    destination = Path(destination)
    if destination.exists() and not (destination.is_dir() and next(destination.iterdir(), None) is None):
        raise FileExistsError(
            f"{destination} is already in use: empty it, or choose another folder for the synthetic set"
        )
    if not (0 <= train <= TEST_SEEDS and 0 <= test <= TEST_SEEDS):
        raise ValueError(f"train and test must be between 0 and {TEST_SEEDS}, not {train} and {test}")
    jobs = [("train", i, seed * 2 * TEST_SEEDS + i) for i in range(train)]
    jobs += [("test", i, seed * 2 * TEST_SEEDS + TEST_SEEDS + i) for i in range(test)]
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["part", "name", "photo", "variant", "source"])
    for part, i, photo_seed in tqdm(jobs, desc="synthetic photos", unit="photo", disable=not progress):
        drawn = draw_photo(photo_seed, *size)
        bgr = cv2.cvtColor(drawn.photo, cv2.COLOR_RGB2BGR)
        for folder, picture in (("image", bgr), ("mask", drawn.mask), ("fov", drawn.fov)):
            _write_whole(destination / part / folder / f"{i}.png", cv2.imencode(".png", picture)[1].tobytes())
        rows.writerow([part, i, i, 0, f"synthetic seed {photo_seed}"])
    _write_whole(destination / "photos.csv", table.getvalue().encode())
    return destination


def _write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, so that no reader ever meets half a photo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------------ anatomy


@dataclass(frozen=True)
class _Eye:
    """Where things lie. Points are (x, y) in field radii; `temporal` is +1 where the macula is right of the disc, else -1."""

    radius: float  # px
    centre: tuple[float, float]  # px
    cut: float  # the field is cut flat above and below this |y|; 1 leaves it round
    notch: tuple[float, float, float] | None  # x, y, radius of the camera's index mark
    temporal: int
    tilt: float  # radians
    disc: tuple[float, float]
    disc_radius: float
    fovea: tuple[float, float]

    @classmethod
    def of(cls, rng: np.random.Generator, shape: tuple[int, int]) -> _Eye:
        height, width = shape
        cut = rng.uniform(0.78, 0.92) if rng.random() < 0.3 else 1.0
        angle = math.radians(rng.uniform(-55, -25))
        notch = (math.cos(angle), math.sin(angle), rng.uniform(0.035, 0.05)) if rng.random() < 0.5 else None
        temporal = int(rng.choice([-1, 1]))
        disc_radius = rng.uniform(0.135, 0.165)
        disc = (-temporal * rng.uniform(0.42, 0.78), rng.uniform(-0.1, 0.06))
        distance = 5 * disc_radius * rng.uniform(0.95, 1.1)  # 2.5 disc diameters
        fovea = (disc[0] + temporal * distance, disc[1] + rng.uniform(0.03, 0.12))
        radius = min(0.48 * width, 0.48 * height / cut)
        centre = ((width - 1) / 2, (height - 1) / 2)
        return cls(radius, centre, cut, notch, temporal, rng.uniform(-0.12, 0.12), disc, disc_radius, fovea)

    def place(self, outward: float, up: float) -> tuple[float, float]:
        """The point `outward` (temporal) and `up` of the disc, both in disc-fovea distances."""
        unit = math.dist(self.disc, self.fovea)
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        dx, dy = self.temporal * outward * unit, -up * unit
        return self.disc[0] + cos * dx - sin * dy, self.disc[1] + sin * dx + cos * dy


def _grid(eye: _Eye, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """x as (1, W) and y as (H, 1), float32 in field radii: they broadcast to the photo."""
    y = (np.arange(shape[0], dtype=np.float32) - eye.centre[1]) / eye.radius
    x = (np.arange(shape[1], dtype=np.float32) - eye.centre[0]) / eye.radius
    return x[None, :].astype(np.float32), y[:, None].astype(np.float32)


def _field_of_view(eye: _Eye, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    inside = (x**2 + y**2 <= 1) & (np.abs(y) <= eye.cut)
    if eye.notch and abs(eye.notch[1]) < eye.cut - eye.notch[2]:
        inside |= (x - eye.notch[0]) ** 2 + (y - eye.notch[1]) ** 2 <= eye.notch[2] ** 2
    return inside


# ------------------------------------------------------------------------------------------------------------ vessels


@dataclass
class _Vessel:
    """A vessel between two ends: `points` is a list of (x, y, radius) in field radii."""

    artery: bool
    contrast: float
    points: list[tuple[float, float, float]]


class _Bud:
    """A vessel about to grow; the heap takes the thickest first, so that trunks claim the room before twigs."""

    def __init__(self, artery: bool, x: float, y: float, heading: float, radius: float, way: list | None = None):
        self.artery, self.x, self.y, self.heading, self.radius, self.way = artery, x, y, heading, radius, way or []

    def __lt__(self, other: _Bud) -> bool:
        return self.radius > other.radius


class _Crowd:
    """Map of where vessels of each kind already run, 0 (free) to 1; what grows turns away from its own kind."""

    def __init__(self, eye: _Eye):
        cells = int(2 * MAP_HALF / CELL) + 1
        axis = np.arange(cells) * CELL - MAP_HALF
        from_fovea = (axis[None, :] - eye.fovea[0]) ** 2 + (axis[:, None] - eye.fovea[1]) ** 2
        # The fovea has no vessels: to a growing vessel it is a crowded place.
        self.maps = [0.9 * np.exp(-from_fovea / (2 * 0.09**2)) for _ in range(2)]
        offset = np.arange(-4, 5)
        self.stamp = np.exp(-(offset[None, :] ** 2 + offset[:, None] ** 2) / (2 * 1.6**2))

    def mark(self, artery: bool, x: float, y: float) -> None:
        i, j = round((y + MAP_HALF) / CELL), round((x + MAP_HALF) / CELL)
        window = self.maps[artery][i - 4 : i + 5, j - 4 : j + 5]
        if window.shape == self.stamp.shape:
            np.maximum(window, self.stamp, out=window)

    def at(self, artery: bool, x: float, y: float) -> float:
        i, j = round((y + MAP_HALF) / CELL), round((x + MAP_HALF) / CELL)
        last = len(self.maps[0]) - 1
        i, j = min(max(i, 0), last), min(max(j, 0), last)
        # Arteries and veins do cross, so the other kind counts less.
        return float(self.maps[artery][i, j] + 0.4 * self.maps[not artery][i, j])


def _trunks(rng: np.random.Generator, eye: _Eye) -> Iterator[_Bud]:
    """What leaves the disc: an artery and a vein for each of the four arcades, and small vessels in between."""
    temporal = np.array([(0.06, 0.28), (0.34, 0.6), (0.8, 0.76), (1.3, 0.68), (1.75, 0.5)])
    nasal = np.array([(-0.16, 0.3), (-0.42, 0.65), (-0.65, 1.05), (-0.8, 1.5)])
    x0, y0 = eye.place(-0.03, 0)
    for up in (1, -1):
        for course, thick in ((temporal, 0.0155), (nasal, 0.0095)):
            for artery in (True, False):
                spread = rng.uniform(0.82, 1.18)
                way = (
                    course * [1, up * spread]
                    + rng.normal(0, 0.05, course.shape)
                    + [0, up * (0.05 if artery else -0.03)]
                )
                radius = thick * rng.uniform(0.88, 1.12) * (0.8 if artery else 1.0)
                start = rng.normal([x0, y0], 0.022)
                heading = math.atan2(-up, 0.3 * eye.temporal * (1 if course is temporal else -1)) + rng.normal(0, 0.15)
                yield _Bud(artery, *start, heading, radius, [eye.place(*point) for point in way])
    for outward in (1, 1, 1, -1, -1):
        base = 0 if outward * eye.temporal > 0 else math.pi
        yield _Bud(bool(rng.random() < 0.5), x0, y0, base + rng.uniform(-1, 1), rng.uniform(0.0045, 0.007))


def _grow_vessels(rng: np.random.Generator, eye: _Eye) -> list[_Vessel]:
    """Grow both trees until vessels cover the share of the field that is drawn for this eye."""
    crowd, heap = _Crowd(eye), []
    for bud in _trunks(rng, eye):
        heapq.heappush(heap, bud)
    room = 2 * (math.asin(eye.cut) + eye.cut * math.sqrt(1 - eye.cut**2)) * rng.uniform(0.095, 0.122)
    vessels = []
    while heap and room > 0:
        vessel, twigs = _grow_one(rng, eye, crowd, heapq.heappop(heap))
        for twig in twigs:
            heapq.heappush(heap, twig)
        vessels.append(vessel)
        room -= sum(2 * r * STEP for x, y, r in vessel.points if abs(y) < eye.cut)
    return vessels


def _grow_one(rng: np.random.Generator, eye: _Eye, crowd: _Crowd, bud: _Bud) -> tuple[_Vessel, list[_Bud]]:
    """Let one bud grow to its end; returns the vessel and the buds of its side branches."""
    artery, x, y, heading, radius, way = bud.artery, bud.x, bud.y, bud.heading, bud.radius, bud.way
    points, twigs = [(x, y, radius)], []
    bend, next_twig = 0.0, rng.uniform(0.06, 0.16)
    wander = rng.uniform(9.0, 18.0) if way else rng.uniform(9.0, 20.0)
    for step in range(1, 400):
        # Curvature is a mean-reverting walk: the vessel winds, and smoothly.
        bend += -bend * 14 * STEP + wander * math.sqrt(STEP) * rng.standard_normal()
        if way:
            aim = math.atan2(way[0][1] - y, way[0][0] - x) - heading
            steer = 7 * math.remainder(aim, 2 * math.pi)
            if math.dist((x, y), way[0]) < 0.13:
                way = way[1:]
        else:
            left, right = (
                crowd.at(artery, x + 0.08 * math.cos(a), y + 0.08 * math.sin(a)) for a in (heading - 0.6, heading + 0.6)
            )
            steer = 13 * (left - right)
        heading += (bend + steer) * STEP
        x, y = x + STEP * math.cos(heading), y + STEP * math.sin(heading)
        radius -= (0.0015 if way else 0.0027) * STEP
        blocked = (
            step > 8 and not way and crowd.at(artery, x + 0.05 * math.cos(heading), y + 0.05 * math.sin(heading)) > 0.75
        )
        points.append((x, y, radius))
        if (
            math.hypot(x, y) > 1.03
            or radius < THINNEST
            or (blocked and math.dist((x, y), eye.disc) > 1.6 * eye.disc_radius)
        ):
            break
        next_twig -= STEP
        if next_twig < 0 and math.dist((x, y), eye.disc) > 1.2 * eye.disc_radius:
            next_twig = rng.exponential(0.08 if way else 0.065) + (0.06 if way else 0.045)
            # An arcade keeps its calibre: it gives off twigs, and now and then a large branch; thinner vessels divide evenly.
            thin = radius * (
                rng.choice([rng.uniform(0.2, 0.4), rng.uniform(0.5, 0.85)]) if way else rng.uniform(0.4, 0.9)
            )
            if thin > THINNEST:
                twig, heading, radius = _branch(rng, crowd, artery, (x, y, heading, radius), thin)
                twigs.append(twig)
    for px, py, _ in points:
        crowd.mark(artery, px, py)
    return _Vessel(artery, rng.uniform(0.85, 1.15), points), twigs


def _branch(
    rng: np.random.Generator, crowd: _Crowd, artery: bool, at: tuple[float, float, float, float], thin: float
) -> tuple[_Bud, float, float]:
    """Split off a twig of radius `thin`: r0^3 = r1^3 + r2^3, angles of least work; returns twig, new heading, new radius."""
    x, y, heading, radius = at
    rest = (radius**3 - thin**3) ** (1 / 3)
    away = math.acos(min(1, (radius**4 + thin**4 - rest**4) / (2 * radius**2 * thin**2)))
    aside = math.acos(min(1, (radius**4 + rest**4 - thin**4) / (2 * radius**2 * rest**2)))
    sides = [
        crowd.at(artery, x + 0.12 * math.cos(heading + s * away), y + 0.12 * math.sin(heading + s * away))
        for s in (-1, 1)
    ]
    side = -1 if sides[0] + rng.normal(0, 0.3) < sides[1] else 1
    twig = _Bud(artery, x, y, heading + side * (away * 0.85 + rng.normal(0, 0.12)), thin)
    return twig, heading - side * aside * 0.8, rest


def _render_vessels(vessels: list[_Vessel], eye: _Eye, shape: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Draw the vessels on a finer canvas and average it down.

    Returns:
        coverage (share of the pixel under a vessel), opacity of arteries, opacity of veins, brightness of the arteries'
        central reflex; each (H, W) float32 in [0, 1].
    """
    fine = 4 if max(shape) <= 1024 else 2
    covered, arteries, veins, reflex = (np.zeros((shape[0] * fine, shape[1] * fine), np.uint8) for _ in range(4))
    # A pixel's centre is at (fine - 1) / 2 of its fine pixels; coordinates carry 4 bits of fraction.
    offset = (fine - 1) / 2
    segments = []
    for vessel in vessels:
        points = np.array(vessel.points)
        where = np.rint(((points[:, :2] * eye.radius + eye.centre) * fine + offset) * 16).astype(int).tolist()
        for start, end, radius in zip(where, where[1:], points[1:, 2].tolist(), strict=False):
            segments.append((radius, vessel.artery, vessel.contrast, start, end))
    segments.sort(key=lambda s: s[0])  # thick ones last, on top
    for radius, artery, contrast, start, end in segments:
        calibre = 2 * radius * eye.radius
        if calibre < 0.7:  # px; the camera does not resolve it
            continue
        thickness = max(round(1.25 * fine), round(calibre * fine))  # 1.25 px: no thinner line stays in one piece
        strength = contrast * (0.12 + 0.26 * min(1.0, radius / 0.013) ** 0.8) * (0.85 if artery else 1.0)
        cv2.line(covered, start, end, 255, thickness, cv2.LINE_8, 4)
        cv2.line(arteries if artery else veins, start, end, int(255 * min(strength, 0.6)), thickness, cv2.LINE_8, 4)
        if artery and calibre > 3:
            cv2.line(reflex, start, end, 45, max(1, round(0.3 * calibre * fine)), cv2.LINE_8, 4)
    # Where veins and arteries cross, the reflex lies on whichever is drawn: keep it simple, it is one layer.
    size = shape[::-1]
    return tuple(
        cv2.resize(layer, size, interpolation=cv2.INTER_AREA).astype(np.float32) / 255
        for layer in (covered, arteries, veins, reflex)
    )


# ----------------------------------------------------------------------------------------------------------- painting


def _noise(rng: np.random.Generator, eye: _Eye, shape: tuple[int, int], scale: float) -> np.ndarray:
    """A smooth random field, (H, W) float32, mean 0 and standard deviation 1, with bumps of `scale` field radii."""
    cell = scale * eye.radius / 2.5
    rows, columns = (math.ceil(n / cell) + 6 for n in shape)
    lattice = cv2.GaussianBlur(rng.standard_normal((rows, columns), dtype=np.float32), (0, 0), 1.25)
    lattice = (lattice - lattice.mean()) / lattice.std()
    return cv2.resize(lattice, shape[::-1], interpolation=cv2.INTER_CUBIC)


def _bump(x: np.ndarray, y: np.ndarray, at: tuple[float, float], sigma: float) -> np.ndarray:
    """A Gaussian of height 1 around `at`, (H, W)."""
    return np.exp(-((x - at[0]) ** 2) / (2 * sigma**2)) * np.exp(-((y - at[1]) ** 2) / (2 * sigma**2))


def _paint_retina(rng: np.random.Generator, eye: _Eye, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The fundus without vessels, (H, W, 3) float32, about [0, 1]."""
    shape = y.shape[0], x.shape[1]
    red = rng.uniform(0.6, 0.84)
    green = red * rng.uniform(0.46, 0.58)
    base = np.array([red, green, green * rng.uniform(0.42, 0.66)], np.float32)

    # Large: the lamp's uneven light.  Middle: pigment.  Small: the choroid's vessels, as pale or dark stripes.
    lamp = rng.uniform(-0.35, 0.35, 2)
    light = (
        1.08 - rng.uniform(0.15, 0.4) * ((x - lamp[0]) ** 2 + (y - lamp[1]) ** 2) + 0.07 * _noise(rng, eye, shape, 0.9)
    )
    pigment = (
        0.03 * _noise(rng, eye, shape, 0.3)
        + 0.02 * _noise(rng, eye, shape, 0.1)
        + 0.018 * _noise(rng, eye, shape, 0.035)
    )
    tessellated = rng.uniform(0.01, 0.04) if rng.random() < 0.7 else rng.uniform(0.06, 0.12)
    stripes = np.exp(-((_noise(rng, eye, shape, 0.16) / 0.4) ** 2)) - 0.4
    stripes *= (
        tessellated * np.clip(0.5 + 0.6 * _noise(rng, eye, shape, 0.25), 0, 2) * (1 - _bump(x, y, eye.fovea, 0.35))
    )

    macula = rng.uniform(0.12, 0.24) * _bump(x, y, eye.fovea, 0.2) + rng.uniform(0.08, 0.2) * _bump(
        x, y, eye.fovea, 0.06
    )
    sheen = _nerve_fibres(rng, eye, x, y)
    shade = np.stack(
        [
            light * (1 + 0.6 * pigment + 0.7 * stripes - 0.5 * macula + 0.5 * sheen),
            light * (1 + pigment + stripes - macula + sheen) * (1 + 0.05 * _noise(rng, eye, shape, 0.7)),
            light
            * (1 + pigment + 0.5 * stripes - 0.9 * macula + 1.2 * sheen)
            * (1 + 0.08 * _noise(rng, eye, shape, 0.7)),
        ],
        axis=-1,
    )
    colour = base * shade.astype(np.float32)
    _paint_disc(rng, eye, x, y, light, colour)
    return colour


def _nerve_fibres(rng: np.random.Generator, eye: _Eye, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Silvery sheen of the nerve fibres: fine rays from the disc, strongest above and below it; (H, W), about [0, 0.15]."""
    strength = rng.uniform(0.0, 0.16)
    dx, dy = x - eye.disc[0], y - eye.disc[1]
    angle = np.arctan2(dy, dx)
    rays = np.convolve(rng.standard_normal(720), np.hanning(7) / 2, "same")
    rays = 1 + 0.25 * np.interp(angle, np.linspace(-np.pi, np.pi, 720), rays)
    far = np.hypot(dx, dy)
    return strength * rays * np.sin(angle) ** 2 * far * np.exp(-((far / 0.42) ** 2)) / 0.3


def _paint_disc(
    rng: np.random.Generator, eye: _Eye, x: np.ndarray, y: np.ndarray, light: np.ndarray, colour: np.ndarray
) -> None:
    """Blend the optic disc into `colour`: a pale oval with a paler cup, a soft edge, a darker ring around it."""
    dx, dy = (x - eye.disc[0]) * rng.uniform(1.02, 1.15), y - eye.disc[1]
    angle = np.arctan2(dy, dx)
    wobble = 1 + sum(rng.normal(0, 0.018) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in (2, 3, 4))
    far = np.hypot(dx, dy) / (eye.disc_radius * wobble)
    # A crescent of thin pigment often lies on the temporal side; elsewhere the ring is a little darker.
    ring = np.exp(-(((far - 1.12) / 0.1) ** 2)) * (rng.uniform(0.0, 0.25) * np.cos(angle) * eye.temporal - 0.05)
    colour *= (1 + ring)[..., None]
    pale = np.array([rng.uniform(0.84, 0.95), rng.uniform(0.58, 0.7), rng.uniform(0.29, 0.4)], np.float32)
    cup_at = rng.uniform(0.0, 0.25) * eye.temporal
    cup_size = rng.uniform(0.35, 0.6)
    cup = _step_down(np.hypot(dx / eye.disc_radius - cup_at, dy / eye.disc_radius) / cup_size, 0.16)
    inside = (_step_down(far, rng.uniform(0.035, 0.07)) * rng.uniform(0.82, 0.95))[..., None]
    # The nasal rim is thicker and so redder.
    rim = 1 - 0.1 * (1 - cup) * (1 - 0.6 * np.cos(angle) * eye.temporal)
    disc = pale * (light * rim)[..., None] + cup[..., None] * np.array([0.04, 0.13, 0.12], np.float32)
    colour *= 1 - inside
    colour += inside * disc


def _step_down(far: np.ndarray, soft: float) -> np.ndarray:
    """1 where `far` < 1, 0 beyond, with a transition about `soft` wide."""
    return 1 / (1 + np.exp(np.clip((far - 1) / soft, -30, 30) * 2))


def _paint_lesions(rng: np.random.Generator, eye: _Eye, colour: np.ndarray) -> None:
    """What a network must not take for a vessel, or for its absence: bright exudates or drusen, dark small haemorrhages."""
    shape = colour.shape[:2]
    for chance, many, size, tint in (
        (0.35, 45, 0.009, (0.25, 0.55, 0.35)),  # exudates, drusen
        (0.4, 14, 0.012, (-0.3, -0.42, -0.35)),  # haemorrhages
    ):
        count = int(rng.integers(4, many)) if rng.random() < chance else 0
        spots = np.zeros(shape, np.float32)
        middle = rng.normal(eye.fovea, 0.25)
        for _ in range(count):
            at = (rng.normal(middle, 0.28) * eye.radius + eye.centre) * 16
            axes = np.maximum(rng.gamma(3, size / 3, 2) * eye.radius * 16, 8)
            centre, axes = np.rint(at).astype(int).tolist(), np.rint(axes).astype(int).tolist()
            cv2.ellipse(spots, centre, axes, rng.uniform(0, 180), 0, 360, rng.uniform(0.3, 1), -1, cv2.LINE_8, 4)
        if count:
            spots = cv2.GaussianBlur(spots, (0, 0), max(0.6, 0.003 * eye.radius))
            colour *= 1 + spots[..., None] * np.array(tint, np.float32)


def _expose(rng: np.random.Generator, eye: _Eye, colour: np.ndarray, fov: np.ndarray) -> np.ndarray:
    """What the camera makes of the fundus: cast, blur, black surround, sensor noise, JPEG; returns (H, W, 3) uint8 RGB."""
    scale = eye.radius / 245  # 1 in a 512 px photo
    colour *= (rng.uniform(0.88, 1.18) * rng.uniform([0.96, 0.95, 0.9], [1.04, 1.04, 1.1])).astype(np.float32)
    field = fov.astype(np.float32)[..., None] * np.ones(3, np.float32)
    dark = rng.uniform(0.008, 0.03, 3).astype(np.float32)
    seen = cv2.GaussianBlur(colour * field + dark * (1 - field), (0, 0), max(0.35, rng.uniform(0.5, 0.9) * scale))
    # Shot noise grows with the light; the sensor's colour filter and the file format smear its colour part.
    noise = rng.standard_normal(seen.shape, dtype=np.float32)
    noise = 0.6 * noise + 1.2 * cv2.GaussianBlur(noise, (0, 0), 0.8)
    seen += noise * rng.uniform(0.014, 0.026) * np.sqrt(np.clip(seen, 0, 1) + 0.01)
    bgr = np.rint(np.clip(seen, 0, 1) * 255).astype(np.uint8)[..., ::-1]
    ok, code = cv2.imencode(".jpg", np.ascontiguousarray(bgr), [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(82, 97))])
    return cv2.cvtColor(cv2.imdecode(code, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def _black_white(inside: np.ndarray) -> np.ndarray:
    return inside.astype(np.uint8) * 255
