"""Raw sets of a few small made-up photos, under the names their publishers use, brought into the Data1 layout."""

import csv
import gzip
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from retina_seg import prepare
from retina_seg.data import list_pairs
from retina_seg.images import list_pictures, read_label, read_photo
from retina_seg.prepare import SETS, augment_data, load_data, prepare_set, raw_set, rotated
from retina_seg.utils import UserError

HEIGHT, WIDTH = 44, 40


def photo(seed: int) -> np.ndarray:
    """(44, 40, 3) uint8: smooth colours that are alike neither mirrored nor turned."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 235, (6, 6, 3), dtype=np.uint8)
    return cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)


def label(seed: int) -> np.ndarray:
    """(44, 40) uint8 0/255: one slanted vessel and a blot in one corner."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.line(drawn, (3 + seed % 20, 0), (30, HEIGHT - 1), 255, 2)
    drawn[2:6, 1:4] = 255
    return drawn


def field() -> np.ndarray:
    """(44, 40) uint8 0/255: a field of view off the middle, so that mirroring shows."""
    return cv2.circle(np.zeros((HEIGHT, WIDTH), np.uint8), (17, 24), 15, 255, -1)


def save(path: Path, picture: np.ndarray, inverted: bool = False) -> None:
    """Write a picture, `.gz` packed; an inverted GIF holds index 1 for black and 0 for white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        plain = path.with_suffix("")
        Image.fromarray(picture).save(plain, format="PPM")
        path.write_bytes(gzip.compress(plain.read_bytes()))
        plain.unlink()
    elif inverted:
        image = Image.fromarray((picture < 128).astype(np.uint8))
        image.putpalette([255, 255, 255, 0, 0, 0])
        image.save(path)
    else:
        Image.fromarray(picture).save(path)


def make_drive(root: Path, count: int = 2) -> Path:
    for part, name, first in (("training", "training", 21), ("test", "test", 1)):
        for number in range(first, first + count):
            stem = f"{number:02d}"
            save(root / part / "images" / f"{stem}_{name}.tif", photo(number))
            save(root / part / "1st_manual" / f"{stem}_manual1.gif", label(number), inverted=number % 2 == 0)
            save(root / part / "mask" / f"{stem}_{name}_mask.gif", field())
            if part == "test":  # the second observer's GIFs decode to 3 and 253
                save(
                    root / part / "2nd_manual" / f"{stem}_manual2.gif",
                    np.where(label(number + 1) > 0, 253, 3).astype(np.uint8),
                )
    return root


def make_chase(root: Path) -> Path:
    for child in (1, 10, 11, 14):
        for side in "LR":
            stem = f"Image_{child:02d}{side}"
            save(root / f"{stem}.jpg", photo(child))
            save(root / f"{stem}_1stHO.png", label(child))
            save(root / f"{stem}_2ndHO.png", label(child + 1))
            save(root / "mask" / f"{stem}.gif", field())
    return root


def make_stare(root: Path, packed: bool, folders: bool) -> Path:
    ending = ".ppm.gz" if packed else ".ppm"
    for number in (1, 2, 44, 77):
        stem = f"im{number:04d}"
        save(root / ("stare-images" if folders else "") / f"{stem}{ending}", photo(number))
        save(root / ("labels-ah" if folders else "") / f"{stem}.ah{ending}", label(number))
        save(root / ("labels-vk" if folders else "") / f"{stem}.vk{ending}", label(number + 1))
    return root


def make_hrf(root: Path) -> Path:
    for number in (1, 5, 6, 15):
        for kind in ("h", "dr", "g"):
            stem = f"{number:02d}_{kind}"
            save(root / "images" / f"{stem}.{'JPG' if kind == 'dr' else 'jpg'}", photo(number))
            save(root / "manual1" / f"{stem}.tif", label(number))
            save(root / "mask" / f"{stem}_mask.tif", np.repeat(field()[..., None], 3, axis=2))
    return root


def make_les_av(root: Path) -> Path:
    for number in (2, 10, 33, 120):
        save(root / "images" / f"{number}.png", photo(number))
        save(root / "vessel-segmentations" / f"{number}.png", label(number))
        save(root / "masks" / f"{number}.png", field())
    return root


MAKERS = {
    "drive": make_drive,
    "chase_db1": make_chase,
    "stare": lambda root: make_stare(root, packed=True, folders=True),
    "hrf": make_hrf,
    "les-av": make_les_av,
}


def run(name: str, source: Path, destination: Path, **options) -> Path:
    return prepare_set(name, source, destination, progress=False, **options)


def names(root: Path, part: str, kind: str = "image") -> list[str]:
    return [path.stem for path in list_pictures(root / part / kind)] if (root / part / kind).is_dir() else []


def rows(root: Path) -> list[dict[str, str]]:
    with open(root / "photos.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def squeezed(picture: np.ndarray, side: int = 512) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(picture), (side, side))


# ------------------------------------------------------------------------------------------------------------- the sets


def test_every_set_is_described():
    assert set(MAKERS) == set(SETS)
    for name in ("CHASE-DB1", "chase_db1", "LES_AV", "les-av", "Drive"):
        assert raw_set(name)[0].replace("_", "-") == name.lower().replace("_", "-")


def test_drive_at_512_has_the_kaggle_names_and_pixels(tmp_path):
    source = make_drive(tmp_path / "DRIVE")
    root = run("drive", source, tmp_path / "set")
    assert root == tmp_path / "set"
    assert (
        names(root, "train")
        == names(root, "train", "mask")
        == names(root, "train", "fov")
        == [str(i) for i in range(8)]
    )
    assert names(root, "test") == names(root, "test", "mask_2nd") == ["0", "1"]
    assert not (root / "train" / "mask_2nd").exists()
    for k, turned in enumerate((lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1])):
        assert np.array_equal(read_photo(root / f"train/image/{4 + k}.png"), squeezed(turned(photo(22))))
        assert np.array_equal(read_label(root / f"train/mask/{4 + k}.png"), squeezed(turned(label(22))))
        fov = squeezed(turned(field())) > 127
        assert np.array_equal(read_label(root / f"train/fov/{4 + k}.png"), fov * np.uint8(255))
    assert np.array_equal(read_photo(root / "test/image/1.png"), squeezed(photo(2)))
    assert np.array_equal(read_label(root / "test/mask/1.png"), squeezed(label(2)))
    assert np.array_equal(read_label(root / "test/mask_2nd/1.png"), squeezed(label(3)))  # 3 and 253 became 0 and 255
    assert rows(root)[6] == {
        "part": "train",
        "name": "6",
        "photo": "22_training",
        "subject": "22_training",
        "variant": "2",
        "source": "22_training.tif",
    }
    pairs = list_pairs(root, "train")
    assert [pair.photo for pair in pairs] == ["21_training"] * 4 + ["22_training"] * 4
    assert all(pair.fov for pair in pairs)


def test_turned_variant_turns_everything_alike_and_can_be_repeated(tmp_path):
    source = make_drive(tmp_path / "DRIVE", count=1)
    first, again = run("drive", source, tmp_path / "a"), run("drive", source, tmp_path / "b")
    other = run("drive", source, tmp_path / "c", seed=7)
    turned = read_photo(first / "train/image/3.png")
    assert np.array_equal(turned, read_photo(again / "train/image/3.png"))
    assert not np.array_equal(turned, read_photo(other / "train/image/3.png"))
    assert set(np.unique(read_label(first / "train/fov/3.png"))) == {0, 255}
    assert (first / "photos.csv").read_bytes() == (again / "photos.csv").read_bytes()
    more = run("drive", make_drive(tmp_path / "more", count=2), tmp_path / "d")
    assert np.array_equal(turned, read_photo(more / "train/image/3.png"))
    assert not np.array_equal(turned, read_photo(more / "train/image/7.png"))


def test_rotation_is_by_the_angle_given_and_the_same_for_all():
    marked = np.zeros((61, 61), np.uint8)
    marked[28:33, 38:43] = 255  # right of the middle
    pictures = {"image": np.repeat(marked[..., None], 3, axis=2), "mask": marked, "fov": marked}
    turned = rotated(pictures, 45.0)
    ys, xs = np.nonzero(turned["mask"])
    assert abs(ys.mean() - (30 - 10 / 2**0.5)) < 1 and abs(xs.mean() - (30 + 10 / 2**0.5)) < 1  # anticlockwise
    assert set(np.unique(turned["mask"])) == {0, 255}
    assert np.array_equal(turned["mask"], turned["fov"])
    assert np.abs(turned["image"][..., 0].astype(int) - turned["mask"]).mean() < 3
    assert list(turned) == list(pictures)


def test_what_turns_in_from_beyond_the_frame_is_mirrored():
    grey = np.full((20, 20, 3), 90, np.uint8)
    assert rotated({"image": grey}, 30.0)["image"].min() == 90


def test_albumentations_is_not_imported_before_it_is_needed():
    code = "import sys, retina_seg.prepare; assert 'albumentations' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", sorted(SETS))
def test_native_keeps_pixels_sizes_and_names(name, tmp_path):
    root = run(name, MAKERS[name](tmp_path / "raw"), tmp_path / "set", size="native")
    for part in ("train", "test"):
        pairs = list_pairs(root, part)
        assert pairs
        assert len({pair.photo for pair in pairs}) == len(pairs)
        for pair in pairs:
            assert read_photo(pair.image).shape == (HEIGHT, WIDTH, 3)
            mask = read_label(pair.mask)
            assert mask.shape == (HEIGHT, WIDTH) and set(np.unique(mask)) == {0, 255}
            assert (pair.fov is None) == (name == "stare")
            if pair.fov:
                assert np.array_equal(read_label(pair.fov), field())
    assert {row["variant"] for row in rows(root)} == {"0"}


def test_the_two_eyes_of_a_child_are_one_subject(tmp_path):
    root = run("chase_db1", make_chase(tmp_path / "raw"), tmp_path / "set", size="native")
    for pair in list_pairs(root, "train"):
        assert pair.name[-1] in "LR" and pair.subject == pair.name[:-1] != pair.photo


def test_drive_native(tmp_path):
    root = run("drive", make_drive(tmp_path / "raw"), tmp_path / "set", size="native")
    assert names(root, "train") == ["21_training", "22_training"] and names(root, "test") == ["01_test", "02_test"]
    for number in (21, 22):  # one label has an inverted palette
        assert np.array_equal(read_photo(root / f"train/image/{number}_training.png"), photo(number))
        assert np.array_equal(read_label(root / f"train/mask/{number}_training.png"), label(number))


def test_chase_splits_by_child(tmp_path, capsys):
    root = run("chase-db1", make_chase(tmp_path / "raw"), tmp_path / "set")
    assert names(root, "train") == ["Image_01L", "Image_01R", "Image_10L", "Image_10R"]
    assert names(root, "test", "mask_2nd") == ["Image_11L", "Image_11R", "Image_14L", "Image_14R"]
    assert np.array_equal(read_label(root / "test/mask_2nd/Image_11L.png"), squeezed(label(12)))
    assert "8 labelled photos found, the complete set has 28" in capsys.readouterr().out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folders", [False, True])
def test_stare_packed_or_not_in_one_folder_or_three(packed, folders, tmp_path, capsys):
    source = make_stare(tmp_path / "raw", packed, folders)
    place = source / "stare-images" if folders else source
    save(place / "im0003.ppm", photo(3))  # nobody labelled it
    root = run("STARE", source, tmp_path / "set", size="native")
    assert names(root, "train") == ["im0001", "im0002"] and names(root, "test") == ["im0044", "im0077"]
    assert np.array_equal(read_photo(root / "test/image/im0044.png"), photo(44))
    assert np.array_equal(read_label(root / "test/mask/im0044.png"), label(44))
    assert np.array_equal(read_label(root / "test/mask_2nd/im0044.png"), label(45))
    assert not (root / "test/fov").exists()
    assert "1 photos that nobody labelled are left out" in capsys.readouterr().out
    assert rows(root)[0]["source"] == ("im0001.ppm.gz" if packed else "im0001.ppm")


def test_hrf_splits_by_number(tmp_path):
    root = run("hrf", make_hrf(tmp_path / "raw"), tmp_path / "set", size=64)
    assert names(root, "train") == ["01_dr", "01_g", "01_h", "05_dr", "05_g", "05_h"]
    assert names(root, "test")[0] == "06_dr" and len(names(root, "test")) == 6
    assert read_photo(root / "train/image/01_dr.png").shape == (64, 64, 3)
    assert set(np.unique(read_label(root / "train/fov/01_dr.png"))) == {0, 255}


def test_les_av_as_two_halves_with_artery_and_vein_values(tmp_path):
    source, vessels = tmp_path / "raw", label(1)
    for part, numbers in (("training", (9, 10)), ("test", (3,))):
        for number in numbers:
            save(source / part / "images" / f"{number}.png", photo(number))
            kinds = np.where(vessels > 0, 1 + np.arange(WIDTH, dtype=np.uint8) % 3, 0).astype(np.uint8)
            save(source / part / "1st_manual" / f"{number}.png", kinds)
            save(source / part / "mask" / f"{number}_mask.gif", field())
    root = run("les-av", source, tmp_path / "set", size="native")
    assert names(root, "train") == ["9", "10"] and names(root, "test") == ["3"]
    assert np.array_equal(read_label(root / "train/mask/9.png"), vessels)


def test_les_av_as_published_splits_in_natural_order(tmp_path):
    root = run("les-av", make_les_av(tmp_path / "raw"), tmp_path / "set", size="native")
    assert names(root, "train") == ["2", "10"] and names(root, "test") == ["33", "120"]


# ---------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("split", ["train", "test"])
def test_everything_into_one_part(split, tmp_path):
    root = run("chase_db1", make_chase(tmp_path / "raw"), tmp_path / "set", split=split, size=32)
    assert len(names(root, split)) == 8
    assert sorted(path.name for path in root.iterdir()) == ["photos.csv", split]


def test_all_of_drive_for_testing_has_its_own_names_and_no_variants(tmp_path):
    root = run("drive", make_drive(tmp_path / "raw"), tmp_path / "set", split="test")
    assert names(root, "test") == ["01_test", "02_test", "21_training", "22_training"]


def test_variants_of_another_set(tmp_path):
    root = run("les-av", make_les_av(tmp_path / "raw"), tmp_path / "set", size=48, augment=True)
    assert names(root, "train") == [f"{n}_{k}" for n in (2, 10) for k in range(4)]
    assert names(root, "test") == ["33", "120"]
    assert np.array_equal(read_photo(root / "train/image/10_1.png"), squeezed(photo(10)[:, ::-1], 48))
    assert [pair.photo for pair in list_pairs(root, "train")] == ["2"] * 4 + ["10"] * 4


def test_drive_without_variants_and_at_other_sizes(tmp_path):
    source = make_drive(tmp_path / "raw")
    plain = run("drive", source, tmp_path / "a", augment=False)
    small = run("drive", source, tmp_path / "b", size=96)
    assert names(plain, "train") == names(small, "train") == ["21_training", "22_training"]


@pytest.mark.parametrize("below", ["archive", "archive/DRIVE"])
def test_the_set_is_found_below(below, tmp_path):
    make_drive(tmp_path / "raw" / below, count=1)
    assert names(run("drive", tmp_path / "raw", tmp_path / "set", size=32), "test") == ["01_test"]


def test_destination_may_hold_its_readme_or_nothing(tmp_path):
    source = make_drive(tmp_path / "raw", count=1)
    (tmp_path / "Data1").mkdir()
    (tmp_path / "Data1" / "README.md").write_text("how to fill it")
    (tmp_path / "empty").mkdir()
    for name in ("Data1", "empty", "new/and/deep"):
        root = run("drive", source, tmp_path / name, size=32)
        assert {"train", "test", "photos.csv"} == {path.name for path in root.iterdir()} - {"README.md"}
    assert (tmp_path / "Data1" / "README.md").read_text() == "how to fill it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Data1", "empty", "new", "raw"]


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(tmp_path: Path, message: str, name: str, source: Path, destination: str = "set", **options) -> None:
    """The call raises a one-line `UserError` that says `message`, and leaves no file or folder behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        run(name, source, tmp_path / destination, **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "large"}, "--size large"),
        ({"size": 0}, "--size 0"),
        ({"size": 10**6}, "--size 1000000"),
        ({"split": "half"}, "--split half"),
        ({"size": "native", "augment": True}, "at a fixed size"),
        ({"split": "test", "augment": True}, "of training photos"),
    ],
)
def test_refuses_options_it_does_not_know(options, message, tmp_path):
    refused(tmp_path, message, "drive", make_drive(tmp_path / "raw", 1), **options)


