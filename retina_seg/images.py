"""Image files in and out: decoded within bounds, upright, as plain arrays; written whole or not at all.

Images are RGB; only the networks, which follow the original, are fed OpenCV's BGR.
"""

import contextlib
import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import imageio.v3 as iio
import numpy as np
from PIL import Image

from retina_seg.decode import FORMATS, as_8_bits, file_format, open_frame, scale_to_8_bits
from retina_seg.utils import UserError, atomic_write, file_kind, natural_sort, user_path

_ENDINGS = "png jpg jpeg jpe jfif tif tiff bmp ppm pgm gif webp avif jp2 j2k heic heif dcm dicom"
IMAGE_SUFFIXES = tuple(f".{ending}" for ending in _ENDINGS.split())
MAX_PIXELS = 178_000_000  # a 12,000 x 9,000 image has 108 million; Pillow itself refuses above 178.9 million
MAX_BYTES = 2**30
DIM, MOST_GREY = 192, 0.15  # a mask that nowhere reaches this is dim, and no mask if so much of it lies between
FEW = 16  # a mask of at most so many values holds classes, not shades
SQUARE = np.ones((3, 3), np.uint8)
_REASONS = {
    MemoryError: "is too large for the memory of this machine; scale the image down",
    Image.DecompressionBombError: f"has more than {MAX_PIXELS:,} pixels; scale the image down",
    PermissionError: "may not be read; check its permissions",
}


def _unknown(path: Path, start: bytes) -> str:
    """What a file is that is no image, with the remedy."""
    kind, what = file_format(start), file_kind(path)
    if kind == "video":
        return "is not an image but a video; save the frame that you need as PNG"
    if kind == "tiff":
        return "is a TIFF of a kind that is not read, as of 16-bit floats; save it as PNG"
    if what is None:
        return "is not an image that can be read; give a PNG, JPEG, TIFF or DICOM file"
    return f"is not an image but {what}" + ("" if ";" in what else "; give an image file")


