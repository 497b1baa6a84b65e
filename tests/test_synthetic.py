"""The synthetic photos: exact, repeatable, plausible, and no gift to a plain threshold."""

import csv

import cv2
import numpy as np
import pytest

from retina_seg import synthetic
from retina_seg.synthetic import draw_photo, write_set

LARGE_SEEDS = (0, 1, 2, 3)
FOLDERS = ("image", "mask", "fov")


@pytest.fixture(scope="module")
def large():
    """Some photos of the default size."""
    return [draw_photo(seed) for seed in LARGE_SEEDS]


def same(a, b):
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("photo", "mask", "fov"))


def f1(score, truth, threshold):
    chosen = score > threshold
    return 2 * (chosen & truth).sum() / (chosen.sum() + truth.sum())


def share(drawn):
    return (drawn.mask > 0).sum() / (drawn.fov > 0).sum()


def test_a_seed_is_the_same_photo_to_the_byte_whatever_the_global_state():
    np.random.seed(1)
    first = draw_photo(7, 96, 96)
    state = np.random.get_state()[1].copy()
    second = draw_photo(np.int64(7), 96, 96)
    assert same(first, second)
    assert np.array_equal(np.random.get_state()[1], state)  # nor does drawing touch it


def test_other_seeds_are_other_photos():
    drawn = [draw_photo(seed, 96, 96) for seed in range(6)]
    for part in ("photo", "mask"):
        assert len({getattr(d, part).tobytes() for d in drawn}) == len(drawn)


