"""Raw sets of a few small made-up images, under the names their publishers use, converted to the Data1 layout."""

import gzip
import io
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import drawn, failing
from PIL import Image

from retina_seg.images import list_images, read_image, read_mask
from retina_seg.sets import prepare
from retina_seg.sets.layout import list_pairs
from retina_seg.sets.prepare import SETS, augment_data, list_raw, load_data, prepare_set, rotated
from retina_seg.utils import UserError, read_csv

HEIGHT, WIDTH = 68, 64


def image(seed: int) -> np.ndarray:
    """(68, 64, 3) uint8, which no mirroring or rotation leaves as it is."""
    return drawn(seed, HEIGHT, WIDTH).image


def mask(seed: int) -> np.ndarray:
    """(68, 64) uint8 0/255."""
    return drawn(seed, HEIGHT, WIDTH).mask


def field() -> np.ndarray:
    """(68, 64) uint8 0/255: a field of view off the middle, so that mirroring shows."""
    return cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (17, 24), 15, 255, -1)


def save(path: Path, pixels: np.ndarray, inverted: bool = False) -> None:
    """Write an image, `.gz` packed; an inverted GIF holds index 1 for black and 0 for white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coded = Image.fromarray((pixels < 128).astype(np.uint8) if inverted else pixels)
    if inverted:
        coded.putpalette([255, 255, 255, 0, 0, 0])
    content = io.BytesIO()
    coded.save(content, "PPM" if path.suffix == ".gz" else Image.registered_extensions()[path.suffix.lower()])
    path.write_bytes(gzip.compress(content.getvalue()) if path.suffix == ".gz" else content.getvalue())


def make_drive(root: Path, count: int = 2) -> Path:
    for part, first in (("training", 21), ("test", 1)):
        for number in range(first, first + count):
            name = f"{number:02d}"
            save(root / part / "images" / f"{name}_{part}.tif", image(number))
            save(root / part / "1st_manual" / f"{name}_manual1.gif", mask(number), inverted=number % 2 == 0)
            save(root / part / "mask" / f"{name}_{part}_mask.gif", field())
            if part == "test":  # the second observer's GIFs decode to 3 and 253
                second = np.where(mask(number + 1) > 0, 253, 3).astype(np.uint8)
                save(root / part / "2nd_manual" / f"{name}_manual2.gif", second)
    return root


# set -> train and test images, then the paths of image, mask, field of view and second observer's mask
OTHERS = {
    "chase_db1": (["Image_01L", "Image_10R"], ["Image_11L", "Image_14R"],
                  ["{}.jpg", "{}_1stHO.png", "mask/{}.gif", "{}_2ndHO.png"]),
    "stare": (["im0001", "im0002"], ["im0044", "im0077"],
              ["stare-images/{}.ppm.gz", "labels-ah/{}.ah.ppm.gz", "", "labels-vk/{}.vk.ppm.gz"]),
    "hrf": (["01_dr", "01_g", "05_h"], ["06_dr", "15_g"], ["images/{}.JPG", "manual1/{}.tif", "mask/{}_mask.tif", ""]),
    "les-av": (["2", "10"], ["33", "120"], ["images/{}.png", "vessel-segmentations/{}.png", "masks/{}.png", ""]),
    "fives": (["1_A", "2_N"], ["3_D", "10_G"], ["{part}/Original/{}.png", "{part}/Ground truth/{}.png", "", ""]),
}  # fmt: skip


def make(name: str, root: Path, packed: bool = True, folders: bool = True) -> Path:
    """The set `name` at `root`; image i holds `image(i)`, `mask(i)`, `field()`, `mask(i + 1)`."""
    if name == "drive":
        return make_drive(root)
    train, test, paths = OTHERS[name]
    for number, stem in enumerate(train + test):
        for path, pixels in zip(paths, (image(number), mask(number), field(), mask(number + 1)), strict=True):
            if path:
                path = path if packed else path.removesuffix(".gz")
                part = "train" if stem in train else "test"
                save(root / (path if folders else Path(path).name).format(stem, part=part), pixels)
    return root


def run(name: str, source: Path, destination: Path, **options) -> Path:
    return prepare_set(name, source, destination, progress=False, **options)


def names(root: Path, part: str, kind: str = "image") -> list[str]:
    return [path.stem for path in list_images(root / part / kind)] if (root / part / kind).is_dir() else []


def resized(pixels: np.ndarray, side: int = 512) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(pixels), (side, side))


@pytest.mark.parametrize("name", ["drive", "CHASE-DB1", "stare", "HRF", "LES_AV", "fives"])
def test_native_keeps_names_sizes_and_pixels_and_splits_as_usual(name, tmp_path, capsys):
    key = next(key for key in SETS if key.replace("_", "-") == name.lower().replace("_", "-"))
    root = run(name, make(key, tmp_path / "raw"), tmp_path / "set", size="native")
    assert root == tmp_path / "set"
    train, test, paths = OTHERS.get(key, (["21_training", "22_training"], ["01_test", "02_test"], ["drive"] * 4))
    assert (names(root, "train"), names(root, "test")) == (train, test)
    for number, pair in enumerate(list_pairs(root, "train") + list_pairs(root, "test")):
        number = {0: 21, 1: 22, 2: 1, 3: 2}[number] if key == "drive" else number
        if not paths[0].lower().endswith(".jpg"):
            assert np.array_equal(read_image(pair.image), image(number))
        assert np.array_equal(read_mask(pair.mask), mask(number))  # one of DRIVE's masks has an inverted palette
        assert np.array_equal(read_mask(pair.fov), field()) if paths[2] else pair.fov is None
        if paths[3] and (key, pair.image.parts[-3]) != ("drive", "train"):
            assert np.array_equal(read_mask(pair.mask_2nd), mask(number + 1))
        else:
            assert pair.mask_2nd is None
        assert pair.photo == pair.name
        assert pair.subject == (pair.name.rstrip("LR") if key == "chase_db1" else pair.name)  # a child's two eyes
    assert f"the complete set has {SETS[key].total}" in capsys.readouterr().out


def test_drive_at_512_has_the_kaggle_names_and_pixels(tmp_path):
    root = run("drive", make_drive(tmp_path / "DRIVE"), tmp_path / "set")
    assert all(names(root, "train", kind) == [str(i) for i in range(8)] for kind in ("image", "mask", "fov"))
    assert names(root, "test") == names(root, "test", "mask_2nd") == ["0", "1"]
    assert not (root / "train" / "mask_2nd").exists()
    for k, mirrored in enumerate((lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1])):
        assert np.array_equal(read_image(root / f"train/image/{4 + k}.png"), resized(mirrored(image(22))))
        assert np.array_equal(read_mask(root / f"train/mask/{4 + k}.png"), resized(mirrored(mask(22))))
        fov = resized(mirrored(field())) > 127
        assert np.array_equal(read_mask(root / f"train/fov/{4 + k}.png"), fov * np.uint8(255))
    assert np.array_equal(read_mask(root / "test/mask_2nd/1.png"), resized(mask(3)))  # 3 and 253 became 0 and 255
    row = read_csv(root / "photos.csv", ("part", "name", "photo", "subject", "variant", "source"))[6]
    assert ",".join(row.values()) == "train,6,22_training,22_training,2,22_training.tif"
    assert [pair.photo for pair in list_pairs(root, "train")] == ["21_training"] * 4 + ["22_training"] * 4


def test_the_rotated_variant_depends_on_name_and_seed_alone(tmp_path):
    one, two = make_drive(tmp_path / "one", count=1), make_drive(tmp_path / "two", count=2)
    roots = [
        run("drive", raw, tmp_path / name, seed=seed)
        for raw, name, seed in ((one, "a", 1), (one, "b", 2), (two, "c", 1))
    ]
    first, other, more = ((root / "train/image/3.png").read_bytes() for root in roots)
    assert first == more != other
    assert first != (roots[2] / "train/image/7.png").read_bytes()
    assert set(np.unique(read_mask(roots[0] / "train/fov/3.png"))) == {0, 255}


def test_rotation_is_by_the_angle_given_and_the_same_for_all():
    marked = np.zeros((61, 61), np.uint8)
    marked[28:33, 38:43] = 255  # right of the middle
    done = rotated({"image": np.repeat(marked[..., None], 3, axis=2), "mask": marked, "fov": marked}, 45.0)
    ys, xs = np.nonzero(done["mask"])
    assert abs(ys.mean() - (30 - 10 / 2**0.5)) < 1 and abs(xs.mean() - (30 + 10 / 2**0.5)) < 1  # anticlockwise
    assert set(np.unique(done["mask"])) == {0, 255} and np.array_equal(done["mask"], done["fov"])
    assert np.abs(done["image"][..., 0].astype(int) - done["mask"]).mean() < 3
    grey = np.full((20, 20, 3), 90, np.uint8)
    assert rotated({"image": grey}, 30.0)["image"].min() == 90  # mirrored beyond the frame, not black


def test_stare_unpacked_in_one_folder_with_more_than_the_labelled_images(tmp_path, capsys):
    source = make("stare", tmp_path / "raw", packed=False, folders=False)
    save(source / "im0003.ppm", image(3))  # without a mask
    save(source / "im0044.ppm.gz", image(2))  # once more
    root = run("STARE", source, tmp_path / "set", size="native")
    assert names(root, "train") == ["im0001", "im0002"] and names(root, "test") == ["im0044", "im0077"]
    assert "1 images without a mask are left out" in capsys.readouterr().out
    sources = [row["source"] for row in read_csv(root / "photos.csv", ())]
    assert sources[::2] == ["im0001.ppm", "im0044.ppm"]  # what is not packed first


def test_les_av_as_two_halves_with_artery_and_vein_values(tmp_path):
    source, vessels = tmp_path / "raw", mask(1)
    kinds = np.where(vessels > 0, 1 + np.arange(WIDTH, dtype=np.uint8) % 3, 0).astype(np.uint8)
    for part, number in (("training", 9), ("training", 10), ("test", 3)):
        save(source / part / "images" / f"{number}.png", image(number))
        save(source / part / "1st_manual" / f"{number}.png", kinds)
        save(source / part / "mask" / f"{number}_mask.gif", field())
    root = run("les-av", source, tmp_path / "set", size="native")
    assert names(root, "train", "fov") == ["9", "10"] and names(root, "test") == ["3"]
    assert np.array_equal(read_mask(root / "train/mask/9.png"), vessels)


def test_everything_into_one_part_and_variants_of_drive_at_512_alone(tmp_path):
    drive = make_drive(tmp_path / "raw", 1)
    assert names(run("drive", drive, tmp_path / "b", size=96), "train") == ["21_training"]
    assert names(run("drive", drive, tmp_path / "c", split="test"), "test") == ["01_test", "21_training"]
    root = run("drive", drive, tmp_path / "d", split="train")
    assert names(root, "train") == [f"{name}_{k}" for name in ("01_test", "21_training") for k in range(4)]
    assert sorted(path.name for path in root.iterdir()) == ["photos.csv", "train"]


def test_a_set_two_folders_below_in_other_case_into_a_folder_with_a_readme_or_nothing(tmp_path):
    source = make_drive(tmp_path / "raw" / "archive" / "DRIVE", count=1).parents[1]
    (source / "archive/DRIVE/test").rename(source / "archive/DRIVE/Test")
    (tmp_path / "Data1").mkdir()
    (tmp_path / "Data1" / "README.md").write_text("how to fill it")
    for name in ("Data1", "new/and/deep"):
        root = run("drive", source, tmp_path / name, size=32)
        assert names(root, "train") == ["21_training"] and names(root, "test") == ["01_test"]
    assert (tmp_path / "Data1" / "README.md").read_text() == "how to fill it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Data1", "new", "raw"]


def refused(tmp_path: Path, message: str, name: str, source: Path, destination: str = "set", **options) -> None:
    """The call raises a one-line `UserError` that says `message`, and leaves no file or folder."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        run(name, source, tmp_path / destination, **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("option", "value"), [("size", "large"), ("size", 10**6), ("split", "half")])
