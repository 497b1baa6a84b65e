"""Raw public sets -> the Data1 layout (the original's `data_augmentation` notebook, and four sets more).

The original's two steps keep their names: `load_data` lists raw DRIVE, `augment_data` writes photos and masks with their
variants at 512x512. `prepare_set` does the same for every set in `SETS`, brings fields of view and second observers
along, and writes the folder whole or not at all:

    {train,test}/{image,mask,fov,mask_2nd}/<name>.png      photo, label 0 … 255, field of view 0/255, second observer
    photos.csv                                             part,name,photo,subject,variant,source: which files show
                                                           one photo, and one person

A set is described by two functions: which files of a folder are its photos, and what belongs to each of them.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from retina_seg.data import PARTS, read_mask
from retina_seg.images import PHOTO_ENDINGS, natural_key, read_photo, write_picture
from retina_seg.utils import UserError, create_dir, write_text

SIZE = 512  # the side the original squeezes everything to
LARGEST_SIZE = 8192
MAX_ANGLE = 45.0  # the original's Rotate(limit=45)
SPLITS = ("usual", *PARTS)
SEARCH_DEPTH = 2  # how far below SOURCE a set is looked for: archives unpack into a folder of their name


# ------------------------------------------------------------------------------------------------- what a raw set holds


@dataclass(frozen=True)
class RawPhoto:
    """A photo of a raw set with the files that belong to it.

    Attributes:
        part: "train" or "test", by the set's usual split.
        name: its file name without endings; `photos.csv` calls the photo so.
        image, mask: the photo and the first observer's label; mask None: nobody has labelled it.
        fov, mask_2nd: the field of view and the second observer's label, where the set has them.
    """

    part: str
    name: str
    image: Path
    mask: Path | None
    fov: Path | None = None
    mask_2nd: Path | None = None

    @property
    def subject(self) -> str:
        """Whose eye it is: CHASE_DB1's Image_01L and Image_01R are one child's; elsewhere each photo is its own."""
        return re.sub(r"(?i)^(image_\d+)[LR]$", r"\1", self.name)


@dataclass(frozen=True)
class RawSet:
    """How a public set looks when it is unpacked.

    Attributes:
        title: what people call it.
        total: labelled photos in the complete set.
        layout: its usual files, in words, for help and error messages.
        photos: the photo files in a folder that is this set's; none: the folder is not.
        describe: the same folder -> its photos with their labels, in natural order.
        vessel_above: label values above this are vessel.
    """

    title: str
    total: int
    layout: str
    photos: Callable[[Path], list[Path]]
    describe: Callable[[Path], list[RawPhoto]]
    vessel_above: int = 127


def _listed(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None


def _below(folder: Path, *names: str) -> Path | None:
    """The folder in `folder` that has the first possible one of `names`, whatever its case."""
    found = {path.name.lower(): path for path in _listed(folder) if path.is_dir()} if folder.is_dir() else {}
    return next((found[name] for name in names if name in found), None)


def _stem(path: Path) -> str:
    """The file name without its ending, and without the `.gz` behind it: im0001.ah of im0001.ah.ppm.gz."""
    return Path(path.name[:-3] if path.name.lower().endswith(".gz") else path.name).stem


def _by_stem(folder: Path | None) -> dict[str, Path]:
    """The pictures in `folder`, packed ones too, by lower-case stem in natural order; {} for None.

    Downloads differ in the case of names and in endings, so neither is asked for.
    """
    if folder is None:
        return {}
    found: dict[str, Path] = {}
    # a packed file comes behind its unpacked twin, which is then the one taken
    for path in sorted(
        _listed(folder), key=lambda path: (path.suffix.lower() == ".gz", natural_key(path.name.lower()))
    ):
        name = path.name.lower().removesuffix(".gz")
        if name.endswith(PHOTO_ENDINGS) and path.is_file():
            found.setdefault(_stem(path).lower(), path)
    return {stem: found[stem] for stem in sorted(found, key=natural_key)}


def _matching(files: dict[str, Path], pattern: str) -> list[Path]:
    return [path for stem, path in files.items() if re.fullmatch(pattern, stem)]


def _label(image: Path, labels: dict[str, Path], stem: str, where: str) -> Path:
    if stem not in labels:
        raise UserError(f"{image}: its label {where}/{stem}.* is missing; complete the download, or remove the photo")
    return labels[stem]


def _half(index: int, count: int) -> str:
    return PARTS[0] if index < (count + 1) // 2 else PARTS[1]


# ------------------------------------------------------------------------------------------------------------- the sets


def _drive_photos(folder: Path) -> list[Path]:
    return [
        image
        for name in ("training", "test")
        if (below := _below(folder, name))
        for image in _matching(_by_stem(_below(below, "images")), rf"\d+_{name}")
    ]


def _drive(folder: Path) -> list[RawPhoto]:
    """21_training.tif <-> 21_manual1.gif, 21_manual2.gif, 21_training_mask.gif."""
    raw = []
    for image in _drive_photos(folder):
        root, name = image.parent.parent, _stem(image)
        number, part = name.lower().split("_")
        mask = _label(image, _by_stem(_below(root, "1st_manual")), f"{number}_manual1", "1st_manual")
        fov = _by_stem(_below(root, "mask")).get(f"{name.lower()}_mask")
        second = _by_stem(_below(root, "2nd_manual")).get(f"{number}_manual2")
        raw.append(RawPhoto("train" if part == "training" else "test", name, image, mask, fov, second))
    return raw


def _chase_photos(folder: Path) -> list[Path]:
    return _matching(_by_stem(folder), r"image_\d+[lr]")


def _chase(folder: Path) -> list[RawPhoto]:
    """Image_01L.jpg <-> Image_01L_1stHO.png, Image_01L_2ndHO.png, mask/Image_01L.gif.

    L and R are one child's two eyes, which look alike: the split goes by child, 1 to 10 train and 11 to 14 test.
    """
    files, fovs = _by_stem(folder), _by_stem(_below(folder, "mask", "masks"))
    raw = []
    for image in _chase_photos(folder):
        name = _stem(image)
        stem = name.lower()
        part = "train" if int(re.findall(r"\d+", stem)[0]) <= 10 else "test"
        mask = _label(image, files, f"{stem}_1stho", folder.name)
        raw.append(RawPhoto(part, name, image, mask, fovs.get(stem), files.get(f"{stem}_2ndho")))
    return raw


def _stare_files(folder: Path) -> dict[str, Path]:
    """STARE's three archives unpack into one folder or into one folder each: both are seen as one."""
    files = _by_stem(folder)
    for below in sorted(path for path in _listed(folder) if path.is_dir()):
        files = _by_stem(below) | files
    return files