def test_refuses_an_unknown_set(tmp_path):
    refused(tmp_path, "messidor: no such set; choose one of drive", "messidor", tmp_path)


def test_refuses_a_source_that_is_missing_or_another_set(tmp_path):
    refused(tmp_path, "nowhere: no such folder", "drive", tmp_path / "nowhere")
    (tmp_path / "raw.zip").write_bytes(b"PK")
    refused(tmp_path, "unpack the archive", "drive", tmp_path / "raw.zip")
    make_chase(tmp_path / "chase")
    refused(
        tmp_path, "does not hold DRIVE.*looks like CHASE_DB1: retina-seg prepare chase_db1", "drive", tmp_path / "chase"
    )
    (tmp_path / "other").mkdir()
    refused(tmp_path, "does not hold STARE.*check the folder", "stare", tmp_path / "other")


@pytest.mark.parametrize("name", sorted(SETS))
def test_one_set_is_not_taken_for_another(name, tmp_path):
    MAKERS[name](tmp_path / "raw")
    for other in set(SETS) - {name}:
        refused(tmp_path, f"looks like {SETS[name].title}", other, tmp_path / "raw")


def test_refuses_a_set_that_is_there_twice(tmp_path):
    for copy in ("one", "two"):
        make_drive(tmp_path / "raw" / copy, 1)
    refused(tmp_path, "several times", "drive", tmp_path / "raw")


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("drive", "test/1st_manual/02_manual1.gif"),
        ("chase_db1", "Image_10R_1stHO.png"),
        ("hrf", "manual1/05_dr.tif"),
        ("les-av", "vessel-segmentations/33.png"),
    ],
)
def test_refuses_a_photo_without_label(name, lost, tmp_path):
    source = MAKERS[name](tmp_path / "raw")
    (source / lost).unlink()
    refused(tmp_path, f"its label .*{Path(lost).stem.lower()}.* is missing", name, source)


