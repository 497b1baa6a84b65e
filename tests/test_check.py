"""Every finding is planted in a small clean dataset and looked for in the report; the clean one itself has none."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import drawn, write

from retina_seg.images import list_images, read_image
from retina_seg.sets.check import check_set, fingerprint, same_photo
from retina_seg.utils import UserError

HEIGHT, WIDTH = 96, 90


def image(seed: int) -> np.ndarray:
    """(96, 90, 3) uint8."""
    return drawn(seed, HEIGHT, WIDTH).image


def mask(seed: int) -> np.ndarray:
    """(96, 90) uint8 of 0 and 255."""
    return cv2.line(np.zeros((HEIGHT, WIDTH), np.uint8), (20 + seed, 15), (60, 80), 255, 3)


FIELD = drawn(0, HEIGHT, WIDTH).fov


def write_sample(root: Path, part: str, name: str, pixels: np.ndarray, ending: str = ".png") -> None:
    """An image with a mask, a field of view and a second observer's mask of its size."""
    write(root / part / "image" / f"{name}{ending}", pixels)
    for kind, truth in (("mask", mask(1)), ("fov", FIELD), ("mask_2nd", mask(2))):
        size = pixels.shape[1::-1]
        write(root / part / kind / f"{name}.png", cv2.resize(truth, size, interpolation=cv2.INTER_NEAREST))


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Three images to train on, two to test on, with fields of view and second observers."""
    for part, seeds in (("train", (1, 2, 10)), ("test", (3, 4))):
        for seed in seeds:
            write_sample(tmp_path / "set", part, f"p{seed}", image(seed))
    return tmp_path / "set"


def only(root: Path, level: str, *words: str) -> str:
    """The dataset's one finding, among the "problems" or the "warnings", which holds all of `words`."""
    report = check_set(root, progress=False)
    (text,) = report.problems + report.warnings
    assert text in getattr(report, level) and all(word in text for word in words), report
    return text


def test_a_clean_set_has_its_figures_and_no_findings(clean):
    write(clean / "train/mask_2nd/p1.png", np.where(mask(1) > 0, 253, 3).astype(np.uint8))  # two values, as DRIVE's
    report = check_set(clean, progress=False)
    assert (report.problems, report.warnings) == ([], [])
    train = report.parts["train"]
    assert train.files == {"image": 3, "mask": 3, "fov": 3, "mask_2nd": 3}
    assert train.distinct == 3 and train.sizes == {(HEIGHT, WIDTH): 3}
    assert train.vessel == pytest.approx([(mask(1) > 0).mean()] * 3)
    assert report.parts["test"].files["image"] == 2 and check_set(clean.parent, progress=False).root == clean
    with pytest.raises(UserError, match="no such folder"):
        check_set(clean / "nowhere")


def test_lines_say_what_people_ask(clean):
    write_sample(clean, "train", "wide", image(30)[:80])
    (clean / "test/mask/p3.png").unlink()
    lines = check_set(clean, progress=False).lines()
    assert lines[0] == str(clean)
    assert lines[1] == "train: 4 images, 4 masks, 4 fields of view, 4 second observer's masks"
    assert "sizes: 90x96 (3), 90x80 (1)" in lines[2] and "% of the frame on average" in lines[3]
    assert lines[-2].startswith("problem: ") and lines[-1] == "1 problem"


def test_the_index_is_compared_with_the_files_and_counts_variants_once(clean):
    write_sample(clean, "train", "v", image(1)[:, ::-1])
    rows = ["test,p3,p3", "test,p4,p4", "train,p1,p1", "train,v,p1", "train,p2,p2", "train,p10,p10"]
    (clean / "photos.csv").write_text("\n".join(["part,name,photo", *rows]))
    report = check_set(clean, progress=False)
    assert (report.problems, report.warnings) == ([], [])
    assert "train: 4 images (variants of 3)" in report.lines()[1]
    (clean / "photos.csv").write_text("\n".join(["part,name,photo", *rows[:5], "test,gone,gone"]))
    unnamed, gone = check_set(clean, progress=False).warnings
    assert "photos.csv: 1 files are not named (train/p10)" in unnamed
    assert "photos.csv: 1 files are not there (test/gone)" in gone
    (clean / "photos.csv").write_text("a,b\n1,2\n")
    (text,) = check_set(clean, progress=False).problems
    assert "photos.csv" in text and "columns part, name, photo" in text


def test_odd_files(clean):
    write(clean / "train/fov/other.png", FIELD)
    only(clean, "warnings", "fov: 1 files have no image (other.png)")
    (clean / "train/fov/other.png").unlink()
    (clean / "train/fov/p1.png").unlink()
    (clean / "train/image/Thumbs.db").write_bytes(b"x")
    alone, without = check_set(clean, progress=False).warnings
    assert "1 files are no images" in alone and "Thumbs.db" in alone
    assert "fov: 1 images have no file here (p1.png)" in without


def test_missing_folders_and_parts(clean):
    shutil.rmtree(clean / "test")
    only(clean, "warnings", "the dataset has no test part")
    (clean / "test/image").mkdir(parents=True)
    empty, missing = check_set(clean, progress=False).problems
    assert f"{clean / 'test/image'}: holds no images" in empty and f"{clean / 'test/mask'}: no such" in missing