def _stare_photos(folder: Path) -> list[Path]:
    return sorted(_matching(_stare_files(folder), r"im\d{4}"), key=lambda path: natural_key(_stem(path).lower()))


def _stare(folder: Path) -> list[RawPhoto]:
    """im0001.ppm <-> im0001.ah.ppm (A. Hoover), im0001.vk.ppm (V. Kouznetsova), all perhaps .gz; the first half trains.

    The archive of all 397 photos has labels for 20 of them.
    """
    files, photos = _stare_files(folder), _stare_photos(folder)
    labelled = [path for path in photos if f"{_stem(path).lower()}.ah" in files]
    if not labelled:
        raise UserError(f"{folder}: no photo has its label <name>.ah.ppm; unpack the archive labels-ah here too")
    raw = [RawPhoto(PARTS[0], _stem(path), path, None) for path in photos if path not in labelled]
    for index, path in enumerate(labelled):
        stem = _stem(path).lower()
        part = _half(index, len(labelled))
        raw.append(RawPhoto(part, _stem(path), path, files[f"{stem}.ah"], None, files.get(f"{stem}.vk")))
    return raw


def _hrf_photos(folder: Path) -> list[Path]:
    return _matching(_by_stem(_below(folder, "images")), r"\d+_(h|dr|g)")


