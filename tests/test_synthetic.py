"""Synthetic images: exact, repeatable, plausible, and hard for a plain threshold."""

import cv2
import numpy as np
import pytest
from conftest import files
from sklearn.metrics import precision_recall_curve

from retina_seg.images import read_image, read_mask
from retina_seg.sets.synthetic import data_or_synthetic, synthetic_image, write_set
from retina_seg.utils import UserError, read_csv

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def large():
    """Some images of the default size."""
    return [synthetic_image(seed) for seed in SEEDS]


def share(one):
    return (one.mask > 0).sum() / (one.fov > 0).sum()


def test_a_seed_is_the_same_image_to_the_byte_whatever_the_global_state():
    np.random.seed(1)
    state = np.random.get_state()[1].copy()
    first, second, *others = (synthetic_image(seed, 96, 96) for seed in (7, np.int64(7), 0, 1, 2, 3))
    assert all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))
    assert np.array_equal(np.random.get_state()[1], state)  # nor is that state changed
    assert len({one.image.tobytes() for one in others}) == len({one.mask.tobytes() for one in others}) == 4


def test_a_seed_is_the_same_eye_at_every_size(large):
    reduced = cv2.resize(large[0].image, (256, 256), interpolation=cv2.INTER_AREA)
    distance = [np.abs(synthetic_image(seed, 256, 256).image.astype(float) - reduced).mean() for seed in SEEDS[:2]]
    assert distance[0] < 8 < distance[1]


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (140, 96), (64, 300), (301, 111)])
def test_form_at_any_size(height, width):
    for seed in range(4):
        one = synthetic_image(seed, height, width)
        assert one.image.shape == (height, width, 3) and one.mask.shape == one.fov.shape == (height, width)
        assert {pixels.dtype for pixels in vars(one).values()} == {np.dtype(np.uint8)}
        assert set(np.unique(one.mask)) == set(np.unique(one.fov)) == {0, 255}
        assert not one.mask[one.fov == 0].any() and 0.05 < share(one) < 0.2


@pytest.mark.parametrize("arguments", [(0, 63, 96), (0, 96, 63), (0, 96, 8193), (-1, 96, 96)])
def test_a_size_or_seed_out_of_range_is_refused(arguments):
    with pytest.raises(UserError, match=r"--seed .*--size .* 64 to 8192"):
        synthetic_image(*arguments)


def test_vessels_and_colours_are_as_in_real_images(large):
    for one in large:
        assert 0.09 < share(one) < 0.135  # of the field of view
        away = cv2.dilate(one.fov, np.ones((9, 9), np.uint8)) == 0  # JPEG rings a little around the rim
        assert one.image[away].max() < 40
        red, green, blue = one.image[one.fov > 0].mean(axis=0)
        assert red > 90 and red > 1.2 * green > 1.2 * blue
        assert cv2.distanceTransform(one.mask, cv2.DIST_L2, 5).max() > 3  # wider than 6 px
        opened = cv2.morphologyEx(one.mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        assert 0.1 < 1 - (opened > 0).sum() / (one.mask > 0).sum() < 0.7  # under 3 px wide
        near, far = (cv2.dilate(one.mask, np.ones((side, side), np.uint8)) for side in (3, 9))
        beside = (far > 0) & (near == 0) & (one.fov > 0)
        level = one.image[..., 1].astype(float)
        assert level[one.mask > 0].mean() < level[beside].mean() - 4


@pytest.mark.parametrize("size", [64, 128, 512])
def test_vessels_are_connected_even_where_they_are_thinner_than_a_pixel(size):
    for seed in range(4):
        count, _, stats, _ = cv2.connectedComponentsWithStats(synthetic_image(seed, size, size).mask)
        areas = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1]
        assert count - 1 <= 6
        assert areas[:3].sum() > 0.97 * areas.sum()


