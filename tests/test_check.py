"""Every finding is planted in a small clean set and looked for in the report; the clean set itself has none."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from retina_seg.check import check_set, fingerprint, same_photo
from retina_seg.images import list_pictures, read_photo, write_picture
from retina_seg.utils import UserError

HEIGHT, WIDTH = 96, 90


def photo(seed: int) -> np.ndarray:
    """(96, 90, 3) uint8: a disc with detail of its own on black, as all fundus photos are alike at first sight."""
    rng = np.random.default_rng(seed)
    detail = cv2.resize(rng.normal(0, 25, (16, 16)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    disc = np.hypot(ys - HEIGHT / 2, xs - WIDTH / 2) < 43
    grey = np.clip(120 + detail, 1, 255) * disc
    return np.repeat(grey[..., None], 3, axis=2).astype(np.uint8)


def label(seed: int) -> np.ndarray:
    """(96, 90) uint8 of 0 and 255."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    cv2.line(drawn, (20 + seed, 15), (60, 80), 255, 3)
    return drawn


def field() -> np.ndarray:
    return (photo(0)[..., 0] > 0).astype(np.uint8) * 255


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    """Three photos to train on, two to test on, with fields of view and second observers."""
    root = tmp_path / "set"
    for part, seeds in (("train", (1, 2, 10)), ("test", (3, 4))):
        for seed in seeds:
            write(root, part, f"p{seed}", photo(seed), label(seed))
            put(root / part / "fov" / f"p{seed}.png", field())
            put(root / part / "mask_2nd" / f"p{seed}.png", label(seed + 1))
    return root


def put(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, np.ascontiguousarray(picture))
    return path


def write(root: Path, part: str, name: str, picture: np.ndarray, mask: np.ndarray, ending: str = ".png") -> None:
    put(root / part / "image" / f"{name}{ending}", picture)
    put(root / part / "mask" / f"{name}.png", mask)


def problem(root: Path, *words: str) -> str:
    """The set's one problem, which holds all of `words`."""
    report = check_set(root, progress=False)
    assert len(report.problems) == 1, report.problems
    assert "\n" not in report.problems[0]
    for word in words:
        assert word in report.problems[0]
    return report.problems[0]


def warning(root: Path, *words: str) -> str:
    """The set's one warning, which holds all of `words`, beside no problem."""
    report = check_set(root, progress=False)
    assert not report.problems and len(report.warnings) == 1, report
    for word in words:
        assert word in report.warnings[0]
    return report.warnings[0]


# --------------------------------------------------------------------------------------------------------- what is there


def test_a_clean_set_has_its_figures_and_no_findings(clean):
    report = check_set(clean, progress=False)
    assert (report.problems, report.warnings) == ([], [])
    train = report.parts["train"]
    assert train.files == {"image": 3, "mask": 3, "fov": 3, "mask_2nd": 3}
    assert train.distinct == 3 and train.sizes == {(HEIGHT, WIDTH): 3}
    assert train.vessel == pytest.approx([(label(seed) > 0).mean() for seed in (1, 2, 10)])
    assert report.parts["test"].files["image"] == 2


def test_lines_say_what_people_ask(clean):
    write(clean, "train", "wide", photo(30)[:80], label(3)[:80])
    (clean / "test/mask/p3.png").unlink()
    lines = check_set(clean, progress=False).lines()
    assert lines[0] == str(clean)
    assert lines[1].startswith("train: 4 photos, 4 masks, 3 fields of view, 3 second observer's")
    assert "sizes: 90x96 (3), 90x80 (1)" in lines[2]
    assert "% of the frame on average" in lines[3]
    assert any(line.startswith("note: ") for line in lines)
    assert any(line.startswith("problem: ") and "p3.png" in line for line in lines)
    assert lines[-1] == "1 problem"