def test_a_seed_is_the_same_eye_at_every_size(large):
    small = draw_photo(LARGE_SEEDS[0], 256, 256)
    reduced = cv2.resize(large[0].photo, (256, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(small.photo.astype(float) - reduced).mean() < 8
    other = draw_photo(LARGE_SEEDS[1], 256, 256)
    assert np.abs(other.photo.astype(float) - reduced).mean() > 8


@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (96, 140), (140, 96), (64, 300), (301, 111)])
def test_form_at_any_size(height, width):
    for seed in range(4):
        drawn = draw_photo(seed, height, width)
        assert drawn.photo.shape == (height, width, 3)
        assert drawn.mask.shape == drawn.fov.shape == (height, width)
        assert drawn.photo.dtype == drawn.mask.dtype == drawn.fov.dtype == np.uint8
        assert set(np.unique(drawn.mask)) == set(np.unique(drawn.fov)) == {0, 255}
        assert not (drawn.mask[drawn.fov == 0]).any()
        assert 0.05 < share(drawn) < 0.2
        assert drawn.photo.flags["C_CONTIGUOUS"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 63, 96), "height .* 64, not 63"),
        ((0, 96, 63), "width .* 64, not 63"),
        ((0, 96.0, 96), "height .* 96.0"),
        ((0, 96, "96"), "width .* '96'"),
        ((0, True, 96), "height .* True"),
        ((-1, 96, 96), "seed .* -1"),
        ((0.5, 96, 96), "seed .* 0.5"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        draw_photo(*arguments)


def test_vessels_take_the_share_of_the_field_that_they_take_in_real_photos(large):
    for drawn in large:
        assert 0.09 < share(drawn) < 0.135


def test_the_surround_is_dark_and_the_field_is_not(large):
    for drawn in large:
        away = cv2.dilate(drawn.fov, np.ones((9, 9), np.uint8)) == 0  # JPEG rings a little around the rim
        assert drawn.photo[away].max() < 40
        red, green, blue = drawn.photo[drawn.fov > 0].mean(axis=0)
        assert red > 90
        assert red > 1.2 * green > 1.2 * blue


@pytest.mark.parametrize("size", [64, 128, 512])
def test_vessels_hang_together(size):
    """Also where they are thinner than a pixel: no line is drawn so thin that it falls to pieces."""
    for seed in range(4):
        count, _, stats, _ = cv2.connectedComponentsWithStats(draw_photo(seed, size, size).mask)
        areas = np.sort(stats[1:, cv2.CC_STAT_AREA])[::-1]
        assert count - 1 <= 6
        assert areas[:3].sum() > 0.97 * areas.sum()


def test_calibres_run_from_capillary_to_trunk(large):
    for drawn in large:
        inner = cv2.distanceTransform(drawn.mask, cv2.DIST_L2, 5)
        assert inner.max() > 3  # wider than 6 px
        opened = cv2.morphologyEx(drawn.mask, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
        assert 0.1 < 1 - (opened > 0).sum() / (drawn.mask > 0).sum() < 0.7  # under 3 px wide


def test_vessels_are_darker_than_what_lies_beside_them_in_green(large):
    for drawn in large:
        wide = cv2.dilate(drawn.mask, np.ones((3, 3), np.uint8))
        beside = (cv2.dilate(wide, np.ones((7, 7), np.uint8)) > 0) & (wide == 0) & (drawn.fov > 0)
        green = drawn.photo[..., 1].astype(float)
        assert green[drawn.mask > 0].mean() < green[beside].mean() - 4


def test_mask_and_photo_lie_on_one_another(large):
    """Half a pixel of offset between truth and photo would cap every score: no shift may fit better than none."""

    def depth(drawn, dx, dy):
        green = drawn.photo[..., 1].astype(np.float32)
        local = cv2.GaussianBlur(green, (0, 0), 8) - green
        core = cv2.erode(drawn.fov, np.ones((31, 31), np.uint8)) > 0
        return (local * (np.roll(drawn.mask, (dy, dx), (0, 1)) > 0))[core].sum()

    for drawn in large:
        fit = {(dx, dy): depth(drawn, dx, dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)}
        assert max(fit, key=fit.get) == (0, 0)
        # and it falls off alike on both sides
        sides = [fit[0, 0] - fit[step] for step in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        assert max(sides[:2]) < 2 * min(sides[:2])
        assert max(sides[2:]) < 2 * min(sides[2:])


def test_a_plain_threshold_does_not_find_the_vessels():
    """The best single cut of the green channel, raw or less its background, stays far below what a network reaches."""

    def scores(drawn):
        inside = drawn.fov > 0
        green = drawn.photo[..., 1].astype(np.float32)
        weight = inside.astype(np.float32)
        sigma = drawn.fov.shape[0] / 40
        background = cv2.GaussianBlur(green * weight, (0, 0), sigma) / (cv2.GaussianBlur(weight, (0, 0), sigma) + 1e-6)
        return {"green": 255 - green[inside], "background": (background - green)[inside]}, drawn.mask[inside] > 0

    def gather(seeds):
        drawn = [scores(draw_photo(seed)) for seed in seeds]
        truth = np.concatenate([t for _, t in drawn])
        return {name: np.concatenate([s[name] for s, _ in drawn]) for name in ("green", "background")}, truth

    train, train_truth = gather(range(100, 105))
    test, test_truth = gather(range(200, 203))
    reached = {}
    for name in train:
        cuts = np.quantile(train[name], np.linspace(0.05, 0.995, 60))
        best = max(cuts, key=lambda cut, name=name: f1(train[name], train_truth, cut))
        reached[name] = f1(test[name], test_truth, best)
    assert reached["green"] < 0.45
    assert 0.5 < reached["background"] < 0.75  # but the vessels are there to be seen


def test_write_set_writes_the_layout(tmp_path):
    root = write_set(tmp_path / "new" / "set", train=3, test=2, size=(80, 100), seed=4, progress=False)
    assert root == tmp_path / "new" / "set"
    expected = {
        f"{part}/{folder}/{i}.png" for part, n in (("train", 3), ("test", 2)) for folder in FOLDERS for i in range(n)
    }
    found = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert found == expected | {"photos.csv"}  # and so no temporary file is left
    with (root / "photos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["part", "name", "photo", "variant", "source"]
    assert [(r["part"], r["name"], r["photo"], r["variant"]) for r in rows] == [
        (part, str(i), str(i), "0") for part, n in (("train", 3), ("test", 2)) for i in range(n)
    ]
    for row in rows:  # each file is the photo that the table says, its colours in a viewer's order
        drawn = draw_photo(int(row["source"].removeprefix("synthetic seed ")), 80, 100)
        folder = root / row["part"]
        photo = cv2.imread(str(folder / "image" / f"{row['name']}.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(photo[..., ::-1], drawn.photo)
        for name, truth in (("mask", drawn.mask), ("fov", drawn.fov)):
            assert np.array_equal(cv2.imread(str(folder / name / f"{row['name']}.png"), cv2.IMREAD_UNCHANGED), truth)


def test_no_photo_is_in_two_parts_or_two_sets(tmp_path):
    photos = []
    for seed in (0, 1):
        write_set(tmp_path / str(seed), train=3, test=3, size=(64, 64), seed=seed, progress=False)
        photos += [path.read_bytes() for path in (tmp_path / str(seed)).rglob("image/*.png")]
    assert len(set(photos)) == len(photos) == 12


def test_a_set_is_the_same_on_every_run(tmp_path):
    for name in "ab":
        write_set(tmp_path / name, train=1, test=1, size=(64, 64), seed=3, progress=False)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 7
    assert all((tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes() for file in files)


def test_write_set_refuses_a_place_in_use_and_leaves_it_alone(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("mine")
    for place in (tmp_path, own):
        with pytest.raises(FileExistsError, match=f"{place.name} .*empty it, or choose another"):
            write_set(place, train=1, test=1, size=(64, 64), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]
    assert own.read_text() == "mine"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_set(empty, train=1, test=0, size=(64, 64), progress=False) == empty


@pytest.mark.parametrize(
    "wrong", [{"size": (32, 64)}, {"train": -1}, {"test": 500_001}, {"seed": -1}], ids=lambda wrong: next(iter(wrong))
)
def test_write_set_checks_before_it_writes(tmp_path, wrong):
    with pytest.raises(ValueError):
        write_set(tmp_path / "set", **{"train": 1, "test": 1, "size": (64, 64), "progress": False, **wrong})
    assert not (tmp_path / "set").exists()


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(synthetic.Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_set(tmp_path / "set", train=1, test=1, size=(64, 64), progress=False)
    assert not [path for path in (tmp_path / "set").rglob("*") if path.is_file()]


def test_write_set_shows_progress_when_asked(tmp_path, capsys):
    write_set(tmp_path / "quiet", train=1, test=0, size=(64, 64), progress=False)
    assert capsys.readouterr().err == ""
    write_set(tmp_path / "loud", train=1, test=0, size=(64, 64))
    assert "1/1" in capsys.readouterr().err
