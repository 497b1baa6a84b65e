"""Raw public sets -> the Data1 layout.

`load_data` and `augment_data` are the steps of the original's `data_augmentation` notebook, for DRIVE. `prepare_set` takes
every set in `SETS`, and writes fields of view, second observers and `photos.csv` too.
"""

import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from retina_seg.fov import LARGEST_SIDE
from retina_seg.images import IMAGE_SUFFIXES, read_image, read_mask, visible, write_image
from retina_seg.sets import atomic_folder
from retina_seg.sets.files import KINDS, PARTS, find_folder, folder_levels
from retina_seg.sets.layout import check_size
from retina_seg.utils import UserError, create_dir, natural_key, user_path, write_csv

SIZE = 512  # the side the original resizes everything to
MAX_ANGLE = 45.0  # the original's Rotate(limit=45)
SPLITS = ("usual", *PARTS)
COLUMNS = ("part", "name", "photo", "subject", "variant", "source")
Arrays = dict[str, np.ndarray]  # kind (image, mask, fov, mask_2nd) -> (H, W, 3) or (H, W) uint8


@dataclass(frozen=True)
class RawSet:
    """How a public set looks when unpacked. Paths are relative to its folder, without endings; case does not matter."""

    name: str
    total: int  # images with a mask in the complete set
    layout: str  # its usual files, for error messages
    image: str  # regular expression of its images' paths
    mask: str  # the same of an image's mask, with the groups of `image` filled in
    fov: str = ""  # of its field of view
    mask_2nd: str = ""  # of the second observer's mask
    last_train: int | None = None  # the last training image's `number`; None: by `folder`, else the first half
    complete: bool = True  # whether every image has a mask


# fmt: off
SETS = {raw.name.lower(): raw for raw in (
    RawSet("DRIVE", 40, "{training,test}/images/21_training.tif, 1st_manual/21_manual1.gif, mask/21_training_mask.gif",
           r"(?P<folder>training|test)/images/(?P<number>\d+)_(?P=folder)", "{folder}/1st_manual/{number}_manual1",
           "{folder}/mask/{number}_{folder}_mask", "{folder}/2nd_manual/{number}_manual2"),
    # the subject is a child, whose two eyes these are
    RawSet("CHASE_DB1", 28, "Image_01L.jpg, Image_01L_1stHO.png, Image_01L_2ndHO.png",
           r"(?P<name>(?P<subject>Image_(?P<number>\d+))[LR])", "{name}_1stHO", "masks?/{name}", "{name}_2ndHO",
           last_train=10),
    # three archives, unpacked into one folder or into three; that of all 397 images has masks for 20, by A. Hoover
    RawSet("STARE", 20, "im0001.ppm, im0001.ah.ppm of the archive labels-ah, im0001.vk.ppm, each perhaps .gz",
           r"([^/]+/)?(?P<name>im\d{4})", r"([^/]+/)?{name}\.ah", "", r"([^/]+/)?{name}\.vk", complete=False),
    RawSet("HRF", 45, "images/01_dr.JPG, manual1/01_dr.tif, mask/01_dr_mask.tif",
           r"images/(?P<name>(?P<number>\d+)_(h|dr|g))", "manual1/{name}", "mask/{name}_mask", last_train=5),
    # some copies are laid out as DRIVE is
    RawSet("LES-AV", 22, "images/12.png, vessel-segmentations/12.png, masks/12.gif",
           r"(?P<folder>|training/|test/)images/(?P<name>\d+)", "{folder}(vessel-segmentations|1st_manual)/{name}",
           "{folder}masks?/{name}(_mask)?"),
    RawSet("FIVES", 800, "{train,test}/Original/1_A.png, {train,test}/Ground truth/1_A.png",
           r"(?P<folder>train|test)/Original/(?P<name>\d+_[A-Z])", "{folder}/Ground[ _]?truth/{name}"),
)}
# fmt: on


@dataclass
class RawImage:
    """An image of a raw set."""

    name: str  # its file name without endings; `photos.csv` calls the photo so
    files: dict[str, Path]  # its "image", then "mask", "fov", "mask_2nd" where it has them
    groups: dict[str, str] = field(default_factory=dict)  # what the set's `image` pattern takes from its path
    part: str = ""  # "train" or "test", by the set's usual split