def test_refuses_options_it_does_not_know(option, value, tmp_path):
    refused(tmp_path, f"--{option} {value}: ", "drive", tmp_path, **{option: value})


def test_refuses_a_source_that_is_missing_or_no_set(tmp_path):
    refused(tmp_path, "messidor: no such set; choose one of drive", "messidor", tmp_path)
    refused(tmp_path, "nowhere: no such folder", "drive", tmp_path / "nowhere")
    (tmp_path / "raw.zip").write_bytes(b"PK")
    refused(tmp_path, "unpack the archive", "drive", tmp_path / "raw.zip")
    save(tmp_path / "other" / "images" / "12.png", image(12))  # anybody's
    refused(tmp_path, "does not hold STARE.*check images and masks", "stare", tmp_path / "other")
    for copy in ("one", "two"):
        make_drive(tmp_path / "twice" / copy, 1)
    refused(tmp_path, "several times .*twice/one, .*twice/two", "drive", tmp_path / "twice")
    assert names(run("drive", make_drive(tmp_path / "twice", 2), tmp_path / "set", size=32), "test")[1:] == ["02_test"]


@pytest.mark.parametrize("name", sorted(SETS))
def test_one_set_is_not_taken_for_another(name, tmp_path):
    make(name, tmp_path / "raw")
    for other in set(SETS) - {name}:
        refused(tmp_path, f"does not hold {SETS[other].name} as published", other, tmp_path / "raw")