def _read(path: str | Path, convert: Callable[[Image.Image], tuple[np.ndarray, str]] | None = None) -> tuple[Any, Any]:
    """What `convert` makes of the largest frame, and all remarks; without it height and width. Raises `UserError` alone."""
    path, start = user_path(path), b""
    try:
        if not path.is_file():
            raise UserError("is not a regular file" if path.exists() else "no such file")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"is larger than {MAX_BYTES >> 20} MiB; give a smaller file")
        with open(path, "rb") as stored:
            file: BinaryIO = stored
            if path.suffix.lower() == ".gz":  # STARE ships im0001.ppm.gz
                with gzip.open(stored) as packed:
                    file = io.BytesIO(packed.read(MAX_BYTES + 1))
                if file.getbuffer().nbytes > MAX_BYTES:
                    raise UserError(f"unpacks to more than {MAX_BYTES >> 20} MiB; give a smaller file")
            start = file.read(160)
            file.seek(0)
            (height, width), frame, decode = open_frame(file)
            if width * height > MAX_PIXELS:
                raise UserError(f"{width}x{height} pixels are more than {MAX_PIXELS:,}; scale the image down")
            if convert is None:
                return height, width
            image, scaled = decode()
            array, said = convert(image)
            return array, "; ".join(filter(None, (frame, scaled, said)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: {_unknown(path, start)}") from None
    except Exception as error:  # decoders of broken bytes raise anything
        damaged = f"is damaged or cut short ({type(error).__name__}: {str(error)[:80]})"
        why = next((why for kind, why in _REASONS.items() if isinstance(error, kind)), damaged)
        raise UserError(f"{path}: {why}") from None


def load_image(path: str | Path) -> tuple[np.ndarray, str]:
    """Decode a fundus image: (H, W, 3) uint8 RGB, upright by its EXIF orientation, and a remark, "" if it is an ordinary one.

    Grey becomes three equal channels, transparency is laid on black, more than 8 bits are scaled, of several frames the
    largest is taken. The remark says so: "page 2 of 2; 16 bits, scaled from 12".

    Raises `UserError`: no such file, not an image, damaged, too large, a format whose package is not installed.
    """
    return _read(path, lambda image: (np.array(_on_black(image).convert("RGB")), ""))


def _on_black(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))


def read_image(path: str | Path) -> np.ndarray:
    """The image (H, W, 3) uint8 RGB of `load_image`, which raises the same."""
    return load_image(path)[0]


def as_image(image: Any) -> np.ndarray:
    """What people hold as an image (H, W, 3) uint8 RGB.

    Args:
        image: an array or a tensor, (H, W), (H, W, 3 or 4) or, a tensor, (3, H, W): uint8, deeper integers or floats, as
            `decode.scale_to_8_bits` takes them; a PIL image; or the path of a file.

    Raises `ValueError`: another shape or type. Raises `UserError` as `load_image`.
    """
    if isinstance(image, (str, Path)):
        return read_image(image)
    if image is None:
        how = "cv2.imread gives None where it cannot read a file; retina_seg.images.read_image names the cause"
        raise ValueError(f"an image is an array, a PIL image or a path, got None: {how}")
    if isinstance(image, Image.Image):
        image = np.asarray(_on_black(as_8_bits(image)[0]).convert("RGB"))
    if hasattr(image, "is_floating_point"):  # a torch tensor, whose channels are first
        image = image.detach().cpu().float().numpy() if image.is_floating_point() else image.detach().cpu().numpy()
        image = image.transpose(1, 2, 0) if image.ndim == 3 else image
    if not isinstance(image, np.ndarray) or image.dtype.kind not in "uif":
        what = getattr(image, "dtype", type(image).__name__)
        raise ValueError(f"an image is an array of numbers, a PIL image or a path, got {what}")
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(f"an image has shape (H, W, 3) or (H, W), got {image.shape}")
    if image.dtype != np.uint8:
        image = scale_to_8_bits(image)[0]
    if image.shape[2] == 4:
        return np.asarray(_on_black(Image.fromarray(np.ascontiguousarray(image))).convert("RGB"))
    return image if image.shape[2] == 3 else np.repeat(image, 3, axis=2)


def load_mask(path: str | Path) -> tuple[np.ndarray, str]:
    """Decode a mask: (H, W) uint8, vessel above 127, and a remark, "" if it is an ordinary one. Raises as `load_image`.

    Grey values are kept, with these exceptions. Of few values none above 127: all above the lowest become 255. Of three
    values, or of few whose dark ones fill areas as no resampled edge does: those become 255. Of many values all below 192,
    nearly all dark or bright: those above half of the bright become 255. Of colours the brightest channel counts, and the
    alpha channel where all that is not transparent has one colour. A palette is looked up: some public sets store inverted
    ones.
    """
    return _read(path, _vessels)


def _vessels(image: Image.Image) -> tuple[np.ndarray, str]:
    """The mask (H, W) uint8 in a decoded image, and the remark of `load_mask`."""
    said, lossy, grey = [], image.format in ("JPEG", "MPO"), None
    if image.mode in ("RGBA", "LA", "PA"):
        pixels = np.asarray(image.convert("RGBA"))
        opaque = pixels[pixels[:, :, 3] > 0, :3]
        if 0 not in (len(opaque), 255 - pixels[:, :, 3].min()) and np.all(opaque == opaque[0]):
            grey, said = pixels[:, :, 3], ["in the alpha channel"]
        image = _on_black(image)
    if grey is None and image.mode not in ("1", "L"):
        pixels = np.asarray(image.convert("RGB"))
        brightest = pixels.max(axis=2)
        colour = np.max(brightest - pixels.min(axis=2))
        if colour > 64 or (colour and not lossy and len(np.unique(brightest)) <= FEW):  # the noise of JPEG is less
            grey, said = brightest, ["colours: the brightest channel counts"]
    grey = np.array(image.convert("L") if grey is None else grey)
    counts = np.bincount(grey.ravel(), minlength=256)
    values = np.flatnonzero(counts)
    low, high = values[0] if len(values) > 1 else 0, values[-1]
    if high == 0:
        said.append("all black, so its image counts as without vessels")
    elif lossy and high < FEW:
        raise UserError(f"has no value above {high}, where JPEG has noise of its own; save the mask as PNG")
    elif len(values) <= FEW and not lossy:
        dark = [int(value) for value in values if low < value <= 127]
        # the values of resampled edges lie in thin lines, without 3x3 of them anywhere
        wide = [v for v in dark if cv2.erode((grey == v).astype(np.uint8), SQUARE, borderValue=0).any()]
        solid = dark if high <= 127 or len(values) == 3 else wide
        if solid or len(values) == 3:
            grey = np.uint8(255) * (np.isin(grey, solid) | (grey > 127))
            which = f"all above {low}" if solid == dark else f"those above 127 and {', '.join(map(str, solid))}"
            said.append(f"values {', '.join(map(str, values))}: {which} are vessel")
    elif high < DIM:
        level = np.percentile(grey[grey > high // 4], 90) / 2  # JPEG's noise lifts a few pixels above the mask's white
        if np.count_nonzero((grey > level / 4) & (grey < 1.5 * level)) < MOST_GREY * grey.size:
            grey = np.uint8(255) * (grey > level)
            said.append(f"values up to {high}: those above {level:.0f} are vessel")
        elif high <= 127:
            said.append(f"its brightest value is {high}, vessel is above 127")
    return grey, "; ".join(said)


def read_mask(path: str | Path) -> np.ndarray:
    """The mask (H, W) uint8, vessel above 127, of `load_mask`, which raises the same."""
    return load_mask(path)[0]


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of the frame that `load_image` takes, from the header alone, as stored (before EXIF rotation)."""
    return _read(path)


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8, or (H, W) uint16, in the format of the ending of `path`: whole or not at all.

    Raises `UserError`: the folder may not be written to, or the disk is full.
    """
    with atomic_write(path) as temporary:
        if Path(path).suffix.lower() != ".png":
            iio.imwrite(temporary, image, plugin="pillow")
            return
        # OpenCV's own choice of filter and strategy writes two to six times as fast as Pillow at its fastest, as small
        done, content = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image)
        if not done:
            raise OSError("OpenCV could not encode it")
        temporary.write_bytes(content.data)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """`image` (H, W, 3) uint8 BGR after JPEG compression of `quality`, 1 to 100."""
    coded = cv2.imencode(".jpg", np.ascontiguousarray(image), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded: Any = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return decoded


def visible(folder: str | Path) -> list[Path]:
    """What is in `folder`, hidden names left out, in order of name. Raises `UserError`: it cannot be listed."""
    try:
        return sorted(path for path in user_path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); give a folder that you may read") from None


def is_image(path: str | Path) -> bool:
    """Whether a file is to be read as an image: by its ending (`IMAGE_SUFFIXES`), else by its first bytes."""
    path = Path(path)
    if not path.is_file() or path.suffix.lower() in IMAGE_SUFFIXES:
        return path.is_file()
    with contextlib.suppress(Exception), open(path, "rb") as file:
        kind = file_format(file.read(160))
        file.seek(0)
        if kind == "other":
            Image.open(file, formats=FORMATS)
        return kind != "video"
    return False


def list_images(folder: str | Path) -> list[Path]:
    """The images in `folder` (not below it) by `is_image`, in natural order (2 before 10), hidden ones left out.

    Raises `UserError` as `visible`.
    """
    return natural_sort(path for path in visible(folder) if is_image(path))