def list_raw(raw: RawSet, source: str | Path) -> list[RawImage]:
    """The images of the set at `source`, or up to three folders below it, in natural order, those for training first.

    Raises `UserError`: no such folder, it holds no such set, or several; an image without its mask.
    """
    source = Path(source)
    if not source.is_dir():
        state = "is no folder; unpack the archive first" if source.exists() else "no such folder"
        raise UserError(f"{source}: {state}; give the folder {raw.name} was unpacked to")
    found = find_folder(source, lambda folder: _images_in(raw, folder), f"{raw.name} several times")
    if found is None:
        raise UserError(f"{source}: does not hold {raw.name} as published ({raw.layout}); check images and masks")
    images = _images_in(raw, found)
    labelled = [image for image in images if "mask" in image.files]
    folders = {image.groups.get("folder") for image in labelled}  # DRIVE's site gives no test masks
    for image in images:
        folder = image.groups.get("folder")
        if raw.complete and "mask" not in image.files and folder in folders:
            mask = raw.mask.format(**image.groups)
            raise UserError(f"{image.files['image']}: its mask {mask}.* is missing; complete the download")
        if folder:
            training = folder.lower().startswith("train")
        elif raw.last_train is not None:
            training = int(image.groups["number"]) <= raw.last_train
        else:
            training = image in labelled[: (len(labelled) + 1) // 2]
        image.part = "train" if training else "test"
    return sorted(images, key=lambda image: image.part == "test")


def _stem(path: Path) -> str:
    """The file name without its ending, and without .gz after that: im0001.ah of im0001.ah.ppm.gz."""
    return path.with_suffix("").stem if path.suffix.lower() == ".gz" else path.stem


def _images_in(raw: RawSet, folder: Path) -> list[RawImage]:
    """The images in `folder`, if it is laid out as `raw`, in natural order; [] where it is not, or has no mask."""
    paths = [path for level in folder_levels(folder, 3) for below in level for path in visible(below) if path.is_file()]
    files: dict[str, Path] = {}  # by relative path without endings; im0001.ppm goes before its .gz
    for path in sorted(paths, key=lambda path: natural_key(_stem(path).lower())):
        if path.name.lower().removesuffix(".gz").endswith(IMAGE_SUFFIXES):
            files.setdefault(path.relative_to(folder).with_name(_stem(path)).as_posix(), path)
    images: dict[str, RawImage] = {}
    for key, path in files.items():
        if match := re.fullmatch(raw.image, key, re.IGNORECASE):
            images.setdefault(str(match.groupdict()), RawImage(_stem(path), {"image": path}, match.groupdict()))
    for image in images.values():
        for kind in KINDS[1:]:
            wanted = re.compile(getattr(raw, kind).format(**image.groups), re.IGNORECASE)
            if own := next(filter(wanted.fullmatch, files), None):
                image.files[kind] = files[own]
    return list(images.values()) if any("mask" in image.files for image in images.values()) else []


def load_data(path: str | Path) -> tuple[tuple[list[Path], list[Path]], tuple[list[Path], list[Path]]]:
    """The files of raw DRIVE: `(train_images, train_masks), (test_images, test_masks)`. Raises `UserError` as `list_raw`."""
    raw = [image for image in list_raw(SETS["drive"], path) if "mask" in image.files]
    parts = [[image.files for image in raw if image.part == part] for part in PARTS]
    train, test = (([files["image"] for files in part], [files["mask"] for files in part]) for part in parts)
    return train, test


def augment_data(
    images: Sequence[str | Path], masks: Sequence[str | Path], save_path: str | Path, augment: bool = True
) -> None:
    """Write every image and its mask, resized to 512x512, as `save_path/{image,mask}/<name>_<k>.png`.

    k is 0 for the image itself; with `augment` also 1 mirrored left-right, 2 top-bottom, 3 rotated by up to 45 degrees.

    Raises `UserError`: the lists differ in length, a file cannot be read or written, a mask has not its image's size.
    """
    if len(images) != len(masks):
        raise UserError(f"{len(images)} images but {len(masks)} masks: every image needs one mask")
    for image, mask in tqdm(zip(images, masks, strict=True), total=len(images)):
        raw = RawImage(_stem(Path(image)), {"image": Path(image), "mask": Path(mask)})
        for k, pixels in enumerate(_variants(raw, SIZE, augment, seed=42)):
            for kind, array in pixels.items():
                write_image(create_dir(Path(save_path) / kind) / f"{raw.name}_{k}.png", array)


def _variants(raw: RawImage, side: int | None, augment: bool, seed: int) -> list[Arrays]:
    """The image with all that belongs to it; with `augment` also mirrored left-right, top-bottom, and rotated; at `side`."""
    variants = [pixels := _load(raw)]
    if augment:
        rng = np.random.default_rng([seed, zlib.crc32(raw.name.encode())])  # whatever other images there are
        variants.append({kind: array[:, ::-1] for kind, array in pixels.items()})
        variants.append({kind: array[::-1] for kind, array in pixels.items()})
        variants.append(rotated(pixels, float(rng.uniform(-MAX_ANGLE, MAX_ANGLE))))
    return [_resized(variant, side) for variant in variants]


def _load(raw: RawImage) -> Arrays:
    """The image, RGB, and the other kinds as 0 and 255. Raises `UserError`: a file cannot be read, or two differ in size."""
    pixels = {"image": read_image(raw.files["image"])}
    for kind, path in list(raw.files.items())[1:]:
        array = read_mask(path)
        check_size(path, array, raw.files["image"], pixels["image"])
        pixels[kind] = (array > 127).astype(np.uint8) * 255  # DRIVE's second observer decodes to 3 and 253
    return pixels


def rotated(pixels: Arrays, angle: float) -> Arrays:
    """Arrays rotated anticlockwise by `angle` degrees, "image" bilinearly, the others to the nearest pixel.

    By the original's `albumentations.Rotate`. What enters from beyond the frame is mirrored, as in the Kaggle set.
    """
    # it asks the network for a newer version when imported, and importing it takes seconds
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    # the angle is given, not drawn: releases of albumentations seed their draws in different ways
    rotate = albumentations.Rotate(limit=(angle, angle), border_mode=cv2.BORDER_REFLECT_101, p=1.0)
    kinds = [kind for kind in pixels if kind != "image"]
    done = albumentations.Compose([rotate])(image=pixels["image"], masks=[pixels[kind] for kind in kinds])
    return {"image": done["image"], **dict(zip(kinds, done["masks"], strict=True))}


def _resized(pixels: Arrays, side: int | None) -> Arrays:
    """Arrays at `side` x `side` (None: as they are): masks get grey edges, as the original's; fields of view do not."""
    pixels = {kind: np.ascontiguousarray(array) for kind, array in pixels.items()}
    if side is not None:
        pixels = {kind: cv2.resize(array, (side, side)) for kind, array in pixels.items()}
    if "fov" in pixels:
        pixels["fov"] = (pixels["fov"] > 127).astype(np.uint8) * 255
    return pixels


def prepare_set(
    name: str,
    source: str | Path,
    destination: str | Path,
    size: str | int = "512",
    split: str = "usual",
    progress: bool = True,
    seed: int = 42,
) -> Path:
    """Write a raw public set to `destination` in the Data1 layout, whole or not at all.

    DRIVE at 512 is the Kaggle set: training files 4k … 4k+3 are photo k, mirrored left-right, top-bottom, and rotated by
    up to 45 degrees, test files are 0 … 19. All other files keep their images' names. What is incomplete is printed.

    Args:
        name: a key of `SETS`; case, - and _ do not matter.
        source: the folder the set was unpacked to, or up to three above it.
        destination: a new folder, or one with nothing but a README.md; it is returned.
        size: side in pixels, resized bilinearly, aspect ratio not kept; or "native".
        split: "usual", or "train" or "test" to put every image into that part.
        seed: of the angles of the rotated variants.

    Raises `UserError` as `list_raw` and `atomic_folder`; an unknown set, size or split; files that cannot be read or differ
    in size; `destination` lies inside `source`.
    """
    raw = {key.replace("_", "-"): raw for key, raw in SETS.items()}.get(name.lower().replace("_", "-"))
    if raw is None:
        raise UserError(f"{name}: no such set; choose one of {', '.join(SETS)}")
    side = None if size == "native" else int(size) if str(size).isdecimal() else 0
    if side is not None and not 1 <= side <= LARGEST_SIDE:
        raise UserError(f"--size {size}: give a number of pixels (up to {LARGEST_SIDE}) or native")
    if split not in SPLITS:
        raise UserError(f"--split {split}: choose one of {', '.join(SPLITS)}")
    source, destination = user_path(source), user_path(destination)
    images = list_raw(raw, source)
    # not `resolve`, which raises where a link leads in a circle
    if Path(os.path.realpath(destination)).is_relative_to(os.path.realpath(source)):
        raise UserError(f"{destination}: lies inside the raw images {source}; choose a folder elsewhere")
    labelled = [image for image in images if "mask" in image.files]
    if left := [image for image in images if image not in labelled]:
        print(f"{raw.name}: {len(left)} images without a mask are left out")
        if raw.complete:
            print(f"no {left[0].part} part: its images have no masks; to score, train with --validation photos")
    if len(labelled) < raw.total:
        print(f"{raw.name}: {len(labelled)} images with a mask found, the complete set has {raw.total}")
    augment = raw.name == "DRIVE" and side == SIZE
    rows: list[dict[str, object]] = []
    with atomic_folder(destination) as folder:
        for image in tqdm(labelled, desc=raw.name, unit="image", disable=not progress):
            part = image.part if split == "usual" else split
            many = augment and part == "train"
            subject, source_name = image.groups.get("subject", image.name), image.files["image"].name
            for k, pixels in enumerate(_variants(image, side, many, seed)):
                file = f"{image.name}_{k}" if many else image.name
                if augment and split == "usual":  # numbered from 0 in each part
                    file = str(sum(row["part"] == part for row in rows))
                for kind, array in pixels.items():
                    write_image(create_dir(folder / part / kind) / f"{file}.png", array)
                rows.append(dict(zip(COLUMNS, (part, file, image.name, subject, k, source_name), strict=True)))
        write_csv(folder / "photos.csv", COLUMNS, rows)
    return destination