def test_the_set_is_found_below_and_absence_is_an_error(clean, tmp_path):
    assert check_set(tmp_path, progress=False).root == clean
    with pytest.raises(UserError, match="no such folder"):
        check_set(tmp_path / "nowhere", progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no train/image"):
        check_set(tmp_path / "empty", progress=False)


def test_variants_are_counted_once(clean):
    for k, picture in enumerate((photo(1), photo(1)[:, ::-1], photo(1)[::-1])):
        write(clean, "train", f"v_{k}", picture, label(1))
        for kind in ("fov", "mask_2nd"):
            put(clean / "train" / kind / f"v_{k}.png", label(1))
    kept = [("test", "p3", "p3"), ("test", "p4", "p4"), *(("train", f"p{n}", f"p{n}") for n in (1, 2, 10))]
    rows = [*kept, *(("train", f"v_{k}", "p1") for k in range(3))]
    (clean / "photos.csv").write_text("part,name,photo\n" + "".join(f"{','.join(row)}\n" for row in rows))
    report = check_set(clean, progress=False)
    assert (report.problems, report.warnings) == ([], [])
    assert report.parts["train"].distinct == 3
    assert any("train: 6 photos (variants of 3)" in line for line in report.lines())


# ------------------------------------------------------------------------------------------------------- files and names


def test_unpaired_files_are_all_listed(clean):
    (clean / "train/mask/p1.png").unlink()
    (clean / "train/mask/p2.png").unlink()
    (clean / "test/image/p3.png").unlink()
    report = check_set(clean, progress=False)
    assert [text.split(": ")[0] for text in report.problems] == [
        str(clean / "train/image/p1.png"),
        str(clean / "train/image/p2.png"),
        str(clean / "test/mask/p3.png"),
    ]
    assert "has no mask" in report.problems[0] and "has no photo" in report.problems[2]


def test_lonely_extras_are_warned_of(clean):
    put(clean / "train/fov/other.png", field())
    warning(clean, "fov: 1 files have no photo (other.png)")
    (clean / "train/fov/other.png").unlink()
    (clean / "train/fov/p1.png").unlink()
    warning(clean, "fov: 1 photos have no file here (p1.png)")


def test_missing_folders_and_parts(clean):
    for path in (clean / "test").rglob("*.png"):
        path.unlink()
    for path in sorted((clean / "test").rglob("*"), reverse=True):
        path.rmdir()
    (clean / "test/image").mkdir()
    report = check_set(clean, progress=False)
    assert any("test/image: holds no pictures" in text.replace("\\", "/") for text in report.problems)
    assert any("test/mask: no such folder" in text.replace("\\", "/") for text in report.problems)
    (clean / "test/image").rmdir()
    (clean / "test").rmdir()
    warning(clean, "the set has no test part")


def test_two_files_of_one_name(clean):
    put(clean / "train/image/p1.jpg", photo(1))
    problem(clean, "has the name of", "p1.")


def test_what_is_no_picture_is_passed_over_aloud(clean):
    (clean / "train/image/Thumbs.db").write_bytes(b"x")
    warning(clean, "1 files are no pictures", "Thumbs.db")


def test_damaged_files_are_named_and_the_rest_is_read(clean):
    for name in ("image/p1.png", "mask/p2.png", "fov/p10.png"):
        path = clean / "train" / name
        path.write_bytes(path.read_bytes()[:60])
    (clean / "test/image/p3.png").write_bytes(b"")
    report = check_set(clean, progress=False)
    assert len(report.problems) == 4
    for name in ("p1.png", "p2.png", "p10.png", "p3.png"):
        assert any(name in text for text in report.problems)
    assert report.parts["train"].sizes == {(HEIGHT, WIDTH): 2} and len(report.parts["train"].vessel) == 2


@pytest.mark.parametrize("kind", ["mask", "fov", "mask_2nd"])
def test_a_label_of_another_size(kind, clean):
    put(clean / "test" / kind / "p3.png", label(3)[:70])
    problem(clean, "p3.png: is 90x70 but its photo 90x96")


# ------------------------------------------------------------------------------------------------------- what they hold


def test_a_photo_that_shows_nothing(clean):
    put(clean / "train/image/p1.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    put(clean / "test/image/p3.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))  # two such are no copies of each other
    report = check_set(clean, progress=False)
    assert len(report.problems) == 2 and all("shows nothing" in text for text in report.problems)


