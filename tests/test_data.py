"""Sets on disk, pairs, groups of one photo's variants, splits, the original's dataset, and augmentation."""

import csv
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from retina_seg.data import (
    Augmentation,
    DriveDataset,
    Pair,
    TrainingPhotos,
    WholePhotos,
    augment_colour,
    augment_geometry,
    find_set,
    is_empty,
    list_pairs,
    load_fov,
    load_pair,
    load_with_fov,
    read_mask,
    split_by_photo,
    to_scale,
    to_tensor,
)
from retina_seg.fov import find_fov, fov_box, fov_diameter
from retina_seg.images import write_picture
from retina_seg.utils import UserError

STILL = Augmentation(
    rotate=0, flip=False, scale=0, stretch=0, bend=0, gamma=0, contrast=0, light=0, cast=0, grey=0, shade=0, blur=0,
    noise=0, exact=0,
)  # fmt: skip


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def disc(side, radius, centre=None):
    row, column = centre or ((side - 1) / 2, (side - 1) / 2)
    y, x = np.ogrid[0:side, 0:side]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def eye(side=121, diameter=101, seed=0, centre=None):
    """(photo, label, fov): a textured orange disc on black with a bright cross as its vessel."""
    fov = disc(side, (diameter - 1) / 2, centre)
    label = np.zeros((side, side), np.uint8)
    label[side // 2 - 2 : side // 2 + 2], label[:, side // 3 : side // 3 + 3] = 255, 255
    label[~fov] = 0
    photo = 60 + noise(side, side, 3, seed=seed) // 2
    photo[label > 0] //= 2
    photo[~fov] = 0
    return photo, label, fov


def write(folder, part, kind, names, pictures=None):
    (folder / part / kind).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        picture = pictures[i] if pictures else noise(*((6, 8, 3) if kind == "image" else (6, 8)), seed=i)
        write_picture(folder / part / kind / name, picture)


@pytest.fixture
def data1(tmp_path):
    """A small set in the Data1 layout, its names in an order that spelling would get wrong."""
    for part, names in (("train", ["1.png", "2.png", "10.png"]), ("test", ["0.png"])):
        write(tmp_path / "set", part, "image", names)
        write(tmp_path / "set", part, "mask", names)
    return tmp_path / "set"


def pair_on_disk(folder, name, photo, label, fov=None):
    write_picture(folder / f"{name}.png", photo)
    write_picture(folder / f"{name}_mask.png", label)
    if fov is not None:
        write_picture(folder / f"{name}_fov.png", fov.astype(np.uint8) * 255)
    return Pair(
        name,
        folder / f"{name}.png",
        folder / f"{name}_mask.png",
        name,
        name,
        folder / f"{name}_fov.png" if fov is not None else None,
    )


# ------------------------------------------------------------------------------------------------------------------ sets


@pytest.mark.parametrize("nesting", ["", "archive", "a/b", "a/b c/d"])
def test_a_set_is_found_where_archives_put_it(tmp_path, nesting):
    root = tmp_path / "Data1"
    write(root / nesting, "test", "image", ["0.png"])
    assert find_set(str(root)) == root / nesting


def test_a_set_deeper_than_three_folders_is_not_searched_for(tmp_path):
    write(tmp_path / "a/b/c/d", "train", "image", ["0.png"])
    with pytest.raises(UserError, match="no train/image or test/image"):
        find_set(tmp_path)


def test_files_beside_the_folders_do_not_disturb_the_search(tmp_path):
    (tmp_path / "README.md").write_text("x")
    write(tmp_path / "inner", "train", "image", ["0.png"])
    assert find_set(tmp_path) == tmp_path / "inner"


def test_of_several_sets_one_must_be_named(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name, "train", "image", ["0.png"])
    with pytest.raises(UserError, match="several sets.*one.*two"):
        find_set(tmp_path)
    assert find_set(tmp_path / "two") == tmp_path / "two"


def test_no_set_and_no_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no train/image or test/image"):
        find_set(tmp_path)
    with pytest.raises(UserError, match="missing: no such folder"):
        find_set(tmp_path / "missing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="no such folder"):
        find_set(tmp_path / "file")


@pytest.mark.parametrize("raw", ["training/images/21_training.tif", "Image_01L.jpg"])
def test_a_set_as_published_is_recognised(tmp_path, raw):
    (tmp_path / raw).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / raw).write_bytes(b"")
    with pytest.raises(UserError, match="retina-seg prepare"):
        find_set(tmp_path)


def test_a_folder_is_empty_until_a_picture_lies_somewhere_in_it(tmp_path):
    assert is_empty(tmp_path / "missing")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "train" / "image").mkdir(parents=True)
    assert is_empty(tmp_path)
    write(tmp_path, "train", "image", ["0.png"])
    assert not is_empty(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        is_empty(tmp_path / "README.md")


# ----------------------------------------------------------------------------------------------------------------- pairs


def test_pairs_come_in_natural_order_each_with_its_own_mask(data1):
    pairs = list_pairs(data1, "train")
    assert [pair.name for pair in pairs] == ["1", "2", "10"]
    for pair in pairs:
        assert pair.image == data1 / "train" / "image" / f"{pair.name}.png"
        assert pair.mask == data1 / "train" / "mask" / f"{pair.name}.png"
        assert (pair.fov, pair.mask_2nd) == (None, None)
    assert [pair.name for pair in list_pairs(data1, "test")] == ["0"]


def test_pairs_are_matched_by_name_whatever_the_ending(tmp_path):
    write(tmp_path, "test", "image", ["a.png", "b.tif", "c d.jpg"])
    write(tmp_path, "test", "mask", ["c d.png", "b.gif", "a.bmp"])
    assert [(pair.image.name, pair.mask.name) for pair in list_pairs(tmp_path, "test")] == [
        ("a.png", "a.bmp"),
        ("b.tif", "b.gif"),
        ("c d.jpg", "c d.png"),
    ]


def test_fields_of_view_and_second_observers_are_taken_where_they_are(data1):
    write(data1, "train", "fov", ["2.png", "10.gif"], [noise(6, 8)] * 2)
    write(data1, "train", "mask_2nd", ["1.png"], [noise(6, 8)])
    first, second, tenth = list_pairs(data1, "train")
    assert (first.fov, first.mask_2nd) == (None, data1 / "train/mask_2nd/1.png")
    assert (second.fov, second.mask_2nd) == (data1 / "train/fov/2.png", None)
    assert tenth.fov == data1 / "train/fov/10.gif"


@pytest.mark.parametrize(("kind", "other"), [("image", "mask"), ("mask", "image")])
def test_a_file_without_its_partner_is_named_both_ways(data1, kind, other):
    (data1 / "train" / other / "2.png").unlink()
    with pytest.raises(UserError, match="has no partner") as caught:
        list_pairs(data1, "train")
    assert str(caught.value).startswith(str(data1 / "train" / kind / "2.png"))
    assert str(data1 / "train" / other / "2.*") in str(caught.value)
    (data1 / "train" / other / "10.png").unlink()
    with pytest.raises(UserError, match=r"2\.png.*and 1 more"):
        list_pairs(data1, "train")


def test_an_empty_folder_is_an_error_not_a_set_of_nought(data1):
    for path in (data1 / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="image: holds no pictures"):
        list_pairs(data1, "test")


@pytest.mark.parametrize("kind", ["image", "mask"])
def test_two_files_of_one_name_are_refused(data1, kind):
    write(data1, "train", kind, ["2.bmp"])
    with pytest.raises(UserError, match=f"{kind}: two files are called 2"):
        list_pairs(data1, "train")


def test_a_missing_part_or_kind_is_named(data1):
    with pytest.raises(UserError, match="validation.*no such folder"):
        list_pairs(data1, "validation")
    for path in (data1 / "test" / "mask").iterdir():
        path.unlink()
    (data1 / "test" / "mask").rmdir()
    with pytest.raises(UserError, match="mask: no such folder"):
        list_pairs(data1, "test")


def test_hidden_twins_of_other_systems_are_no_photos(data1):
    for kind in ("image", "mask"):
        (data1 / "train" / kind / "._1.png").write_bytes(b"junk")
    assert len(list_pairs(data1, "train")) == 3


# ---------------------------------------------------------------------------------------------------------------- groups


def fours(folder, count=8, second=lambda photo: photo[:, ::-1]):
    """Files 0 to count - 1 as the Kaggle set has them: a photo, its mirror image, and two more."""
    photos = [noise(6, 8, 3, seed=k) for k in range(count)]
    pictures = [[photos[k // 4], second(photos[k // 4]), photos[k // 4][::-1], photos[k]][k % 4] for k in range(count)]
    names = [f"{k}.png" for k in range(count)]
    for part in ("train", "test"):
        write(folder, part, "image", names, [np.ascontiguousarray(picture) for picture in pictures])
        write(folder, part, "mask", names)
    return folder


def groups(folder, part="train"):
    return [pair.photo for pair in list_pairs(folder, part)]


def test_four_files_in_a_row_are_one_photo_where_the_second_mirrors_the_first(tmp_path):
    assert groups(fours(tmp_path, 12)) == ["0"] * 4 + ["1"] * 4 + ["2"] * 4


def test_the_test_part_is_never_grouped_by_order(tmp_path):
    assert groups(fours(tmp_path), "test") == [str(k) for k in range(8)]


@pytest.mark.parametrize("second", [lambda photo: photo, lambda photo: photo[::-1], lambda photo: photo[:, ::-1] // 2])
def test_without_a_mirror_image_every_file_is_its_own_photo(tmp_path, second):
    assert groups(fours(tmp_path, second=second)) == [str(k) for k in range(8)]


@pytest.mark.parametrize("gone", [[7], [4, 5, 6, 7, 0], [0, 1, 2, 3]])
def test_a_numbering_with_gaps_is_not_grouped(tmp_path, gone):
    fours(tmp_path)
    for k in gone:
        for kind in ("image", "mask"):
            (tmp_path / "train" / kind / f"{k}.png").unlink()
    assert len(set(groups(tmp_path))) == 8 - len(gone)


def test_other_names_are_not_grouped(tmp_path):
    fours(tmp_path)
    for kind in ("image", "mask"):
        (tmp_path / "train" / kind / "7.png").rename(tmp_path / "train" / kind / "seven.png")
    assert len(set(groups(tmp_path))) == 8


def test_a_table_of_photos_goes_before_the_order(tmp_path):
    fours(tmp_path)
    rows = [("train", str(k), f"person {k % 3}") for k in range(6)] + [("test", "7", "someone")]
    with open(tmp_path / "photos.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("part", "name", "photo"), *rows])
    assert groups(tmp_path) == ["person 0", "person 1", "person 2"] * 2 + ["6", "7"]
    assert groups(tmp_path, "test") == [*map(str, range(7)), "someone"]


@pytest.mark.parametrize("content", [b"a,b,c\n1,2,3\n", b"part,name\ntrain,1\n", b"\xff\xfe\x00\x01\n"])
def test_a_table_without_its_columns_is_refused(data1, content):
    (data1 / "photos.csv").write_bytes(content)
    with pytest.raises(UserError, match="photos.csv.*part, name, photo"):
        list_pairs(data1, "train")


# ---------------------------------------------------------------------------------------------------------------- splits


def variants(photos, each):
    return [Pair(f"{k}_{v}", None, None, str(k), str(k)) for k in range(photos) for v in range(each)]


def test_no_photo_is_on_both_sides_whatever_the_seed():
    pairs = variants(20, 4)
    for seed in range(200):
        training, validation = split_by_photo(pairs, 0.2, seed)
        assert {pair.photo for pair in training}.isdisjoint(pair.photo for pair in validation)
        assert len(validation) == 16
        assert sorted(training + validation, key=pairs.index) == pairs


@pytest.mark.parametrize(
    ("validation", "photos", "held_out"), [(1, 5, 1), (4, 5, 4), (0.25, 20, 5), (0.01, 20, 1), (0.5, 2, 1), (0.2, 3, 1)]
)
def test_a_count_is_of_photos_and_a_fraction_of_all_of_them(validation, photos, held_out):
    training, rest = split_by_photo(variants(photos, 3), validation, 1)
    assert len({pair.photo for pair in rest}) == held_out
    assert (len(training), len(rest)) == (3 * (photos - held_out), 3 * held_out)


def test_both_eyes_of_a_person_stay_on_one_side():
    eyes = [Pair(f"{k}{eye}", None, None, f"{k}{eye}", str(k)) for k in range(14) for eye in "LR"]
    for seed in range(50):
        training, validation = split_by_photo(eyes, 3, seed)
        assert len(validation) == 6
        assert {pair.subject for pair in training}.isdisjoint(pair.subject for pair in validation)


def test_both_sides_keep_the_order_of_the_pairs():
    pairs = variants(6, 2)
    for side in split_by_photo(pairs, 0.5, 3):
        assert side == sorted(side, key=pairs.index)


def test_a_seed_is_a_split_and_another_seed_another_one():
    pairs = variants(20, 4)
    assert split_by_photo(pairs, 5, 7) == split_by_photo(list(pairs), 5, 7)
    chosen = {frozenset(pair.photo for pair in split_by_photo(pairs, 5, seed)[1]) for seed in range(20)}
    assert len(chosen) > 15
    shuffled = pairs[::3] + pairs[1::3] + pairs[2::3]  # the order of the files does not choose
    assert {p.photo for p in split_by_photo(shuffled, 5, 7)[1]} == {p.photo for p in split_by_photo(pairs, 5, 7)[1]}


@pytest.mark.parametrize("validation", [0, 5, 6, -1, 1.0, 0.95])
def test_a_split_that_leaves_a_side_empty_is_refused(validation):
    with pytest.raises(UserError, match="of 5 photos"):
        split_by_photo(variants(5, 4), validation, 0)


def test_one_photo_cannot_be_split():
    with pytest.raises(UserError, match="of 1 photos"):
        split_by_photo(variants(1, 4), 0.25, 0)


# ----------------------------------------------------------------------------------------------------- original's dataset


def test_the_dataset_keeps_the_originals_contract(tmp_path):
    photo, mask = noise(9, 14, 3), noise(9, 14, seed=1)
    pair = pair_on_disk(tmp_path, "a", photo, mask)
    dataset = DriveDataset([str(pair.image)], [pair.mask])
    assert len(dataset) == 1
    x, y = dataset[0]
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((3, 9, 14), torch.float32, (1, 9, 14), torch.float32)
    bgr = cv2.imread(str(pair.image), cv2.IMREAD_COLOR)  # as the original reads
    assert np.array_equal(x.numpy(), (bgr / np.float32(255)).transpose(2, 0, 1))
    assert np.array_equal(x[0].numpy(), photo[..., 2] / np.float32(255))  # blue first
    assert np.array_equal(y[0].numpy(), mask / np.float32(255))  # fractions stay
    assert len(np.unique(y)) > 50


def test_item_i_is_pair_i(tmp_path):
    pairs = [
        pair_on_disk(tmp_path, str(k), np.full((4, 4, 3), 10 * k, np.uint8), np.full((4, 4), 100 + k, np.uint8))
        for k in range(3)
    ]
    dataset = DriveDataset([pair.image for pair in pairs], [pair.mask for pair in pairs])
    for k in range(3):
        x, y = dataset[k]
        assert (round(x.max().item() * 255), round(y.min().item() * 255)) == (10 * k, 100 + k)


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (30, 40)])
def test_a_size_is_cv2s_resize_of_photo_and_mask(tmp_path, size):
    photo, mask = noise(20, 25, 3), noise(20, 25, seed=1)
    pair = pair_on_disk(tmp_path, "a", photo, mask)
    x, y = DriveDataset([pair.image], [pair.mask], size)[0]
    assert torch.equal(x, to_tensor(cv2.resize(photo, size[::-1])))
    assert np.array_equal(y[0].numpy(), cv2.resize(mask, size[::-1]) / np.float32(255))


def test_the_size_a_photo_has_changes_nothing(tmp_path):
    pair = pair_on_disk(tmp_path, "a", noise(20, 25, 3), noise(20, 25))
    plain, sized = (DriveDataset([pair.image], [pair.mask], size)[0] for size in (None, (20, 25)))
    assert all(torch.equal(a, b) for a, b in zip(plain, sized, strict=True))


def test_to_tensor_turns_rgb_to_bgr():
    red = np.zeros((2, 3, 3), np.uint8)
    red[..., 0] = 255
    tensor = to_tensor(red)
    assert tensor.shape == (3, 2, 3)
    assert tensor.amax(dim=(1, 2)).tolist() == [0, 0, 1]


def test_lists_of_two_lengths_and_empty_ones_are_refused():
    with pytest.raises(UserError, match="2 photos but 1 masks"):
        DriveDataset(["a", "b"], ["c"])
    with pytest.raises(UserError, match="empty"):
        DriveDataset([], [])


def test_a_pair_of_two_sizes_is_refused_naming_both_files(tmp_path):
    pair = pair_on_disk(tmp_path, "a", noise(4, 6, 3), noise(6, 4))
    for use in (lambda: load_pair(pair.image, pair.mask), lambda: DriveDataset([pair.image], [pair.mask], (8, 8))[0]):
        with pytest.raises(UserError, match="6x4 and 4x6") as caught:
            use()
        assert "a.png" in str(caught.value)
        assert "a_mask.png" in str(caught.value)


def test_a_mask_of_noughts_and_ones_is_taken_as_black_and_white(tmp_path):
    ones = np.array([[0, 1], [1, 0]], np.uint8)
    for stored, expected in ((ones, ones * 255), (ones * 2, ones * 2), (ones * 0, ones * 0), (ones * 255, ones * 255)):
        write_picture(tmp_path / "mask.png", stored)
        assert np.array_equal(read_mask(tmp_path / "mask.png"), expected)


# ------------------------------------------------------------------------------------------------------------- geometry


def smooth(side=128, seed=0):
    """A photo of soft blobs that fades to black at the frame: two interpolations of it hardly differ."""
    values = np.random.default_rng(seed).normal(size=(side, side, 3)).astype(np.float32)
    values = cv2.GaussianBlur(values, (0, 0), 4)
    window = np.hanning(side)[:, None, None] * np.hanning(side)[None, :, None]
    return np.clip((128 + values * 70 / values.std()) * np.sqrt(window), 0, 255).astype(np.uint8)


GEOMETRIES = {
    "as it is": STILL,
    "quarter turns": replace(STILL, exact=1, flip=True),
    "turned": replace(STILL, rotate=180),
    "mirrored": replace(STILL, flip=True),
    "scaled": replace(STILL, scale=0.2),
    "stretched": replace(STILL, stretch=0.2),
    "bent": replace(STILL, bend=4),
    "all": Augmentation(),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_photo_and_label_move_together(name):
    photo = smooth()
    label = photo[..., 1].copy()
    fov = np.ones(label.shape, bool)
    for seed in range(8):
        window, moved = augment_geometry(photo, label, fov, 90, GEOMETRIES[name], np.random.default_rng(seed))
        assert (window.shape, window.dtype, moved.shape, moved.dtype) == ((90, 90, 3), np.uint8, (90, 90), np.uint8)
        apart = np.abs(window[..., 1].astype(int) - moved)
        assert apart.mean() < 1
        assert apart.max() <= 12
        assert np.abs(window[:, ::-1, 1].astype(int) - moved).mean() > 5  # a label left behind would show


@pytest.mark.parametrize("name", [name for name in GEOMETRIES if name != "as it is"])
def test_every_step_moves_something(name):
    photo = smooth()
    fov = np.zeros(photo.shape[:2], bool)
    fov[60:68, 60:68] = True  # the window's middle hardly moves, so that the rest must
    how = GEOMETRIES[name]
    apart = []
    for seed in range(8):
        still, moved = (
            augment_geometry(photo, photo[..., 0], fov, 64, step, np.random.default_rng(seed))[0].astype(int)
            for step in (replace(STILL, exact=0), how)
        )
        apart.append(np.abs(still - moved).mean())
    assert max(apart) > 5


def addressed(height, width):
    """A photo whose red and green say which row and column a pixel is, from 1; black beyond the frame is nought."""
    y, x = np.mgrid[1 : height + 1, 1 : width + 1]
    return np.stack([y, x, np.full_like(x, 9)], axis=2).astype(np.uint8)


def dihedral(window):
    for turned in (window, window[:, ::-1]):
        for quarters in range(4):
            yield np.rot90(turned, quarters)


def places_in(window, photo):
    """Which of the eight turned and mirrored views of `photo`, padded with black, hold `window` to the pixel."""
    crop = window.shape[0]
    found = []
    padded = np.pad(photo, [(crop, crop), (crop, crop), (0, 0)])
    for i, view in enumerate(dihedral(window)):
        row, column = np.argwhere(view[..., 2] > 0)[0]
        top, left = view[row, column, 0] - 1 - row + crop, view[row, column, 1] - 1 - column + crop
        if np.array_equal(padded[top : top + crop, left : left + crop], view):
            found.append(i)
    return found


@pytest.mark.parametrize(
    ("height", "width", "crop"), [(60, 80, 32), (60, 80, 33), (41, 37, 24), (30, 30, 48), (31, 30, 47)]
)
def test_exact_draws_keep_every_pixel_in_all_eight_positions(height, width, crop):
    photo = addressed(height, width)
    how, fov = replace(Augmentation(), exact=1), np.ones((height, width), bool)
    views = []
    for seed in range(60):
        window, label = augment_geometry(photo, photo[..., 1], fov, crop, how, np.random.default_rng(seed))
        assert np.array_equal(window[..., 1], label)
        places = places_in(window, photo)
        assert len(places) == 1
        views += places
    assert set(views) == set(range(8))


def test_without_flip_no_draw_is_mirrored():
    photo = addressed(50, 50)
    how, fov = replace(Augmentation(), exact=1, flip=False), np.ones((50, 50), bool)
    windows = [
        augment_geometry(photo, photo[..., 0], fov, 20, how, np.random.default_rng(seed))[0] for seed in range(30)
    ]
    views = {view for window in windows for view in places_in(window, photo)}
    assert views == {0, 1, 2, 3}


def test_windows_stay_near_the_field_of_view():
    fov = disc(200, 40, (60, 130))
    photo = addressed(200, 200)
    for seed in range(30):
        window, _ = augment_geometry(
            photo, photo[..., 0], fov, 32, replace(STILL, exact=0), np.random.default_rng(seed)
        )
        rows, columns = window[..., 0][window[..., 2] > 0], window[..., 1][window[..., 2] > 0]
        assert abs(rows.mean() - 60) < 40
        assert abs(columns.mean() - 130) < 40


def test_beyond_the_frame_a_window_is_black():
    white = np.full((20, 20, 3), 255, np.uint8)
    for how in (STILL, replace(STILL, exact=1), replace(STILL, bend=1)):
        window, label = augment_geometry(
            white, white[..., 0], np.ones((20, 20), bool), 64, how, np.random.default_rng(0)
        )
        for corner in (window[:8, :8], window[-8:, -8:], label[:8, :8], label[-8:, -8:]):
            assert not corner.any()
        assert (window[28:36, 28:36] == 255).all()


# --------------------------------------------------------------------------------------------------------------- colours


def test_colours_stay_in_range_and_keep_shape_and_type():
    photo = eye()[0].astype(np.float32) / 255
    wild = Augmentation(gamma=0.8, contrast=0.8, light=0.6, cast=0.5, grey=1.0, shade=0.6, blur=2, noise=0.2)
    for how in (Augmentation(), wild):
        for seed in range(10):
            changed = augment_colour(photo, how, np.random.default_rng(seed))
            assert (changed.shape, changed.dtype) == (photo.shape, np.float32)
            assert np.isfinite(changed).all()
            assert 0 <= changed.min() < changed.max() <= 1


def test_the_black_surround_stays_black():
    photo, _, fov = eye()
    photo = photo.astype(np.float32) / 255
    for seed in range(20):
        changed = augment_colour(photo, replace(Augmentation(), blur=0, noise=0), np.random.default_rng(seed))
        assert not changed[~fov].any()
        assert changed[fov].mean() > 0.05
        noisy = augment_colour(photo, Augmentation(), np.random.default_rng(seed))
        assert noisy[:8, :8].mean() < 0.02


def test_with_every_step_off_colours_stay():
    photo = eye()[0].astype(np.float32) / 255
    np.testing.assert_allclose(augment_colour(photo, STILL, np.random.default_rng(0)), photo, atol=1e-6)


@pytest.mark.parametrize(
    "step",
    [
        {"gamma": 0.3},
        {"contrast": 0.3},
        {"light": 0.3},
        {"cast": 0.3},
        {"grey": 0.8},
        {"shade": 0.3},
        {"blur": 2},
        {"noise": 0.1},
    ],
)
def test_every_step_alone_changes_colours(step):
    photo = eye()[0].astype(np.float32) / 255
    changed = [augment_colour(photo, replace(STILL, **step), np.random.default_rng(seed)) for seed in range(12)]
    moved = [np.abs(one - photo).mean() for one in changed]
    assert max(moved) > 0.01
    if step.keys() & {"blur", "noise"}:  # these in half of the draws
        assert 2 <= sum(change < 1e-6 for change in moved) <= 10


def test_a_black_photo_passes_through_all_steps():
    for seed in range(4):
        changed = augment_colour(np.zeros((9, 7, 3), np.float32), Augmentation(noise=0), np.random.default_rng(seed))
        assert not changed.any()


# ----------------------------------------------------------------------------------------------------- photos to train on


@pytest.fixture
def three(tmp_path):
    """Three photos of diameters 61, 81 and 121, with their fields of view."""
    return [pair_on_disk(tmp_path, str(d), *eye(d + 20, d, seed=d)) for d in (61, 81, 121)]


def test_the_diameter_is_the_median_of_the_photos_unless_given(three):
    assert TrainingPhotos(three, None, 32).diameter == 81
    assert TrainingPhotos(three, 70.0, 32).diameter == 70


def test_photos_are_brought_to_one_scale(three):
    for diameter in (81, 50):
        for photo, label, fov in TrainingPhotos(three, diameter, 32).photos:
            assert abs(fov_diameter(fov) / diameter - 1) < 0.03
            assert photo.shape[:2] == label.shape == fov.shape
            assert (photo.dtype, label.dtype, fov.dtype) == (np.uint8, np.uint8, bool)


@pytest.mark.parametrize("crop", [32, 45, 200])
def test_windows_have_the_form_the_networks_are_fed(three, crop):
    dataset = TrainingPhotos(three, None, crop, repeats=2)
    assert len(dataset) == 6
    for i in range(6):
        x, y = dataset[i]
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((3, crop, crop), torch.float32, (1, crop, crop), torch.float32)
        assert 0 <= x.min() < x.max() <= 1
        assert 0 <= y.min() <= y.max() <= 1


def test_windows_are_bgr_with_the_label_in_place(tmp_path):
    photo, label, fov = eye(65, 63)
    photo = np.where(fov[..., None], np.array([200, 100, 50], np.uint8), 0).astype(np.uint8)
    photo[label > 0] = (40, 20, 10)
    pair = pair_on_disk(tmp_path, "a", photo, label, fov)
    dataset = TrainingPhotos([pair], None, 48, repeats=5, how=replace(STILL, exact=1, flip=True))
    for i in range(5):
        x, y = dataset[i]
        vessel = y[0] > 0.5
        assert vessel.any()
        lit = x.amax(dim=0) > 0
        for mask, colour in ((vessel & lit, (10, 20, 40)), (~vessel & lit, (50, 100, 200))):
            expected = torch.tensor(colour).float()[:, None].expand(3, int(mask.sum())) / 255
            torch.testing.assert_close(x[:, mask], expected, atol=1e-5, rtol=0)


def same(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_an_item_depends_on_seed_epoch_and_index_alone(three):
    first, second = (TrainingPhotos(three, None, 32, repeats=2, seed=5) for _ in range(2))
    order = [4, 0, 5, 1, 0, 2]
    drawn = {i: second[i] for i in order}  # in another order, some twice
    np.random.seed(0)
    assert all(same(first[i], drawn[i]) for i in order)
    other_seed = TrainingPhotos(three, None, 32, repeats=2, seed=6)
    assert not any(same(first[i], other_seed[i]) for i in range(6))
    assert not any(same(first[i], first[i + 3]) for i in range(3))  # a photo's repeats are fresh draws
    before = [first[i] for i in range(6)]
    first.epoch = 1
    assert not any(same(first[i], before[i]) for i in range(6))
    first.epoch = 0
    assert all(same(first[i], before[i]) for i in range(6))


def test_loader_workers_give_the_same_items(three):
    dataset = TrainingPhotos(three, None, 32)
    plain, workers = (list(torch.utils.data.DataLoader(dataset, 1, num_workers=n)) for n in (0, 1))
    assert all(same(a, b) for a, b in zip(plain, workers, strict=True))


@pytest.mark.parametrize("stride", [4, 8, 32])
def test_whole_photos_are_cut_to_the_field_of_view_and_padded_with_black(three, stride):
    dataset = WholePhotos(three, 81, stride)
    assert len(dataset) == 3
    for i, pair in enumerate(three):
        x, y = dataset[i]
        photo, label, fov = to_scale(*load_with_fov(pair), 81)
        top, left, bottom, right = fov_box(fov)
        height, width = bottom - top, right - left
        assert x.shape == (3, *(2 * stride + side + -side % stride for side in (height, width)))
        assert y.shape == (1, *x.shape[1:])
        inside = (..., slice(stride, stride + height), slice(stride, stride + width))
        assert torch.equal(x[inside], to_tensor(photo[top:bottom, left:right]))
        assert np.array_equal(y[inside][0].numpy(), label[top:bottom, left:right] / np.float32(255))
        x[inside], y[inside] = 0, 0
        assert not x.any() and not y.any()


@pytest.mark.parametrize("share", [0.975, 1.0, 1.025])
def test_within_three_percent_nothing_is_resized(share):
    item = eye(121, 101)
    assert all(a is b for a, b in zip(to_scale(*item, 101 * share), item, strict=True))


@pytest.mark.parametrize("share", [0.5, 0.96, 1.04, 2.0])
def test_beyond_it_photo_label_and_field_are_scaled_alike(share):
    photo, label, fov = to_scale(*eye(121, 101), 101 * share)
    side = round(121 * share)
    assert (photo.shape, label.shape, fov.shape) == ((side, side, 3), (side, side), (side, side))
    assert abs(fov_diameter(fov) - 101 * share) <= 1.5 * max(1, share)
    assert (photo.dtype, label.dtype, fov.dtype) == (np.uint8, np.uint8, bool)
    cross = eye(121, 101)[1] > 0
    assert (label / 255).mean() == pytest.approx(cross.mean(), rel=0.06)


def test_a_photo_of_another_shape_keeps_it():
    photo, label, fov = noise(60, 90, 3), noise(60, 90), np.ones((60, 90), bool)
    assert [a.shape[:2] for a in to_scale(photo, label, fov, 45)] == [(30, 45)] * 3


def test_the_sets_own_field_of_view_goes_before_a_found_one(tmp_path):
    photo, label, fov = eye()
    own = np.zeros_like(fov)
    own[10:60, 20:50] = True
    with_own, without = pair_on_disk(tmp_path, "a", photo, label, own), pair_on_disk(tmp_path, "b", photo, label)
    assert np.array_equal(load_fov(with_own, photo), own)
    found = load_fov(without, photo)
    assert np.array_equal(found, find_fov(photo))
    assert 2 * (found & fov).sum() / (found.sum() + fov.sum()) > 0.97
    for loaded, expected in zip(load_with_fov(with_own), (photo, label, own), strict=True):
        assert np.array_equal(loaded, expected)


def test_a_field_of_view_of_another_size_is_refused_naming_both(tmp_path):
    photo, label, _ = eye()
    pair = pair_on_disk(tmp_path, "a", photo, label, np.ones((5, 5), bool))
    with pytest.raises(UserError, match="a_fov.png.*differs in size.*a.png"):
        load_with_fov(pair)


# -------------------------------------------------------------------------------------------------------------- real sets


@pytest.mark.real
def test_the_kaggle_set_is_grouped_in_fours_and_split_without_a_leak(real_data):
    pairs = list_pairs(real_data / "Data1", "train")
    assert [pair.photo for pair in pairs] == [str(k // 4) for k in range(80)]
    training, validation = split_by_photo(pairs, 0.2, 42)
    assert (len(training), len(validation)) == (64, 16)
    assert len(list_pairs(real_data / "Data1", "test")) == 20


@pytest.mark.real
def test_the_dataset_makes_the_kaggle_test_photos_from_the_raw_ones(real_data):
    pair = list_pairs(real_data / "Data1", "test")[0]
    raw = real_data / "DRIVE" / "test"
    made = DriveDataset([raw / "images/01_test.tif"], [raw / "1st_manual/01_manual1.gif"], (512, 512))[0]
    assert same(made, DriveDataset([pair.image], [pair.mask])[0])