def _hrf(folder: Path) -> list[RawPhoto]:
    """images/01_dr.JPG <-> manual1/01_dr.tif, mask/01_dr_mask.tif; numbers 1 to 5 of each class train, 6 to 15 test."""
    labels, fovs = _by_stem(_below(folder, "manual1")), _by_stem(_below(folder, "mask"))
    raw = []
    for image in _hrf_photos(folder):
        name = _stem(image)
        stem = name.lower()
        part = "train" if int(stem.split("_")[0]) <= 5 else "test"
        raw.append(RawPhoto(part, name, image, _label(image, labels, stem, "manual1"), fovs.get(f"{stem}_mask")))
    return raw


def _les_av_roots(folder: Path) -> list[tuple[str | None, Path]]:
    """(part, folder with images/): the set itself, or its two halves where a copy is laid out as DRIVE is."""
    halves = [("train", _below(folder, "training")), ("test", _below(folder, "test"))]
    return [(None, folder)] if _below(folder, "images") else [(part, root) for part, root in halves if root]


_LES_AV_LABELS = ("vessel-segmentations", "1st_manual")


def _les_av_photos(folder: Path) -> list[Path]:
    return [
        image
        for _, root in _les_av_roots(folder)
        if _below(root, *_LES_AV_LABELS)  # numbers alone could be anybody's photos
        for image in _matching(_by_stem(_below(root, "images")), r"\d+")
    ]


def _les_av(folder: Path) -> list[RawPhoto]:
    """images/12.png <-> vessel-segmentations/12.png, masks/12*; no split is published, the first half trains."""
    raw = []
    for given, root in _les_av_roots(folder):
        where = _below(root, *_LES_AV_LABELS)
        if where is None:
            continue
        labels, fovs = _by_stem(where), _by_stem(_below(root, "masks", "mask"))
        images = _matching(_by_stem(_below(root, "images")), r"\d+")
        for index, image in enumerate(images):
            name = _stem(image)
            mask = _label(image, labels, name, where.name)
            fov = fovs.get(f"{name}_mask", fovs.get(name))
            raw.append(RawPhoto(given or _half(index, len(images)), name, image, mask, fov))
    return raw


SETS = {
    "drive": RawSet(
        "DRIVE",
        40,
        "{training,test}/images/21_training.tif, 1st_manual/21_manual1.gif, mask/21_training_mask.gif",
        _drive_photos,
        _drive,
    ),
    "chase_db1": RawSet(
        "CHASE_DB1", 28, "Image_01L.jpg, Image_01L_1stHO.png, Image_01L_2ndHO.png", _chase_photos, _chase
    ),
    "stare": RawSet("STARE", 20, "im0001.ppm, im0001.ah.ppm, im0001.vk.ppm, each perhaps .gz", _stare_photos, _stare),
    "hrf": RawSet("HRF", 45, "images/01_dr.JPG, manual1/01_dr.tif, mask/01_dr_mask.tif", _hrf_photos, _hrf),
    "les-av": RawSet(
        "LES-AV",
        22,
        "images/12.png, vessel-segmentations/12.png, masks/12.gif",
        _les_av_photos,
        _les_av,
        vessel_above=0,  # in some copies 1, 2, 3 are artery, vein, both
    ),
}


def raw_set(name: str) -> tuple[str, RawSet]:
    """The key in `SETS` and the set that `name` means; case, - and _ do not matter. Raises `UserError`: no such set."""
    plain = name.lower().replace("_", "-")
    for key, raw in SETS.items():
        if key.replace("_", "-") == plain:
            return key, raw
    raise UserError(f"{name}: no such set; choose one of {', '.join(SETS)}")