def test_mask_and_image_are_aligned(large):
    """Half a pixel of offset would limit every score: no shift may fit better than none."""

    def depth(one, dx, dy):
        green = one.image[..., 1].astype(np.float32)
        local = cv2.GaussianBlur(green, (0, 0), 8) - green
        core = cv2.erode(one.fov, np.ones((31, 31), np.uint8)) > 0
        return (local * (np.roll(one.mask, (dy, dx), (0, 1)) > 0))[core].sum()

    for one in large:
        fit = {(dx, dy): depth(one, dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
        assert max(fit, key=fit.get) == (0, 0)
        loss = [fit[0, 0] - fit[step] for step in ((1, 0), (-1, 0), (0, 1), (0, -1))]  # alike on both sides
        assert max(loss[:2]) < 2 * min(loss[:2]) and max(loss[2:]) < 2 * min(loss[2:])


@pytest.mark.parametrize(("less_background", "low", "high"), [(False, 0, 0.45), (True, 0.5, 0.75)])
def test_a_plain_threshold_does_not_segment_the_vessels(large, less_background, low, high):
    """The best single cut of the green channel, raw or less its background, stays far below what a network reaches."""
    darkness, truth = [], []
    for one in large:
        inside, green = one.fov > 0, one.image[..., 1].astype(np.float32)
        weight = inside.astype(np.float32)
        background = cv2.GaussianBlur(green * weight, (0, 0), 13) / (cv2.GaussianBlur(weight, (0, 0), 13) + 1e-6)
        darkness.append(((background if less_background else 255) - green)[inside])
        truth.append(one.mask[inside] > 0)
    precision, recall, _ = precision_recall_curve(np.concatenate(truth), np.concatenate(darkness))
    assert low < np.max(2 * precision * recall / (precision + recall + 1e-9)) < high  # the vessels are there to be seen


def test_write_set_writes_the_layout_the_same_on_every_run(tmp_path):
    roots = [
        write_set(tmp_path / "new" / name, train=3, test=2, size=(80, 100), seed=seed, progress=False)
        for name, seed in (("set", 4), ("again", 4), ("other", 5))
    ]
    root, again, other = roots
    assert root == tmp_path / "new" / "set"
    names = [(part, str(i)) for part, count in (("train", 3), ("test", 2)) for i in range(count)]
    expected = {f"{part}/{kind}/{name}.png" for part, name in names for kind in ("image", "mask", "fov")}
    assert files(root).keys() == expected | {"photos.csv"}
    rows = read_csv(root / "photos.csv", ("part", "name", "photo", "variant", "source"))
    assert [(row["part"], row["name"]) for row in rows] == [(row["part"], row["photo"]) for row in rows] == names
    for row in rows:  # each file is the image that the table says
        one = synthetic_image(int(row["source"].removeprefix("synthetic seed ")), 80, 100)
        for kind, truth in vars(one).items():
            path = root / row["part"] / kind / f"{row['name']}.png"
            assert np.array_equal(read_image(path) if kind == "image" else read_mask(path), truth)
    assert files(root) == files(again)
    assert len({path.read_bytes() for folder in (root, other) for path in folder.rglob("image/*.png")}) == 10


@pytest.mark.parametrize("wrong", [{"size": (32, 64)}, {"train": -1}, {"test": 500_001}, {"seed": -1}])
def test_write_set_refuses_what_cannot_be_and_leaves_nothing(tmp_path, wrong):
    with pytest.raises(UserError):
        write_set(tmp_path / "set", **{"train": 1, "test": 1, "size": (64, 64), "progress": False, **wrong})
    assert not any(tmp_path.iterdir())


def test_synthetic_images_only_where_there_are_no_others(tmp_path, capsys):
    data, fallback = tmp_path / "Data1", tmp_path / "synthetic"
    for bar in ("3/3", ""):  # no folder yet, then one without images: written once, then used again
        assert data_or_synthetic(data, fallback, train=2, test=1, size=(64, 64)) == (fallback, True)
        shown = capsys.readouterr().err
        assert bar in shown and bool(bar) == bool(shown)
        (data / "below").mkdir(parents=True, exist_ok=True)
    (data / "note.txt").touch()
    with pytest.raises(UserError, match="is an empty file"):
        data_or_synthetic(data / "note.txt", fallback)
    with pytest.raises(UserError, match="is not empty .below"):
        data_or_synthetic(data, data)
    write_set(data / "below", train=1, test=1, size=(64, 64), progress=False)
    assert capsys.readouterr().err == ""
    assert data_or_synthetic(data, fallback) == (data / "below", False)
