"""Image files in and out: decoded within bounds, upright, as plain arrays; written whole or not at all.

Images are RGB; only the networks, which follow the original, are fed OpenCV's BGR.
"""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from retina_seg.utils import UserError, atomic_write, natural_sort, user_path

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif", ".webp")
MAX_PIXELS = 178_000_000  # a 12,000 x 9,000 image has 108 million; Pillow itself refuses above 178.9 million
MAX_BYTES = 2**30
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "GIF", "WEBP")
_REASONS = {
    MemoryError: "is too large for the memory of this machine; scale the image down",
    Image.DecompressionBombError: f"has more than {MAX_PIXELS:,} pixels; scale the image down",
    Image.UnidentifiedImageError: "is not an image that can be read; save it as an 8-bit PNG or JPEG",
    PermissionError: "may not be read; check its permissions",
}


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The decoder of `path` with its header read and its size checked; anything it raises becomes a `UserError`."""
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; give a smaller file")
        source: Path | io.BytesIO = path
        if path.suffix.lower() == ".gz":  # STARE ships im0001.ppm.gz
            with gzip.open(path) as packed:
                source = io.BytesIO(packed.read(MAX_BYTES + 1))
            if source.getbuffer().nbytes > MAX_BYTES:
                raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB; give a smaller file")
        with Image.open(source, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{path}: {width}x{height} pixels are more than {MAX_PIXELS:,}; scale the image down")
            yield image
    except UserError:
        raise
    except Exception as error:  # decoders of broken bytes raise anything
        damaged = f"is damaged or cut short ({type(error).__name__}: {str(error)[:80]})"
        why = next((why for kind, why in _REASONS.items() if isinstance(error, kind)), damaged)
        raise UserError(f"{path}: {why}") from None


def _upright_8_bit(image: Image.Image, path: str | Path) -> Image.Image:
    """The image turned by its EXIF orientation; 16-bit grey by its high byte. Raises `UserError`: 32 bits a pixel."""
    file_format, image = image.format, ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image, np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a pixel; save it as an 8-bit or 16-bit image")
    return image


def read_image(path: str | Path) -> np.ndarray:
    """Decode a fundus image: (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Grey becomes three equal channels, 16 bits become 8, transparency is laid on black; of several frames, the first.

    Raises `UserError`: no such file, not an image, damaged, too large, 32 bits a pixel.
    """
    with _opened(path) as opened:
        image = _upright_8_bit(opened, path)
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image.convert("RGBA"))
        return np.array(image.convert("RGB"))


def load_image(path: str | Path) -> tuple[np.ndarray, str]:
    """`read_image` and a remark."""
    return read_image(path), ""


def is_image(path: Path) -> bool:
    """Whether it is an image, by its ending."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_grey(path: str | Path) -> np.ndarray:
    """Decode a mask or map as stored: (H, W) uint8 grey, upright. Raises `UserError` as `read_image`.

    A palette is looked up: some public sets store inverted ones, so raw indices mean nothing.
    """
    with _opened(path) as image:
        return np.array(_upright_8_bit(image, path).convert("L"))


def read_mask(path: str | Path) -> np.ndarray:
    """A mask (H, W) uint8 in 0 … 255, vessel above 127; one stored as 0/1 is stretched to 0/255. Raises as `read_image`."""
    mask = read_grey(path)
    return mask * 255 if mask.max() == 1 else mask


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) from the header alone, as stored (before EXIF rotation). Raises `UserError` as `read_image`."""
    with _opened(path) as image:
        return image.height, image.width


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
        temporary.write_bytes(content)


def visible(folder: str | Path) -> list[Path]:
    """What is in `folder`, hidden names left out, in order of name. Raises `UserError`: it cannot be listed."""
    try:
        return sorted(path for path in user_path(folder).iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); give a folder that you may read") from None


def list_images(folder: str | Path) -> list[Path]:
    """The image files in `folder` (not below it) in natural order (2 before 10), hidden ones left out. Raises as `visible`."""
    return natural_sort(path for path in visible(folder) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
