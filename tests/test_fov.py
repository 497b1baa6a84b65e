"""The field of view: discs of known place, frames without a border, the public sets' own masks."""

import cv2
import numpy as np
import pytest

from retina_seg.fov import find_discs, find_fov, fov_box, fov_diameter
from retina_seg.images import read_image, read_mask


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
    image = np.where(fov[..., None], light[..., None] * (190, 95, 40), surround)
    return np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8)


DISCS = {
    "small": disc(96, 96, 44),
    "drive": disc(584, 565, 268),
    "wide": disc(240, 400, 110),
    "cut top and bottom": disc(260, 340, 160),
    "cut left and right": disc(340, 260, 160),
    "off centre": disc(300, 340, 120, (165, 145)),
    "larger than the search": disc(1000, 1201, 480),
}


@pytest.mark.parametrize("name", DISCS)
def test_a_disc_is_found_mirrored_and_rotated_too(name):
    truth = DISCS[name]
    for seed, noise, surround in ((0, 0, 0), (1, 3, 4), (2, 6, 12)):
        image = retina(truth, seed, noise, surround)
        found = find_fov(image)
        assert (found.dtype, found.shape) == (bool, truth.shape)
        assert dice(found, truth) > 0.98
        assert abs(fov_diameter(found) / fov_diameter(truth) - 1) < 0.02
    for move in (lambda a: a[:, ::-1], lambda a: a[::-1], lambda a: np.rot90(a, 1), lambda a: np.rot90(a, 2)):
        assert dice(find_fov(move(image)), move(found)) >= 0.998
    assert np.array_equal(image, retina(truth, seed, noise, surround))  # not written to


LIT = {  # what is bright: rows, columns, value
    "top left": (slice(0, 30), slice(0, 30)),
    "bottom right": (slice(-30, None), slice(-30, None)),
    "letters beside the disc": (slice(140, 150), [4, 5, 6, 12, 13, 14, 20, 21, 22, 28, 29, 30]),
    "a thin line that touches the disc": (slice(149, 152), slice(20, 200)),
}


@pytest.mark.parametrize("name", LIT)
def test_what_is_bright_beside_the_disc_does_not_count(name):
    truth = disc(300, 400, 130)
    image = retina(truth)
    image[LIT[name]] = 240
    found = find_fov(image)
    assert dice(found, truth) > 0.98
    assert not found[:, :60].any()


def dark_side(image, fov):
    """The light falls off towards the lower left, to nothing at the rim."""
    y, x = np.indices(fov.shape)
    light = np.clip((160 - np.hypot(y - 90, x - 220)) / 75, 0, 1)
    return np.where(fov[..., None], image * light[..., None], 4).astype(np.uint8)


def glow(image, fov):
    """Stray light on the surround that falls off from the rim, as slides show it."""
    y, x = np.indices(fov.shape)
    stray = 4 + 40 * np.exp((140 - np.hypot(y - 149.5, x - 199.5)) / 25)
    return np.where(fov[..., None], image, np.minimum(stray, 44)[..., None]).astype(np.uint8)


def text(image, fov):
    image = cv2.putText(image.copy(), "2011/03/27 12:44", (4, 14), 0, 0.4, (255, 255, 255), 1)
    return cv2.putText(image, "OD ID 4711", (300, 292), 0, 0.4, (255, 255, 255), 1)


def menu_bar(image, fov):
    image = image.copy()
    image[:24] = 200
    image[6:18:4, 10:300:7] = 30
    return image


def bars_over_all_corners(*_):
    image = menu_bar(retina(ROUND), ROUND)
    image[-24:], image[24:-24, :50] = 180, 190
    return image


ROUND = disc(300, 400, 140)
ROWS = np.arange(300)[:, None]
OVAL = ((np.arange(400) - 199.5) / 150) ** 2 + ((ROWS - 149.5) / 125) ** 2 <= 1
SITUATIONS = {  # name: (the field of view, what happens to its image)
    "dark side": (ROUND, dark_side),
    "dimmed, with a dark side": (ROUND, lambda i, fov: np.rint(dark_side(i, fov) * 0.05).astype(np.uint8)),
    "grey surround": (ROUND, lambda _, fov: retina(fov, surround=140)),
    "white surround": (ROUND, lambda _, fov: retina(fov, surround=250)),
    "glow": (ROUND, glow),
    "dark patch at the rim": (ROUND, lambda image, _: image * ~disc(300, 400, 25, (150, 70))[..., None]),
    "text": (ROUND, text),
    "menu bar": (ROUND & (ROWS >= 24), lambda _, __: menu_bar(retina(ROUND), ROUND)),
    "bars over all corners": (ROUND & (ROWS >= 24) & (ROWS < 276) & (np.arange(400) >= 50), bars_over_all_corners),
    "cut flat inside the frame": (ROUND & (ROWS >= 40) & (ROWS < 262), lambda image, fov: image * fov[..., None]),
    "longer axis": (OVAL, lambda image, _: image),
    "grey": (ROUND, lambda image, _: image.max(axis=2, keepdims=True).repeat(3, axis=2)),
}


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_disc_is_found_whatever_the_light_and_the_surround(name):
    truth, change = SITUATIONS[name]
    image = change(retina(truth), truth)
    (found,) = find_discs(image)
    assert dice(found, truth) > 0.99
    assert np.array_equal(find_fov(image), found)
    assert dice(find_fov(image[:, ::-1]), found[:, ::-1]) >= 0.998