@pytest.mark.parametrize("kind", ["mask", "fov", "mask_2nd"])
def test_empty_labels_are_named(kind, clean):
    put(clean / "train" / kind / "p2.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    problem(clean, "p2.png: is empty, all black")


def test_masks_of_0_and_1_are_recognised(clean):
    put(clean / "train/mask/p1.png", label(1) // 255)
    text = warning(clean, "train: 1 masks are of 0 and 1", "p1.png")
    assert "read as that" in text
    assert check_set(clean, progress=False).parts["train"].vessel[0] == pytest.approx((label(1) > 0).mean())


def test_masks_below_the_cut(clean):
    put(clean / "train/mask/p1.png", label(1) // 255 * 3)
    problem(clean, "p1.png: is black where it is read: its brightest value is 3")


def test_a_field_of_view_of_0_and_1_would_be_read_as_black(clean):
    put(clean / "train/fov/p1.png", field() // 255)
    problem(clean, "fov", "its brightest value is 1, the cut is at 127")


def test_grey_edges_are_a_note(clean):
    soft = cv2.resize(cv2.resize(label(1), (45, 48)), (WIDTH, HEIGHT))
    put(clean / "train/mask/p1.png", soft)
    warning(clean, "1 masks have grey edges", "Kaggle", f"p1.png: {len(np.unique(soft))} values")


def test_two_values_other_than_black_and_white_are_fine(clean):
    put(clean / "train/mask_2nd/p1.png", np.where(label(1) > 0, 253, 3).astype(np.uint8))
    assert not check_set(clean, progress=False).problems


def test_a_photo_among_the_masks(clean):
    put(clean / "train/mask/p1.png", photo(40)[..., 0])
    report = check_set(clean, progress=False)
    assert any("p1.png: is no label" in text for text in report.problems)


def test_an_inverted_mask(clean):
    put(clean / "test/mask/p3.png", 255 - label(3))
    problem(clean, "p3.png: calls", "inverted")


def test_the_index_is_held_against_the_files(clean):
    rows = ["train,p1,p1", "train,p2,p2", "test,p3,p3", "test,p4,p4", "test,gone,gone"]
    (clean / "photos.csv").write_text("part,name,photo\n" + "\n".join(rows) + "\n")
    report = check_set(clean, progress=False)
    assert not report.problems and len(report.warnings) == 2
    assert "does not name 1 files (train/p10)" in report.warnings[0]
    assert "names 1 files (test/gone) that are not there" in report.warnings[1]
    (clean / "photos.csv").write_text("a,b\n1,2\n")
    problem(clean, "photos.csv", "columns part, name, photo")


# ---------------------------------------------------------------------------------------------------------------- copies

TURNS = [(quarter, mirror) for quarter in range(4) for mirror in (False, True)]


def turned(picture: np.ndarray, quarter: int, mirror: bool) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if mirror else picture, quarter))


def plant(root: Path, picture: np.ndarray, ending: str = ".png") -> None:
    write(
        root,
        "test",
        "copy",
        picture,
        cv2.resize(label(1), picture.shape[1::-1], interpolation=cv2.INTER_NEAREST),
        ending,
    )
    for kind in ("fov", "mask_2nd"):
        put(root / "test" / kind / "copy.png", np.full(picture.shape[:2], 255 if kind == "fov" else 0, np.uint8))
    blot = root / "test" / "mask_2nd" / "copy.png"
    put(blot, cv2.circle(np.zeros(picture.shape[:2], np.uint8), (20, 20), 5, 255, -1))


@pytest.mark.parametrize(("quarter", "mirror"), TURNS)
def test_a_test_photo_that_stands_in_train_turned_or_mirrored(quarter, mirror, clean):
    plant(clean, turned(photo(2), quarter, mirror))
    text = problem(clean, str(clean / "test/image/copy.png"), "stands in train too", str(clean / "train/image/p2.png"))
    assert ("mirrored" in text) == mirror
    assert ("turned" in text) == (quarter in (1, 3) or (quarter == 2 and not mirror))


@pytest.mark.parametrize("ending", [".jpg", ".png"])
def test_a_test_photo_that_stands_in_train_at_another_size(ending, clean):
    plant(clean, cv2.resize(turned(photo(2), 1, True), (128, 128)), ending)
    problem(clean, "copy", "stands in train too", "p2.png")


def test_all_copies_of_one_photo_are_one_problem(clean):
    for name in ("q1", "q2"):
        write(clean, "train", name, photo(2)[:, ::-1], label(1))
    plant(clean, photo(2))
    report = check_set(clean, progress=False)
    assert len(report.problems) == 1 and "(and 2 more)" in report.problems[0]


def test_copies_inside_a_part_are_warned_of_unless_they_are_known(clean):
    for kind in ("fov", "mask_2nd"):
        put(clean / "train" / kind / "q.png", field() if kind == "fov" else label(2))
    write(clean, "train", "q", photo(2)[::-1], label(2)[::-1])
    warning(clean, "train: 1 pairs of files show one photo", "p2.png and q.png", "photos.csv")


def test_different_photos_are_far_from_the_threshold():
    prints = np.stack([fingerprint(photo(seed)) for seed in range(40)])
    assert prints.shape == (40, 64, 64) and prints.dtype == np.float32
    assert np.allclose(np.linalg.norm(prints.reshape(40, -1), axis=1), 1, atol=1e-4)
    assert list(same_photo(prints)) == []
    assert [found[:2] for found in same_photo(np.concatenate([prints, prints[7:8, ::-1]]))] == [(7, 40)]


def test_pairs_are_found_across_blocks():
    rng = np.random.default_rng(0)
    prints = rng.normal(size=(600, 64, 64)).astype(np.float32)
    prints /= np.linalg.norm(prints, axis=(1, 2), keepdims=True)
    prints[3], prints[599] = prints[550], prints[550].T
    assert sorted(found[:2] for found in same_photo(prints)) == [(3, 550), (3, 599), (550, 599)]


# ------------------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
def test_the_kaggle_set_is_sound(real_data):
    report = check_set(real_data / "Data1", progress=False)
    assert report.problems == []
    assert report.parts["train"].files["image"] == 80 and report.parts["train"].distinct == 20
    assert report.parts["test"].distinct == 20
    assert len(report.warnings) == 2 and all("grey edges" in text for text in report.warnings)


@pytest.mark.real
@pytest.mark.parametrize("folder", ["DRIVE/training/images", "CHASE_DB1", "LES-AV/training/images"])
def test_real_photos_keep_their_distance_and_real_copies_are_found(folder, real_data):
    photos = [read_photo(path) for path in list_pictures(real_data / folder) if "HO" not in path.name][:8]
    prints = np.stack([fingerprint(picture) for picture in photos])
    assert list(same_photo(prints)) == []
    for n, picture in enumerate(photos):
        small = cv2.resize(turned(picture, n % 4, n % 2 == 0), None, fx=0.8, fy=0.8)
        coded = cv2.imdecode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_COLOR)
        found = [pair[:2] for pair in same_photo(np.concatenate([prints, fingerprint(coded)[None]]))]
        assert found == [(n, len(photos))]