def test_refuses_an_image_without_its_mask(tmp_path):
    source = make_drive(tmp_path / "raw")
    (source / "test/1st_manual/02_manual1.gif").unlink()
    refused(tmp_path, r"its mask .*02_manual1\.\* is ", "drive", source)
    source = make("stare", tmp_path / "stare")
    shutil.rmtree(source / "labels-ah")
    refused(tmp_path, "im0001.ah.ppm of the archive labels-ah", "stare", source)


def test_a_part_without_any_mask_is_left_out(tmp_path, capsys):
    source = make_drive(tmp_path / "raw")
    shutil.rmtree(source / "test/1st_manual")  # as DRIVE's site gives it
    assert names(run("drive", source, tmp_path / "set", size=32), "train") == ["21_training", "22_training"]
    files = [len(paths) for part in load_data(source) for paths in part]
    assert names(tmp_path / "set", "test") == [] and files == [2, 2, 0, 0]
    said = capsys.readouterr().out
    assert "2 images without a mask are left out" in said and "no test part: " in said


def test_refuses_two_sizes_and_damaged_files_and_leaves_nothing(tmp_path):
    source = make_drive(tmp_path / "raw")
    (tmp_path / "Data1").mkdir()
    (tmp_path / "Data1" / "README.md").write_text("how to fill it")
    for path in (source / "training/1st_manual/22_manual1.gif", source / "training/images/22_training.tif"):
        save(path, np.zeros((20, 30), np.uint8))
        refused(tmp_path, ".* is .*x.* but its image .*22_training.tif", "drive", source)
    path.write_bytes(b"MM")
    for destination in ("set", "new/and/deep", "Data1"):
        refused(tmp_path, "22_training.tif: is not an image", "drive", source, destination)