def find_raw(raw: RawSet, source: str | Path) -> Path:
    """The folder laid out as `raw` at `source`, or up to two folders below it.

    Raises:
        UserError: no such folder, it holds no such set, or several.
    """
    source = Path(source)
    if not source.is_dir():
        state = "is no folder; unpack the archive first" if source.exists() else "no such folder"
        raise UserError(f"{source}: {state}; give the folder {raw.title} was unpacked to")
    found = _search(raw, source)
    if len(found) > 1:
        names = ", ".join(str(path) for path in found[:3])
        raise UserError(f"{source}: holds {raw.title} several times ({names}); name one of them")
    if found:
        return found[0]
    others = [(key, other.title) for key, other in SETS.items() if other is not raw and _search(other, source)]
    hint = f"it looks like {others[0][1]}: retina-seg prepare {others[0][0]}" if others else "check the folder"
    raise UserError(f"{source}: does not hold {raw.title} as published ({raw.layout}); {hint}")


def _search(raw: RawSet, source: Path) -> list[Path]:
    level = [source]
    for _ in range(SEARCH_DEPTH + 1):
        found = [folder for folder in level if raw.photos(folder)]
        if found:
            return found
        level = [below for folder in level for below in sorted(_listed(folder)) if below.is_dir()]
    return []


# ---------------------------------------------------------------------------------------------------- original's two


def load_data(path: str | Path) -> tuple[tuple[list[Path], list[Path]], tuple[list[Path], list[Path]]]:
    """List raw DRIVE: `(train_images, train_masks), (test_images, test_masks)`, paths in order, paired by their number.

    Raises:
        UserError: `path` is not DRIVE, or a photo has no label.
    """
    photos = _drive(find_raw(SETS["drive"], path))
    train, test = ([photo for photo in photos if photo.part == part] for part in PARTS)
    return _paths(train), _paths(test)


def _paths(photos: list[RawPhoto]) -> tuple[list[Path], list[Path]]:
    return [photo.image for photo in photos], [photo.mask for photo in photos if photo.mask]


def augment_data(
    images: Sequence[str | Path],
    masks: Sequence[str | Path],
    save_path: str | Path,
    augment: bool = True,
    seed: int = 42,
) -> None:
    """Write every photo and its mask, squeezed to 512x512, as `save_path/{image,mask}/<name>_<k>.png`.

    k is 0 for the photo itself, 1 mirrored left-right, 2 mirrored top-bottom, 3 turned by up to 45 degrees; without
    `augment` only 0 is written. `seed` draws the turns.

    Raises:
        UserError: the lists differ in length, a file cannot be read or written, a mask has not its photo's size.
    """
    if len(images) != len(masks):
        raise UserError(f"{len(images)} photos but {len(masks)} masks: every photo needs one mask")
    save_path = Path(save_path)
    for kind in ("image", "mask"):
        create_dir(save_path / kind)
    for image, mask in tqdm(zip(images, masks, strict=True), total=len(images)):
        photo = RawPhoto("", _stem(Path(image)), Path(image), Path(mask))
        for k, pictures in enumerate(_versions(_load(photo, 127), augment, _angle(seed, photo.name))):
            for kind, picture in _squeezed(pictures, SIZE).items():
                write_picture(save_path / kind / f"{photo.name}_{k}.png", picture)


# ---------------------------------------------------------------------------------------------------- photos on their way


def _load(raw: RawPhoto, vessel_above: int) -> dict[str, np.ndarray]:
    """The pictures of one photo by folder name: "image" (H, W, 3) uint8 RGB, the others (H, W) uint8 of 0 and 255.

    Labels are cut before anything is resized: DRIVE's second observer decodes to 3 and 253.

    Raises:
        UserError: a file cannot be read, or two differ in size.
    """
    pictures = {"image": read_photo(raw.image)}
    for kind, path, above in (
        ("mask", raw.mask, vessel_above),
        ("fov", raw.fov, 127),
        ("mask_2nd", raw.mask_2nd, vessel_above),
    ):
        if path is None:
            continue
        picture = read_mask(path)
        if picture.shape != pictures["image"].shape[:2]:
            sizes = " and ".join(f"{a.shape[1]}x{a.shape[0]}" for a in (pictures["image"], picture))
            raise UserError(f"{raw.image} and {path}: differ in size ({sizes}); download the two again")
        pictures[kind] = (picture > above).astype(np.uint8) * 255
    return pictures