def test_an_image_that_fills_the_frame_is_all_field_of_view():
    image = retina(disc(700, 800, 340))
    for top, left in ((200, 200), (100, 200), (200, 120)):
        crop = image[top : top + 300, left : left + 400].copy()
        crop[disc(300, 400, 45, (150, 120))] = (250, 220, 150)  # an optic disc is no disc of the sheet
        (found,) = find_discs(crop)
        assert found.all()


@pytest.mark.parametrize("surround", [4, 245])
@pytest.mark.parametrize("centres", [[(150, 150), (150, 440)], [(130, 130), (130, 400), (400, 130), (400, 400)]])
def test_each_disc_of_a_sheet_is_found(centres, surround):
    height = 300 if len(centres) == 2 else 530
    truths = [disc(height, 600, 120, centre) for centre in centres]
    sheet = retina(np.any(truths, axis=0), surround=surround)
    sheet[:60, 285:300] = (200, 120, 60)  # a stroke, too small for a disc
    found = find_discs(sheet)
    assert len(found) == len(truths)
    for truth in truths:
        assert max(dice(mask, truth) for mask in found) > 0.99
    assert np.array_equal(find_fov(sheet), np.any(found, axis=0))


def test_what_is_no_disc_is_taken_as_its_convex_hull():
    truth = np.zeros((300, 400), bool)
    truth[60:240, 50:350] = True
    (found,) = find_discs(np.where(truth[..., None], 120, 3).repeat(3, axis=2).astype(np.uint8))
    assert dice(found, truth) > 0.99


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 900), (900, 1), (2, 2), (3, 5), (8, 8), (700, 300)])
def test_frames_without_a_border_of_any_size(shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    assert (find_fov(noise).shape, find_fov(noise).dtype) == (shape, bool)
    assert find_fov(np.full_like(noise, 180)).all()
    if min(shape) >= 8:  # enough pixels to tell noise from a border
        assert find_fov(90 + noise // 3).all()
    for level in (0, 5):  # a black image shows nothing
        assert not find_fov(black := np.full_like(noise, level)).any() and find_discs(black) == []


@pytest.mark.parametrize(
    ("fov", "box", "diameter"),
    [
        (np.pad([[True]], ((1, 1), (2, 0))), (1, 2, 2, 3), 1),  # ends one after the last pixel
        (np.pad(np.eye(3, 5, dtype=bool), ((2, 1), (3, 1))), (2, 3, 5, 6), 3),
        (np.zeros((4, 7), bool), (0, 0, 4, 7), 7),  # none: the frame
        (disc(261, 401, 160), (0, 40, 261, 361), 321),  # cut flat: the longer side
        (disc(401, 261, 160), (40, 0, 361, 261), 321),
    ],
)
def test_box_and_diameter_by_hand(fov, box, diameter):
    assert fov_box(fov) == box
    assert fov_diameter(fov) == diameter


@pytest.mark.real
@pytest.mark.parametrize(
    ("images", "mask", "count"),
    [
        ("DRIVE/*/images/*.tif", "../mask/{}_mask.gif", 40),
        ("CHASE_DB1/*.jpg", "mask/{}.gif", 28),
        ("LES-AV/*/images/*.png", "../mask/{}_mask.gif", 22),
    ],
)
def test_the_public_sets_own_masks_are_found_again(real_data, images, mask, count):
    found = {
        path.name: dice(find_fov(read_image(path)), read_mask(path.parent / mask.format(path.stem)) > 127)
        for path in real_data.glob(images)
    }
    assert len(found) == count
    assert np.median(list(found.values())) >= 0.985
    assert min(found.values()) >= 0.95, min(found, key=found.get)