def test_refuses_stare_without_any_label(tmp_path):
    source = make_stare(tmp_path / "raw", packed=False, folders=True)
    for path in (source / "labels-ah").iterdir():
        path.unlink()
    refused(tmp_path, "labels-ah", "stare", source)


@pytest.mark.parametrize("spoilt", ["1st_manual/22_manual1.gif", "mask/22_training_mask.gif"])
def test_refuses_two_sizes(spoilt, tmp_path):
    source = make_drive(tmp_path / "raw")
    save(source / "training" / spoilt, np.zeros((20, 30), np.uint8))
    refused(tmp_path, f"22_training.tif and .*{Path(spoilt).name}: differ in size .40x44 and 30x20", "drive", source)


def test_refuses_a_damaged_file_and_leaves_nothing(tmp_path):
    source = make_drive(tmp_path / "raw")
    path = source / "test" / "images" / "02_test.tif"
    path.write_bytes(path.read_bytes()[:200])
    refused(tmp_path, "02_test.tif", "drive", source)
    refused(tmp_path, "02_test.tif", "drive", source, "new/and/deep")
    (tmp_path / "Data1").mkdir()
    (tmp_path / "Data1" / "README.md").write_text("how to fill it")
    refused(tmp_path, "02_test.tif", "drive", source, "Data1")