def _angle(seed: int, name: str) -> float:
    """Degrees that the photo called `name` is turned by: a draw of its own, whatever other photos there are."""
    return float(np.random.default_rng([seed, zlib.crc32(name.encode())]).uniform(-MAX_ANGLE, MAX_ANGLE))


def _versions(pictures: dict[str, np.ndarray], augment: bool, angle: float) -> Iterator[dict[str, np.ndarray]]:
    """The photo itself and, with `augment`, its three variants; everything that belongs to a photo turns with it."""
    yield pictures
    if augment:
        yield {kind: picture[:, ::-1] for kind, picture in pictures.items()}
        yield {kind: picture[::-1] for kind, picture in pictures.items()}
        yield rotated(pictures, angle)


def rotated(pictures: dict[str, np.ndarray], angle: float) -> dict[str, np.ndarray]:
    """Pictures turned by `angle` degrees about their middle, "image" bilinearly, the others to the nearest pixel.

    The package's one use of albumentations, which is no longer developed: the original's `Rotate`, with the angle given
    rather than drawn, because its releases seed their draws in different ways. What turns in from beyond the frame is
    mirrored, as in the Kaggle set (the default until albumentations 2, which leaves it black).
    """
    # it asks the network for a newer version when imported, and importing it takes seconds
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    try:
        import albumentations
    except ImportError as error:
        raise UserError(f"variants need albumentations ({error}): pip install 'albumentations>=1.4,<3'") from None
    turn = albumentations.Compose(
        [albumentations.Rotate(limit=(angle, angle), border_mode=cv2.BORDER_REFLECT_101, p=1.0)]
    )
    kinds = [kind for kind in pictures if kind != "image"]
    turned = turn(image=pictures["image"], masks=[pictures[kind] for kind in kinds])
    return {"image": turned["image"], **dict(zip(kinds, turned["masks"], strict=True))}


def _squeezed(pictures: dict[str, np.ndarray], side: int | None) -> dict[str, np.ndarray]:
    """Pictures at `side` x `side` (None: as they are), as the original's `cv2.resize`: labels get grey edges.

    The field of view stays two-valued: it says which pixels count, and a pixel counts or does not.
    """
    pictures = {kind: np.ascontiguousarray(picture) for kind, picture in pictures.items()}
    if side is None:
        return pictures
    pictures = {kind: cv2.resize(picture, (side, side)) for kind, picture in pictures.items()}
    if "fov" in pictures:
        pictures["fov"] = (pictures["fov"] > 127).astype(np.uint8) * 255
    return pictures


# ----------------------------------------------------------------------------------------------------------- whole sets


