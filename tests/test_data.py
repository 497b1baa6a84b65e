"""Datasets on disk, pairs, which files show one photo, splits without leaks, and the torch datasets."""

import csv
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import noise, write, write_pair

from retina_seg.data import DriveDataset, FrameDataset, PatchDataset, split_by_photo
from retina_seg.fov import find_fov, fov_diameter
from retina_seg.sets.files import match_names
from retina_seg.sets.layout import (
    Pair,
    check_apart,
    check_masks,
    collect_files,
    find_set,
    list_pairs,
    load_pair,
    load_with_fov,
)
from retina_seg.sets.synthetic import data_or_synthetic
from retina_seg.transforms import Augmentation, FovFrame, ResizeFrame, pad_to_stride, to_tensor
from retina_seg.utils import UserError


def eye(side=121, diameter=101, seed=0):
    """(image, mask, fov): a textured orange disc on black with a bright cross as its vessels."""
    y, x = np.ogrid[0:side, 0:side]
    fov = np.hypot(y - (side - 1) / 2, x - (side - 1) / 2) <= (diameter - 1) / 2
    mask = np.zeros((side, side), np.uint8)
    mask[side // 2 - 2 : side // 2 + 2], mask[:, side // 3 : side // 3 + 3] = 255, 255
    mask[~fov] = 0
    image = 60 + noise(side, side, 3, seed=seed) // 2
    image[mask > 0] //= 2
    image[~fov] = 0
    return image, mask, fov


def shades(*shape):
    """A mask of many values, mostly dark."""
    return np.where(noise(*shape) > 200, 255, noise(*shape) // 2).astype(np.uint8)


def write_all(folder, names, images=None):
    for i, name in enumerate(names):
        write(folder / name, images[i] if images else noise(*((6, 8, 3) if folder.name == "image" else (6, 8)), seed=i))


@pytest.fixture
def data1(tmp_path):
    """A small dataset in the Data1 layout, its names in an order that spelling would get wrong."""
    for kind in ("image", "mask"):
        write_all(tmp_path / "set/train" / kind, ["1.png", "2.png", "10.png"])
        write_all(tmp_path / "set/test" / kind, ["0.png"])
    return tmp_path / "set"


def test_a_dataset_is_found_where_archives_put_it_and_what_is_none_is_told_apart(tmp_path):
    for where in ("plain", "nested/a/b c/d", "both/one", "both/two", "deep/b/c/d/e"):
        write_all(tmp_path / where / "train/image", ["0.png"])
        if where != "deep/b/c/d/e":
            assert find_set(str(tmp_path / where.split("/a/")[0])) == tmp_path / where
    (tmp_path / "file").write_bytes(b"")
    said = {"deep": "no train/image or test/image(.|\n)*--masks", "file": "is an empty file",
            "both": "several datasets.*one.*two", "missing": "missing: no such folder"}  # fmt: skip
    for name, line in said.items():
        with pytest.raises(UserError, match=line):
            find_set(tmp_path / name)


def test_pairs_come_in_natural_order_matched_by_name_whatever_the_ending(data1):
    write_all(data1 / "train/image", ["a.tif", "c d.jpg"])
    write_all(data1 / "train/mask", ["c d.gif", "a.bmp"])
    write_all(data1 / "train/fov", ["2.png", "10.gif"])
    write_all(data1 / "train/mask_2nd", ["1.png"])
    for kind in ("image", "mask"):
        (data1 / "train" / kind / "._1.png").write_bytes(b"the hidden twin of another system")
    first, second, tenth, *_ = pairs = list_pairs(data1, "train")
    assert [path.parent for path in (tenth.image, tenth.mask)] == [data1 / "train/image", data1 / "train/mask"]
    assert [pair.image.name for pair in pairs] == ["1.png", "2.png", "10.png", "a.tif", "c d.jpg"]
    assert [pair.mask.name for pair in pairs] == ["1.png", "2.png", "10.png", "a.bmp", "c d.gif"]
    assert (first.fov, first.mask_2nd) == (None, data1 / "train/mask_2nd/1.png")
    assert (second.fov, second.mask_2nd) == (data1 / "train/fov/2.png", None)
    assert tenth.fov == data1 / "train/fov/10.gif"


@pytest.mark.parametrize(("kind", "other"), [("image", "mask"), ("mask", "image")])
def test_doubled_unpaired_empty_and_missing_files_are_errors(data1, kind, other):
    write_all(data1 / "train" / kind, ["2.bmp"])
    with pytest.raises(UserError, match=f"{kind}: two files are called 2"):
        list_pairs(data1, "train")
    train = data1 / "train"
    for path in (train / kind / "2.bmp", train / kind / "2.png", train / other / "10.png"):
        path.unlink()
    lines = collect_files(data1, "train").problems
    assert len(lines) == 2
    for here, there, name in ((kind, other, "10"), (other, kind, "2")):
        said = f"{train / here / name}.png: has no partner {train / there / name}.*"
        assert any(line.startswith(said) for line in lines)
    with pytest.raises(UserError, match="has no partner .*and 1 more"):
        list_pairs(data1, "train")
    (data1 / "test" / kind / "0.png").unlink()
    with pytest.raises(UserError, match=f"{kind}: holds no images"):
        list_pairs(data1, "test")
    (data1 / "test" / kind).rmdir()
    with pytest.raises(UserError, match=f"{kind}: no such folder"):
        list_pairs(data1, "test")


LAYOUTS = [  # images, masks, fields of view
    "{long}/images/{n}_{long}.tif {long}/1st_manual/{n}_manual1.gif {long}/mask/{n}_{long}_mask.gif",
    "{part}/Original/{n}_A.png {part}/Ground-truth/{n}_A.png", "{Part}/Image/{n}.png {Part}/Mask/{n}.png",
    "{long}/img/img{n}.png {long}/vessels/mask{n}.png", "images/{n}_dr.jpg manual1/{n}_dr.tif mask/{n}_dr_mask.tif",
    "images/{n}.png vessel-segmentations/{n}.png masks/{n}.gif", "images/Im_{n}L.png masks/Im_{n}L_1stHO.png",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_as_published_are_read_as_they_are(tmp_path, layout):
    expected = {"train": [], "test": []}
    for part, n in (("train", 1), ("test", 2), ("train", 11)):
        words = {"part": part, "Part": part.title(), "long": part.replace("train", "training"), "n": n}
        paths = [tmp_path / path for path in layout.format(**words).split()]
        for path in paths:
            write(path, noise(6, 8))
        for key in [part] if "part}" in layout.lower() or "long" in layout else expected:
            expected[key].append(paths)
    for part, files in expected.items():
        assert [[pair.image, pair.mask, *filter(None, [pair.fov])] for pair in list_pairs(tmp_path, part)] == files
    (paths[1].parent.parent / "labels").mkdir()
    with pytest.raises(UserError, match="its masks may be in .*labels"):
        list_pairs(tmp_path, "train")
    if "1st_manual" in layout:
        shutil.rmtree(tmp_path / "test/1st_manual")  # as DRIVE's site gives it: its fields of view are no vessel masks
        with pytest.raises(UserError, match="test/mask: is the field of view"):
            list_pairs(tmp_path, "test")


NAMES = {  # images and masks: how many pairs
    ("1 11", "1_mask 11_mask"): 2, ("1", "11_mask"): 0, ("10 20", "1 2"): 0, ("1 2", "1 2_mask"): 1,
    ("01L 01R", "01L_gt 01R_gt"): 2, ("01L 02L", "01R_gt 02R_gt"): 0, ("im1 im2", "im2_gt"): 1, ("image", "mask"): 0,
    ("21_training", "21_manual1"): 1, ("a_img_1", "a_seg_1"): 1, ("set_1 set_2", "lot_1 lot_2"): 0, ("a+ a-", "a_gt"): 0,
    ("p1_left p1_right", "p2_left_gt p2_right_gt"): 0, ("Image_01L", "Image_01L_1stHO Image_01L_2ndHO"): 0,
}  # fmt: skip


def test_names_match_but_for_words_that_all_share():
    for (images, masks), count in NAMES.items():
        found = match_names(images.split(), masks.split())
        assert len(found) == count, (images, found)
        for image, mask in found.items():
            assert re.findall("[0-9]+[LR]?", image)[0] == re.findall("[0-9]+[LR]?", mask)[0]


def test_patterns_and_lists_of_pairs_are_datasets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path / "flat/image", ["1.png", "1_gt.png", "01.png", "01_gt.png"])
    flat = list_pairs(images="flat/image/*.png", masks="flat/image/*_gt.png")
    assert [(pair.name, pair.mask.name) for pair in flat] == [("01", "01_gt.png"), ("1", "1_gt.png")]
    with pytest.raises(UserError, match="1.png: has no partner by --masks"):
        list_pairs({"images": "flat/image/*.png", "masks": "flat/image/0*_gt.png"}, "train")
    rows = [("image", "mask", "part", "photo"), ("image/1.png", r"image\1_gt.png", "Training", "p"), ("",) * 4,
            ("image/01.png", "image/01_gt.png", "test", "q")]  # fmt: skip
    table = tmp_path / "flat/pairs.csv"
    table.write_text("\ufeff" + "\r\n".join(map(";".join, rows)))  # as a spreadsheet saves it
    (pair,) = list_pairs(table, "train")
    assert (pair.name, pair.mask, pair.photo, pair.fov) == ("1", tmp_path / "flat/image/1_gt.png", "p", None)
    assert [pair.photo for pair in list_pairs(csv=table)] == ["p", "q"] and data_or_synthetic(table) == (table, False)
    for text, said in {
        "image/1.png,image/9.png": "9.png: no such file",
        "image/1.png,": "1.png has no partner",
        "image/1.png,image/1.png": "is the image of 1 and the mask of 1",
        "image/1.png,image/1_gt.png\nimage/01.png,image/1_gt.png": "is the mask of 1 and the mask of 01",
        "image/1.png,image/1_gt.png\n./image/../image/1.png,image/01_gt.png": "two images are called 1",
        "": "holds no pairs",
    }.items():
        table.write_text("image,mask\n" + text)
        with pytest.raises(UserError, match=said):
            list_pairs(csv=table)
    with pytest.raises(UserError, match="2 of 2 test images are training images"):
        check_apart(flat, flat)


def test_several_datasets_are_one_list_whose_names_carry_their_folder(data1, tmp_path):
    for kind in ("image", "mask"):
        write_all(tmp_path / "b/train" / kind, ["1.png"])
    pairs = list_pairs([data1, tmp_path / "b"], "train")
    names = ["set/1", "set/2", "set/10", "b/1"]
    assert [(pair.name, pair.photo, pair.subject) for pair in pairs] == [(name,) * 3 for name in names]
    assert pairs[3].image == tmp_path / "b/train/image/1.png"
    assert list_pairs([data1], "train") == list_pairs(data1, "train")
    for same in ([data1, data1], []):
        with pytest.raises(UserError, match="different folder names"):
            list_pairs(same, "train")


def fours(folder, count=8, second=lambda image: image[:, ::-1]):
    """Files 0 to count - 1 as the Kaggle set has them: an image, its mirror image, and two more."""
    images = [noise(6, 8, 3, seed=k) for k in range(count)]
    images = [[images[k // 4], second(images[k // 4]), images[k // 4][::-1], images[k]][k % 4] for k in range(count)]
    names = [f"{k}.png" for k in range(count)]
    for part in ("train", "test"):
        write_all(folder / part / "image", names, images)
        write_all(folder / part / "mask", names)
    return folder


def photos(folder, part="train"):
    return [pair.photo for pair in list_pairs(folder, part)]


def test_four_files_in_a_row_are_one_photo_where_the_second_mirrors_the_first(tmp_path):
    assert photos(fours(tmp_path, 12)) == ["0"] * 4 + ["1"] * 4 + ["2"] * 4
    assert photos(tmp_path, "test") == [str(k) for k in range(12)]  # never by order in the test part
    for name, other in {"a": lambda image: image, "b": lambda image: image[::-1]}.items():
        assert photos(fours(tmp_path / name, 8, other)) == [str(k) for k in range(8)]


@pytest.mark.parametrize("moved", [{"0": "", "1": "", "2": "", "3": ""}, {"7": "seven"}])
def test_a_numbering_with_gaps_or_other_names_is_not_grouped(tmp_path, moved):
    fours(tmp_path)
    for number, name in moved.items():
        for kind in ("image", "mask"):
            path = tmp_path / "train" / kind / f"{number}.png"
            path.rename(path.with_stem(name)) if name else path.unlink()
    assert len(set(photos(tmp_path))) == len(list((tmp_path / "train/image").iterdir()))


def test_a_table_of_photos_goes_before_the_order(tmp_path):
    fours(tmp_path)
    rows = [("train", str(k), f"{k % 3}", "me" * (k == 1)) for k in range(6)] + [("test", "7", "x", "")]
    with open(tmp_path / "photos.csv", "w", newline="", encoding="utf-8-sig") as file:  # with a spreadsheet's mark
        csv.writer(file).writerows([("part", "name", "photo", "subject"), *rows])
    assert photos(tmp_path) == ["0", "1", "2"] * 2 + ["6", "7"]
    assert photos(tmp_path, "test") == [*map(str, range(7)), "x"]
    assert [pair.subject for pair in list_pairs(tmp_path, "train")][:3] == ["0", "me", "2"]


def variants(count, each):
    return [Pair(f"{k}_{v}", None, None, str(k), str(k)) for k in range(count) for v in range(each)]


def subjects(pairs):
    return {pair.subject for pair in pairs}


def test_no_photo_is_on_both_sides_whatever_the_seed_and_the_order_of_files():
    pairs, drawn = variants(20, 4), set()
    eyes = [Pair(f"{k}{eye}", None, None, f"{k}{eye}", str(k)) for k in range(14) for eye in "LR"]
    for seed in range(100):
        training, validation = split_by_photo(pairs, 0.2, seed)
        assert subjects(training).isdisjoint(subjects(validation)) and len(validation) == 16
        assert training == [pair for pair in pairs if pair not in validation]
        assert subjects(split_by_photo(pairs[::-1], 0.2, seed)[1]) == subjects(validation)
        drawn.add(frozenset(subjects(validation)))
        training, validation = split_by_photo(eyes, 3, seed)  # both eyes of a person stay together
        assert subjects(training).isdisjoint(subjects(validation)) and len(validation) == 6
    assert len(drawn) > 75


def test_folds_are_of_photos_by_count_or_share_and_cover_everything_once():
    for validation, count, held_out in ((1, 5, 1), (4, 5, 4), (0.25, 20, 5), (0.01, 20, 1)):
        sides = split_by_photo(variants(count, 3), validation, 1)
        assert [len(side) for side in sides] == [3 * (count - held_out), 3 * held_out]
    folds = [subjects(split_by_photo(variants(20, 2), 5, 7, fold)[1]) for fold in range(4)]
    assert set.union(*folds) == {str(k) for k in range(20)} and sum(map(len, folds)) == 20
    with pytest.raises(UserError, match="--fold 4.*folds 0 to 3"):
        split_by_photo(variants(20, 2), 5, 7, 4)
    for validation in (0, 5, -1, 1.0):
        with pytest.raises(UserError, match="--held-out.*5 photos"):
            split_by_photo(variants(5, 4), validation, 0)


def test_pairs_and_fields_of_view_of_two_sizes_are_refused_naming_both_files(tmp_path):
    pair = write_pair(tmp_path, "a", noise(4, 6, 3), shades(6, 4))
    for use in (lambda: load_pair(pair.image, pair.mask), lambda: DriveDataset([pair.image], [pair.mask], (8, 8))[0]):
        with pytest.raises(UserError, match="a_mask.png: is 4x6 but its image 6x4 .*a_image.png"):
            use()
    pair = write_pair(tmp_path, "b", noise(4, 6, 3), shades(4, 6), np.ones((5, 5), bool))
    with pytest.raises(UserError, match="b_fov.png: is 5x5 but its image 6x4 .*b_image.png"):
        load_with_fov(pair)


def test_the_datasets_own_field_of_view_goes_before_a_found_one(tmp_path):
    image, mask, fov = eye()
    own = np.zeros_like(fov)
    own[10:60, 20:50] = True
    loaded = load_with_fov(write_pair(tmp_path, "a", image, mask, own))
    assert all(np.array_equal(a, b) for a, b in zip(loaded, (image, mask, own), strict=True))
    assert np.array_equal(load_with_fov(write_pair(tmp_path, "b", image, mask))[2], find_fov(image))


def test_odd_masks_are_remarked_on_once_a_kind(tmp_path):
    vessel = np.eye(4, dtype=np.uint8)
    *pairs, inverted = (
        write_pair(tmp_path, str(k), noise(4, 4, 3), mask)
        for k, mask in enumerate([vessel * 0, vessel * 255, vessel, vessel * 0, 255 - vessel * 255])
    )
    black, ones = check_masks(pairs)
    assert black.startswith(f"warning: {pairs[0].mask} and 1 more: the mask as read: all black")
    assert ones.startswith(f"warning: {pairs[2].mask}: the mask as read: values 0, 1")
    with pytest.raises(UserError, match="0_mask.png: is empty, as all 2 masks are"):
        check_masks([pairs[0], pairs[3]])
    for refuses in (load_with_fov, lambda pair: check_masks([pairs[1], pair])):
        with pytest.raises(UserError, match="4_mask.png: calls 75 % of the frame vessel; is it inverted"):
            refuses(inverted)


def same(a, b):
    return all(torch.equal(one, other) for one, other in zip(a, b, strict=True))


def test_the_dataset_keeps_the_originals_contract(tmp_path):
    image, mask = noise(9, 14, 3), noise(9, 14, seed=1)
    pair, other = (write_pair(tmp_path, str(k), image // k, mask // k) for k in (1, 2))
    dataset = DriveDataset([str(pair.image), other.image], [pair.mask, other.mask])
    assert len(dataset) == 2
    x, y = dataset[0]
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((3, 9, 14), torch.float32, (1, 9, 14), torch.float32)
    bgr = cv2.imread(str(pair.image), cv2.IMREAD_COLOR)  # as the original reads
    assert np.array_equal(x.numpy(), (bgr / np.float32(255)).transpose(2, 0, 1))
    assert np.array_equal(y[0].numpy(), mask / np.float32(255))  # fractions stay
    assert torch.equal(dataset[1][0], to_tensor(image // 2))
    for lists, said in (((["a", "b"], ["c"]), "2 images but 1 masks"), (([], []), "empty")):
        with pytest.raises(UserError, match=said):
            DriveDataset(*lists)


@pytest.mark.parametrize("size", [(8, 8), (16, 12), (20, 25)])
def test_a_size_is_cv2s_resize_of_image_and_mask(tmp_path, size):
    image, mask = noise(20, 25, 3), noise(20, 25, seed=1)
    pair = write_pair(tmp_path, "a", image, mask)
    x, y = DriveDataset([pair.image], [pair.mask], size)[0]
    assert torch.equal(x, to_tensor(cv2.resize(image, size[::-1])))
    assert np.array_equal(y[0].numpy(), cv2.resize(mask, size[::-1]) / np.float32(255))


@pytest.fixture
def three(tmp_path):
    """Three images with fields of view of diameters 61, 81 and 121."""
    return [write_pair(tmp_path, str(d), *eye(d + 20, d, seed=d)) for d in (61, 81, 121)]


def test_images_are_scaled_to_the_median_diameter_unless_one_is_given(three):
    assert PatchDataset(three, None, 32, 3).frame == FovFrame(81)
    dataset = PatchDataset(three, 50.0, 32, 3)
    assert dataset.frame == FovFrame(50.0)
    for image, mask in dataset.images[""]:
        assert image.shape[:2] == mask.shape and (image.dtype, mask.dtype) == (np.uint8, np.uint8)
        assert abs(fov_diameter(image.max(axis=2) > 0) / 50 - 1) < 0.04
    for impossible in (0.0, 1e9, float("nan")):
        with pytest.raises(UserError, match="--fov-diameter"):
            PatchDataset(three, impossible, 32, 3)


def test_patches_are_bgr_with_the_mask_in_place(tmp_path):
    _, mask, fov = eye(65, 63)
    image = np.where(fov[..., None], np.array([200, 100, 50], np.uint8), 0).astype(np.uint8)
    image[mask > 0] = (40, 20, 10)
    pair = write_pair(tmp_path, "a", image, mask, fov)
    dataset = PatchDataset([pair], None, 48, 5, Augmentation(exact=1, recolour=0))
    for x, y in (dataset[i] for i in range(5)):
        colours = torch.tensor([[0, 0, 0], [50, 100, 200], [10, 20, 40]]) / 255
        vessel, lit = y[0] > 0.5, x.amax(dim=0) > 0
        assert vessel.any() and not (vessel & ~lit).any()
        torch.testing.assert_close(x, colours[vessel.int() + lit.int()].permute(2, 0, 1))


@pytest.mark.parametrize(("second", "turns"), [("two", [1, 2, 1, 3, 1, 2]), ("one", [1, 2, 3, 1, 2, 3])])
def test_datasets_and_their_images_take_turns_from_one_epoch_to_the_next(three, second, turns):
    pairs = [replace(three[0], dataset="one"), *(replace(pair, dataset=second) for pair in three[1:])]
    dataset = PatchDataset(pairs, None, 32, 4, Augmentation(exact=1, recolour=0, flip=False), styles=True)
    assert dataset.datasets == sorted({"one", second})
    for level, source in enumerate(sum(dataset.images.values(), []), 1):
        source[0][:] = level
    items = [dataset[i] for i in range(4)]
    dataset.epoch = 1
    items += [dataset[i] for i in range(2)]
    assert [round(image.max().item() * 255) for image, _, _ in items] == turns
    assert [style for _, _, style in items] == [(turn > 1) * (second == "two") for turn in turns]
    whole = FrameDataset(pairs, dataset.frame, 8, dataset.datasets)
    assert [whole[i][2] for i in range(3)] == [0, *[second == "two"] * 2]


def test_patches_have_their_form_and_depend_on_seed_epoch_and_index_alone(three):
    for size in (32, 45, 200):
        x, y = PatchDataset(three, None, size, 4)[0]
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((3, size, size), torch.float32, (1, size, size), torch.float32)
        assert 0 <= x.min() < x.max() <= 1 and 0 <= y.min() <= y.max() <= 1
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            PatchDataset(three, None, 32, 6)[outside]
    first, second, other_seed = (PatchDataset(three, None, 32, 6, seed=seed) for seed in (5, 5, 6))
    before = [first[i] for i in range(6)]
    np.random.seed(0)
    assert all(same(second[i], before[i]) for i in (4, 0, 5, 1, 0, 2))  # in another order, some twice
    assert not any(same(before[i], other_seed[i]) for i in range(6))
    assert not any(same(before[i], before[i + 3]) for i in range(3))  # an image's patches are fresh draws
    second.epoch = 1
    assert not any(same(second[i], before[i]) for i in range(6))
    plain, worked = (list(torch.utils.data.DataLoader(first, 1, num_workers=n)) for n in (0, 1))
    assert all(same(a, b) for a, b in zip(plain, worked, strict=True))


def test_only_a_share_of_patches_is_recoloured(three):
    plain = [PatchDataset(three, None, 32, 60, Augmentation(exact=1, recolour=share)) for share in (0, 0.3)]
    changed = [not torch.equal(plain[0][i][0], plain[1][i][0]) for i in range(60)]
    assert 9 <= sum(changed) <= 30


@pytest.mark.parametrize("stride", [4, 32])
@pytest.mark.parametrize("frame", [FovFrame(61, 100.0), ResizeFrame(64, 64)])
def test_whole_images_lie_padded_in_the_frame(three, frame, stride):
    for (x, y), pair in zip(FrameDataset(three, frame, stride), three, strict=True):
        image, mask, fov = load_with_fov(pair)
        place = frame.place(fov)
        padded, padded_mask = (
            pad_to_stride(a, stride, frame.margin)[0] for a in (place.enter(image), place.enter_mask(mask))
        )
        assert torch.equal(x, to_tensor(padded)) and torch.equal(y[0], torch.from_numpy(padded_mask) / 255)


@pytest.mark.real
def test_the_kaggle_set_is_grouped_in_fours_and_split_without_a_leak(real_data):
    pairs = list_pairs(real_data / "Data1", "train")
    assert [pair.photo for pair in pairs] == [str(k // 4) for k in range(80)]
    training, validation = split_by_photo(pairs, 0.2, 42)
    assert (len(training), len(validation)) == (64, 16)
    assert len(list_pairs(real_data / "Data1", "test")) == 20


@pytest.mark.real
def test_the_dataset_makes_the_kaggle_test_images_from_the_raw_ones(real_data):
    pair = list_pairs(real_data / "Data1", "test")[0]
    raw = real_data / "DRIVE" / "test"
    made = DriveDataset([raw / "images/01_test.tif"], [raw / "1st_manual/01_manual1.gif"], (512, 512))[0]
    assert same(made, DriveDataset([pair.image], [pair.mask])[0])