def test_refuses_a_destination_in_use(tmp_path):
    source = make_drive(tmp_path / "raw", 1)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "photos.csv").touch()
    refused(tmp_path, "is not empty .photos.csv", "drive", source, "used")
    (tmp_path / "file").touch()
    refused(tmp_path, "a file stands", "drive", source, "file")
    for inside in ("raw", "raw/training/set"):
        refused(tmp_path, "lies inside the raw photos", "drive", source, inside)
    refused(tmp_path, "is not empty", "drive", source, ".")


@pytest.mark.parametrize("existing", [False, True])
def test_leaves_nothing_when_interrupted(existing, tmp_path, monkeypatch):
    source = make_drive(tmp_path / "raw", 1)
    if existing:
        (tmp_path / "set").mkdir()
    before = sorted(tmp_path.rglob("*"))
    write, written = prepare.write_picture, []

    def interrupted(path, picture):
        if len(written) == 5:
            raise KeyboardInterrupt
        write(path, picture)
        written.append(path)

    monkeypatch.setattr(prepare, "write_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run("drive", source, tmp_path / "set")
    assert len(written) == 5 and sorted(tmp_path.rglob("*")) == before


def test_leaves_nothing_when_the_last_move_fails(tmp_path, monkeypatch):
    source = make_drive(tmp_path / "raw", 1)
    (tmp_path / "set").mkdir()
    move = prepare.shutil.move

    def full(path, to):
        if Path(to).name == "train":
            raise OSError(28, "No space left on device")
        return move(path, to)

    monkeypatch.setattr(prepare.shutil, "move", full)
    refused(tmp_path, "No space left", "drive", source, size=32)


# ------------------------------------------------------------------------------------------------------- original's two


def test_load_data_pairs_by_number(tmp_path):
    source = make_drive(tmp_path / "raw", 3)
    (train_images, train_masks), (test_images, test_masks) = load_data(source)
    assert [path.name for path in train_images] == [f"{n}_training.tif" for n in (21, 22, 23)]
    assert [path.name for path in train_masks] == [f"{n}_manual1.gif" for n in (21, 22, 23)]
    assert [path.name for path in test_images] == [f"0{n}_test.tif" for n in (1, 2, 3)]
    assert [path.name for path in test_masks] == [f"0{n}_manual1.gif" for n in (1, 2, 3)]
    (source / "training/1st_manual/22_manual1.gif").unlink()
    with pytest.raises(UserError, match=r"22_training.tif: its label 1st_manual/22_manual1"):
        load_data(source)


def test_augment_data_writes_what_prepare_set_writes(tmp_path):
    source = make_drive(tmp_path / "raw", 1)
    (images, masks), (test_images, test_masks) = load_data(source)
    augment_data(images, masks, tmp_path / "new_data" / "train")
    augment_data(test_images, test_masks, tmp_path / "new_data" / "test", augment=False)
    root = run("drive", source, tmp_path / "set")
    for kind in ("image", "mask"):
        assert names(tmp_path / "new_data", "train", kind) == [f"21_training_{k}" for k in range(4)]
        assert names(tmp_path / "new_data", "test", kind) == ["01_test_0"]
        for k in range(4):
            ours = read_photo(tmp_path / "new_data" / "train" / kind / f"21_training_{k}.png")
            assert np.array_equal(ours, read_photo(root / "train" / kind / f"{k}.png"))


def test_augment_data_refuses_unequal_lists(tmp_path):
    with pytest.raises(UserError, match="1 photos but 0 masks"):
        augment_data([tmp_path / "a.png"], [], tmp_path / "new")
    assert not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------------------------------ real data


@pytest.mark.real
def test_drive_at_512_is_the_kaggle_set(real_data, tmp_path):
    root, kaggle = run("drive", real_data / "DRIVE", tmp_path / "set"), real_data / "Data1"
    for part, count in (("train", 80), ("test", 20)):
        assert names(root, part) == [str(i) for i in range(count)]
        for i in range(count):
            if part == "train" and i % 4 == 3:
                continue  # turned by an angle of its own
            assert np.array_equal(*(read_photo(top / part / "image" / f"{i}.png") for top in (root, kaggle))), (part, i)
            assert np.array_equal(*(read_label(top / part / "mask" / f"{i}.png") for top in (root, kaggle))), (part, i)
    assert len(names(root, "train", "fov")) == 80 and len(names(root, "test", "mask_2nd")) == 20


@pytest.mark.real
def test_the_turned_variant_is_the_kaggle_sets_but_for_its_angle(real_data):
    raw = prepare.load_data(real_data / "DRIVE")[0]
    pictures = {"image": read_photo(raw[0][2]), "mask": read_label(raw[1][2])}
    turned = rotated(pictures, 29.24299)  # found by search: train/image/11.png
    for kind in ("image", "mask"):
        theirs = read_photo(real_data / "Data1" / "train" / kind / "11.png")
        ours = squeezed(turned[kind])
        ours = ours if ours.ndim == 3 else np.repeat(ours[..., None], 3, axis=2)
        assert (ours == theirs).mean() > 0.97  # the mirrored corners too


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "folder", "train", "test"), [("chase_db1", "CHASE_DB1", 20, 8), ("les-av", "LES-AV", 11, 11)]
)
def test_the_other_sets_at_hand(name, folder, train, test, real_data, tmp_path, capsys):
    root = run(name, real_data / folder, tmp_path / "set", size=256)
    assert (len(names(root, "train", "fov")), len(names(root, "test", "fov"))) == (train, test)
    assert capsys.readouterr().out == ""  # complete