def prepare_set(
    name: str,
    source: str | Path,
    destination: str | Path,
    size: str | int = "512",
    split: str = "usual",
    augment: bool | None = None,
    progress: bool = True,
    seed: int = 42,
) -> Path:
    """Write a raw public set to `destination` in the Data1 layout, whole or not at all.

    DRIVE at 512 is the Kaggle set: training files 4k … 4k+3 are photo k, its two mirror images and a turned one; test
    files 0 … 19. All other files have their photos' own names, with `_<k>` behind those of variants.

    Args:
        name: a key of `SETS`; case, - and _ do not matter.
        source: the folder the set was unpacked to, or one or two above it.
        destination: a folder that is not there yet, or holds nothing but a README.md.
        size: side in pixels that all is squeezed to (bilinearly, whatever its shape, as in the original), or "native".
        split: "usual", or "train" or "test" to put every photo into that part.
        augment: whether training photos get the original's three variants; None: for DRIVE at 512 only.
        progress: whether to show a bar.
        seed: draws the angles of the turned variants.

    Returns:
        `destination`. What is odd but no mistake (photos nobody labelled, an incomplete set) is printed.

    Raises:
        UserError: an unknown set, size or split; `source` is missing or not that set; a photo without label; files that
            cannot be read or differ in size; `destination` is not empty or lies inside `source`.
    """
    key, raw = raw_set(name)
    side = _side(size)
    if split not in SPLITS:
        raise UserError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    if augment and (side is None or split == "test"):
        raise UserError(
            "variants are made of training photos at a fixed size: leave augment out, or change size or split"
        )
    if augment is None:
        augment = key == "drive" and side == SIZE
    root = find_raw(raw, source)
    _check_destination(Path(source), Path(destination))
    photos = raw.describe(root)
    labelled = [photo for photo in photos if photo.mask]
    if len(labelled) < len(photos):
        print(f"{raw.title}: {len(photos) - len(labelled)} photos that nobody labelled are left out")
    if len(labelled) < raw.total:
        print(f"{raw.title}: {len(labelled)} labelled photos found, the complete set has {raw.total}")
    if split != "usual":
        labelled = [replace(photo, part=split) for photo in labelled]
    numbered = key == "drive" and augment and split == "usual"
    with _whole_folder(Path(destination)) as folder:
        rows = []
        for index, photo in enumerate(tqdm(labelled, desc=raw.title, unit="photo", disable=not progress)):
            many = augment and photo.part == "train"
            pictures = _load(photo, raw.vessel_above)
            place = index - sum(other.part != photo.part for other in labelled[:index])
            for k, version in enumerate(_versions(pictures, many, _angle(seed, photo.name))):
                file = photo.name + (f"_{k}" if many else "")
                if numbered:
                    file = str(4 * place + k if many else place)
                for kind, picture in _squeezed(version, side).items():
                    write_picture(create_dir(folder / photo.part / kind) / f"{file}.png", picture)
                rows.append((photo.part, file, photo.name, photo.subject, k, photo.image.name))
        write_text(folder / "photos.csv", _table(("part", "name", "photo", "subject", "variant", "source"), rows))
    return Path(destination)


def _side(size: str | int) -> int | None:
    """Pixels, or None for "native"."""
    if size == "native":
        return None
    text = str(size)
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= LARGEST_SIZE):
        raise UserError(f"--size {size}: give a number of pixels (up to {LARGEST_SIZE}) or native")
    return int(text)


def _check_destination(source: Path, destination: Path) -> None:
    """Refuse a destination that would mix with other files or with the raw photos themselves."""
    if (destination.exists() or destination.is_symlink()) and not destination.is_dir():
        raise UserError(f"{destination}: a file stands where the set is to go; choose another folder")
    inside = Path(os.path.realpath(destination))  # `resolve` raises where a link leads in a circle
    if inside == source.resolve() or source.resolve() in inside.parents:
        raise UserError(f"{destination}: lies inside the raw photos {source}; choose a folder elsewhere")
    held = [path.name for path in _listed(destination) if path.name != "README.md"] if destination.is_dir() else []
    if held:
        raise UserError(
            f"{destination}: is not empty ({sorted(held)[0]}); choose a new folder, or clear this one first"
        )


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


@contextlib.contextmanager
def _whole_folder(destination: Path) -> Iterator[Path]:
    """Gives a temporary folder beside `destination`; it becomes `destination` when the block ends well.

    Where `destination` is there already, what was written is moved into it. Whatever goes wrong, Ctrl-C too, nothing is
    left behind.
    """
    destination = Path(os.path.realpath(destination))
    missing = [folder for folder in (destination.parent, *destination.parent.parents) if not folder.exists()]
    temporary = create_dir(destination.parent) / f".{destination.name}.partial-{uuid.uuid4().hex[:8]}"
    moved: list[Path] = []
    try:
        create_dir(temporary)
        yield temporary
        if destination.exists():
            for path in sorted(temporary.iterdir()):
                moved.append(destination / path.name)
                shutil.move(path, moved[-1])
            temporary.rmdir()
        else:
            temporary.rename(destination)
    except BaseException as error:
        for path in (temporary, *moved):
            shutil.rmtree(path, ignore_errors=True)
            if path.is_file():
                path.unlink()
        for folder in missing:  # innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"{destination}: cannot be written ({error.strerror or error})") from error
        raise
