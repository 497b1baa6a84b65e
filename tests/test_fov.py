"""The field of view: drawn discs of known place, frames without a border, the public sets' own masks."""

import numpy as np
import pytest

from retina_seg.fov import find_fov, fov_box, fov_diameter
from retina_seg.images import read_label, read_photo


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def disc(height, width, radius, centre=None):
    row, column = centre or ((height - 1) / 2, (width - 1) / 2)
    y, x = np.ogrid[0:height, 0:width]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def retina(fov, seed=0, noise=3.0, surround=4):
    """An orange disc that darkens to its rim, with dark lines and noise, on a nearly black surround."""
    rng = np.random.default_rng(seed)
    height, width = fov.shape
    y, x = np.mgrid[0:height, 0:width]
    top, left, bottom, right = fov_box(fov)
    far = np.hypot(y - (top + bottom) / 2, x - (left + right) / 2) / max(bottom - top, right - left)
    light = 1 - 0.9 * far
    light[(x + y // 3) % max(8, width // 9) < max(1, width // 150)] *= 0.6
    photo = np.where(fov[..., None], light[..., None] * (190, 95, 40), surround)
    return np.clip(photo + rng.normal(0, noise, photo.shape), 0, 255).astype(np.uint8)


DISCS = {
    "square": disc(300, 300, 140),
    "small": disc(96, 96, 44),
    "drive": disc(584, 565, 268),
    "wide": disc(240, 400, 110),
    "cut top and bottom": disc(260, 340, 160),
    "cut left and right": disc(340, 260, 160),
    "off centre": disc(300, 340, 120, (165, 145)),
    "larger than the search": disc(1000, 1201, 480),
}


@pytest.mark.parametrize("name", DISCS)
def test_a_drawn_disc_is_found(name):
    truth = DISCS[name]
    for seed, noise, surround in ((0, 0, 0), (1, 3, 4), (2, 6, 12)):
        found = find_fov(retina(truth, seed, noise, surround))
        assert found.dtype == bool
        assert found.shape == truth.shape
        assert dice(found, truth) > 0.98
        assert abs(fov_diameter(found) / fov_diameter(truth) - 1) < 0.02


@pytest.mark.parametrize("corner", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_bright_label_in_one_corner_does_not_count(corner):
    truth = disc(300, 320, 135)
    photo = retina(truth)
    rows, columns = (slice(0, 30) if not end else slice(-30, None) for end in corner)
    photo[rows, columns] = 240
    found = find_fov(photo)
    assert dice(found, truth) > 0.98
    assert not found[rows, columns].any()


def test_letters_beside_the_disc_do_not_count():
    truth = disc(300, 400, 140)
    photo = retina(truth)
    for column in range(4, 40, 8):
        photo[140:150, column : column + 3] = 255
    assert dice(find_fov(photo), truth) > 0.98


def test_a_thin_line_that_touches_the_disc_does_not_draw_it_out():
    truth = disc(300, 400, 120)
    photo = retina(truth)
    photo[149:152, 20:200] = 255
    found = find_fov(photo)
    assert dice(found, truth) > 0.98
    assert not found[:, :60].any()


def test_a_dark_patch_at_the_rim_belongs_to_the_disc():
    truth = disc(300, 300, 140)
    photo = retina(truth)
    photo[disc(300, 300, 25, (150, 20))] = 0
    assert dice(find_fov(photo), truth) > 0.98


def test_a_grey_photo_has_its_disc_too():
    truth = disc(200, 220, 90)
    grey = retina(truth).max(axis=2)
    assert dice(find_fov(np.stack([grey] * 3, axis=2)), truth) > 0.98


@pytest.mark.parametrize("shape", [(60, 80), (8, 8), (700, 300)])
def test_without_a_border_the_whole_frame_is_the_field_of_view(shape):
    photo = np.random.default_rng(0).integers(90, 200, (*shape, 3)).astype(np.uint8)
    assert find_fov(photo).all()


@pytest.mark.parametrize("level", [0, 5])
def test_a_black_photo_shows_nothing(level):
    assert not find_fov(np.full((40, 50, 3), level, np.uint8)).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 900), (900, 1), (2, 2), (3, 5), (8, 8)])
def test_tiny_and_thin_photos_do_not_crash(shape):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (*shape, 3), np.uint8)
    for photo in (np.zeros((*shape, 3), np.uint8), np.full((*shape, 3), 180, np.uint8), noise):
        found = find_fov(photo)
        assert (found.shape, found.dtype) == (shape, bool)
    assert find_fov(np.full((*shape, 3), 180, np.uint8)).all()


@pytest.mark.parametrize("name", DISCS)
def test_a_mirrored_or_turned_photo_has_the_mirrored_or_turned_field(name):
    photo = retina(DISCS[name])
    found = find_fov(photo)
    for move in (lambda a: a[:, ::-1], lambda a: a[::-1], lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2)):
        assert np.array_equal(find_fov(move(photo)), move(found))


def test_the_photo_is_not_written_to():
    photo = retina(disc(64, 64, 28))
    before = photo.copy()
    find_fov(photo)
    assert np.array_equal(photo, before)


def test_a_view_with_odd_strides_is_taken():
    photo = retina(disc(120, 100, 45))
    assert np.array_equal(find_fov(photo[::-1, :, ::-1]), find_fov(np.ascontiguousarray(photo[::-1, :, ::-1])))


# ------------------------------------------------------------------------------------------------------------ by hand


def test_the_box_ends_one_behind_the_last_pixel():
    fov = np.zeros((6, 9), bool)
    fov[2, 3] = fov[4, 7] = True
    assert fov_box(fov) == (2, 3, 5, 8)
    assert fov[2:5, 3:8].sum() == fov.sum()
    assert fov_diameter(fov) == 5.0  # the longer side, 8 - 3


def test_one_pixel_is_a_box_of_one():
    fov = np.zeros((3, 3), bool)
    fov[1, 2] = True
    assert fov_box(fov) == (1, 2, 2, 3)
    assert fov_diameter(fov) == 1.0


def test_without_a_field_of_view_the_box_is_the_frame():
    assert fov_box(np.zeros((4, 7), bool)) == (0, 0, 4, 7)
    assert fov_diameter(np.zeros((4, 7), bool)) == 7.0


def test_the_diameter_of_a_disc_cut_flat_is_its_long_side():
    assert fov_diameter(disc(261, 401, 160)) == 321.0
    assert fov_diameter(disc(401, 261, 160)) == 321.0


# -------------------------------------------------------------------------------------------------------------- real sets


def published(root, name):
    """(photo, mask) files of a public set, as published."""
    if name == "CHASE_DB1":
        return [(path, root / name / "mask" / f"{path.stem}.gif") for path in sorted((root / name).glob("*.jpg"))]
    ending = {"DRIVE": "tif", "LES-AV": "png"}[name]
    photos = sorted((root / name).glob(f"*/images/*.{ending}"))
    return [(path, path.parents[1] / "mask" / f"{path.stem}_mask.gif") for path in photos]


@pytest.mark.real
@pytest.mark.parametrize(("name", "count"), [("DRIVE", 40), ("CHASE_DB1", 28), ("LES-AV", 22)])
def test_the_public_sets_own_masks_are_found_again(real_data, name, count):
    files = published(real_data, name)
    assert len(files) == count
    found = {photo.name: dice(find_fov(read_photo(photo)), read_label(mask) > 127) for photo, mask in files}
    assert np.median(list(found.values())) >= 0.985
    worst = min(found, key=found.get)
    assert found[worst] >= 0.95, f"{worst}: {found[worst]:.4f}"