def test_leaves_nothing_when_interrupted(tmp_path, monkeypatch):
    source, interrupted = make_drive(tmp_path / "raw", 1), failing(prepare.write_image, 5, KeyboardInterrupt())
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(prepare, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("drive", source, tmp_path / "set")
    assert interrupted.call_count == 6 and sorted(tmp_path.rglob("*")) == before


def test_augment_data_writes_what_prepare_set_writes(tmp_path):
    source, new = make_drive(tmp_path / "raw", 1), tmp_path / "new"
    (images, masks), test = load_data(source)
    assert [path.name for path in (*images, *masks)] == ["21_training.tif", "21_manual1.gif"]
    augment_data(images, masks, new / "train")
    augment_data(*test, new / "test", augment=False)
    root = run("drive", source, tmp_path / "set")
    for kind in ("image", "mask"):
        assert names(new, "train", kind) == [f"21_training_{k}" for k in range(4)]
        assert names(new, "test", kind) == ["01_test_0"]
        for k in range(4):
            written, other = new / f"train/{kind}/21_training_{k}.png", root / f"train/{kind}/{k}.png"
            assert np.array_equal(read_image(written), read_image(other))
    with pytest.raises(UserError, match="1 images but 0 masks"):
        augment_data(images, [], tmp_path / "other")


@pytest.mark.real
def test_drive_at_512_is_the_kaggle_set(real_data, tmp_path):
    root, kaggle = run("drive", real_data / "DRIVE", tmp_path / "set"), real_data / "Data1"
    for part, count in (("train", 80), ("test", 20)):
        assert names(root, part) == [str(i) for i in range(count)]
        for i in range(count):
            if part == "test" or i % 4 != 3:  # those are rotated by angles of their own
                for kind in ("image", "mask"):
                    ours, theirs = (read_image(top / part / kind / f"{i}.png") for top in (root, kaggle))
                    assert np.array_equal(ours, theirs), (part, kind, i)
    assert len(names(root, "train", "fov")) == 80 and len(names(root, "test", "mask_2nd")) == 20


@pytest.mark.real
def test_the_rotated_variant_is_the_kaggle_sets_but_for_its_angle(real_data):
    files = list_raw(SETS["drive"], real_data / "DRIVE")[2].files
    pixels = {"image": read_image(files["image"]), "mask": read_mask(files["mask"])}
    done = rotated(pixels, 29.24299)  # found by search
    for kind in ("image", "mask"):
        theirs = read_image(real_data / "Data1" / "train" / kind / "11.png")
        ours = np.broadcast_to(resized(done[kind]).reshape(512, 512, -1), theirs.shape)
        assert (ours == theirs).mean() > 0.97  # the mirrored corners too


@pytest.mark.real
@pytest.mark.parametrize(("folder", "train", "test"), [("CHASE_DB1", 20, 8), ("LES-AV", 11, 11)])
def test_the_other_sets_at_hand(folder, train, test, real_data, tmp_path, capsys):
    root = run(folder, real_data / folder, tmp_path / "set", size=256)
    assert (len(names(root, "train", "fov")), len(names(root, "test", "fov"))) == (train, test)
    assert capsys.readouterr().out == ""  # complete