def test_damaged_files_are_named_and_the_rest_is_read(clean):
    files = ("train/image/p1.png", "train/mask/p2.png", "train/fov/p10.png", "test/image/p3.png")
    for file in files:
        (clean / file).write_bytes((clean / file).read_bytes()[:60])
    report = check_set(clean, progress=False)
    assert sorted(text.split(": ")[0] for text in report.problems) == sorted(str(clean / file) for file in files)
    assert report.parts["train"].sizes == {(HEIGHT, WIDTH): 2} and len(report.parts["train"].vessel) == 2


SOFT = cv2.resize(cv2.resize(mask(1), (45, 48)), (WIDTH, HEIGHT))
RED = np.array([1, 0, 0], np.uint8)
PHOTO = np.where(np.arange(WIDTH) < 2, 255, np.maximum(image(40)[..., 1], FIELD // 2)).astype(np.uint8)
ODD = [
    ("problems", "mask fov mask_2nd", mask(3)[:70], "p1.png: is 90x70 but its image 90x96"),
    ("problems", "mask fov mask_2nd", mask(3) * 0, "black"),
    ("problems", "mask mask_2nd", image(40)[..., 0] // 3, "p1.png: its brightest value is 85, vessel is above 127"),
    ("problems", "mask fov", PHOTO, "is no mask"),
    ("problems", "mask mask_2nd", 255 - mask(3), "p1.png: calls 96 % of the frame vessel; is it inverted?"),
    ("problems", "image", np.zeros((HEIGHT, WIDTH, 3), np.uint8), "shows nothing, all its pixels are 0"),
    ("warnings", "mask fov mask_2nd", mask(1) // 255, "as read: values 0, 1: all above 0 are vessel"),
    ("warnings", "mask mask_2nd", mask(1)[..., None] * RED, "as read: colours: the brightest channel counts"),
    ("warnings", "image", image(1).astype(np.uint16) * 16, "images as read: 16 bits, scaled from 12"),
    ("warnings", "mask mask_2nd", SOFT, f"1.png: {len(np.unique(SOFT))} values"),
    ("warnings", "fov", SOFT, "fields of view have more than two values"),
]


@pytest.mark.parametrize(
    ("level", "kind", "pixels", "said"), [(case[0], kind, *case[2:]) for case in ODD for kind in case[1].split()]
)
def test_what_is_odd_about_a_file_is_said(level, kind, pixels, said, clean):
    write(clean / "train" / kind / "p1.png", pixels)
    only(clean, level, "p1.png", said)
    if kind == "mask" and "as read" in said:
        assert check_set(clean, progress=False).parts["train"].vessel[0] == pytest.approx((mask(1) > 0).mean())


def moved(pixels: np.ndarray, quarter: int, mirror: bool) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(pixels[:, ::-1] if mirror else pixels, quarter))


@pytest.mark.parametrize(("quarter", "mirror"), [(quarter, mirror) for quarter in range(4) for mirror in (False, True)])
def test_a_test_image_that_is_in_train_rotated_or_mirrored(quarter, mirror, clean):
    write_sample(clean, "test", "copy", moved(image(2), quarter, mirror))
    copy, original = clean / "test/image/copy.png", clean / "train/image/p2.png"
    only(clean, "problems", f"{copy}: is in train too, as {original};")


def test_a_test_image_that_is_in_train_at_another_size_twice(clean):
    write_sample(clean, "train", "q", image(2)[:, ::-1])
    write_sample(clean, "test", "copy", cv2.resize(moved(image(2), 1, True), (128, 128)), ".jpg")
    report = check_set(clean, progress=False)
    (problem,), (warning,) = report.problems, report.warnings
    assert "p2.png" in problem and "q.png" in problem and "train: 1 pairs of files show one photo" in warning
    assert "p2.png and q.png" in warning and "photos.csv" in warning


def test_different_images_are_far_from_the_threshold():
    prints = np.stack([fingerprint(image(seed)) for seed in range(40)])
    assert prints.shape == (40, 64, 64) and prints.dtype == np.float32
    assert np.allclose(np.linalg.norm(prints, axis=(1, 2)), 1, atol=1e-4)
    copies = np.concatenate([prints, prints[7:8, ::-1], prints[7:8].transpose(0, 2, 1)])
    assert list(same_photo(copies)) == [(7, 40), (7, 41), (40, 41)]
    assert list(same_photo(np.stack([fingerprint(image(1) * 0)] * 2))) == []  # black images are no copies


@pytest.mark.real
def test_the_kaggle_set_is_sound(real_data):
    report = check_set(real_data / "Data1", progress=False)
    assert report.problems == []
    assert report.parts["train"].files["image"] == 80 and report.parts["train"].distinct == 20
    assert report.parts["test"].distinct == 20
    assert len(report.warnings) == 2 and all("grey edges" in text for text in report.warnings)


@pytest.mark.real
@pytest.mark.parametrize("folder", ["DRIVE/training/images", "CHASE_DB1", "LES-AV/training/images"])
def test_real_images_keep_their_distance_and_real_copies_are_found(folder, real_data):
    images = [read_image(path) for path in list_images(real_data / folder) if "HO" not in path.name][:8]
    prints = np.stack([fingerprint(pixels) for pixels in images])
    assert list(same_photo(prints)) == []
    for n, pixels in enumerate(images):
        small = cv2.resize(moved(pixels, n % 4, n % 2 == 0), None, fx=0.8, fy=0.8)
        coded = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
        found = list(same_photo(np.concatenate([prints, fingerprint(coded)[None]])))
        assert found == [(n, len(images))]
