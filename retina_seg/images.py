"""Picture files in and out: decoded within bounds, upright, as plain arrays; written whole or not at all.

Photos are RGB inside the package; only the networks, which follow the original, are fed OpenCV's BGR.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageOps

from retina_seg.utils import UserError, whole_file

PHOTO_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif", ".webp")
MAX_PIXELS = 178_000_000  # a 12,000 x 9,000 photo has 108 million; Pillow itself refuses above 178.9 million
MAX_BYTES = 2**30
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "GIF", "WEBP")
# Pillow also logs some of what it raises, and what is logged to nobody goes to standard error
logging.getLogger("PIL").addHandler(logging.NullHandler())
_STDERR = threading.Lock()  # for whoever points the process's standard error elsewhere


class _Quiet:
    """Within the block no warning is shown. `warnings.catch_warnings` for threads: all of them leave before it ends."""

    def __init__(self) -> None:
        self._lock, self._inside, self._caught = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._caught.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._caught.close()


_QUIET = _Quiet()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The decoder of `path` with its header read and its size checked; anything it raises becomes a `UserError`."""
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not path.is_file():
        raise UserError(f"{path}: is not a regular file")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; give a smaller file")
        source: Path | io.BytesIO = path
        if path.suffix.lower() == ".gz":  # STARE ships im0001.ppm.gz
            with gzip.open(path) as packed:
                data = packed.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise UserError(f"{path}: unpacks to more than {MAX_BYTES >> 20} MiB; give a smaller file")
            source = io.BytesIO(data)
        # our own bound, below, replaces Pillow's warning; its other remarks on odd files are no news to a user
        with _QUIET, Image.open(source, formats=_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(f"{path}: {width}x{height} pixels are more than {MAX_PIXELS:,}; scale the photo down")
            with _without_libtiffs_remarks() if image.format == "TIFF" else contextlib.nullcontext():
                yield image
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path}: is too large for the memory of this machine; scale the photo down") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: has more than {MAX_PIXELS:,} pixels; scale the photo down") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: is not a picture that can be read; save it as an 8-bit PNG or JPEG") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read; check its permissions") from None
    except Exception as error:  # decoders of broken bytes raise anything
        raise UserError(f"{path}: is damaged or cut short ({type(error).__name__}: {str(error)[:80]})") from None


@contextlib.contextmanager
def _without_libtiffs_remarks() -> Iterator[None]:
    """libtiff writes on standard error, past Python, what it then raises too."""
    with _STDERR, contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a process may have no standard error
            kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, 2)
            os.dup2(nowhere, 2)
            os.close(nowhere)
        yield


def _to_8_bit(image: Image.Image, path: Path, file_format: str | None) -> Image.Image:
    """16-bit grey to 8 bits by its high byte; other deep formats are refused."""
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"{path}: has 32 bits a pixel; save it as an 8-bit or 16-bit picture")
    return image


def read_photo(path: str | Path) -> np.ndarray:
    """Decode a photo: (H, W, 3) uint8 RGB, upright by its EXIF orientation.

    Grey becomes three equal channels, 16 bits become 8, transparency is laid on black, of several frames the first is
    taken.

    Raises:
        UserError: no such file, not a picture, damaged, too large, 32 bits a pixel.
    """
    path = Path(path)
    with _opened(path) as image:
        image = _to_8_bit(ImageOps.exif_transpose(image), path, image.format)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            black = Image.new("RGBA", image.size, (0, 0, 0, 255))
            image = Image.alpha_composite(black, image)
        return np.array(image.convert("RGB"))


def read_label(path: str | Path) -> np.ndarray:
    """Decode a label, mask or map: (H, W) uint8 grey as a viewer shows it.

    Palette colours are looked up before they are turned to grey: some public sets store inverted palettes, so raw
    indices mean nothing.

    Raises:
        UserError: as `read_photo`.
    """
    path = Path(path)
    with _opened(path) as image:
        return np.array(_to_8_bit(ImageOps.exif_transpose(image), path, image.format).convert("L"))


def picture_size(path: str | Path) -> tuple[int, int]:
    """(height, width) from the header alone, as stored (before EXIF turning). Raises `UserError` as `read_photo`."""
    with _opened(Path(path)) as image:
        return image.size[1], image.size[0]


def write_picture(path: str | Path, picture: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8, or (H, W) uint16, in the format of the ending of `path`: whole or not at all.

    Raises:
        UserError: the folder may not be written to, or the disk is full.
    """
    with whole_file(path) as temporary:
        if Path(path).suffix.lower() != ".png":
            iio.imwrite(temporary, picture, plugin="pillow")
            return
        # OpenCV's own choice of filter and strategy writes two to six times as fast as Pillow at its fastest, as small
        done, content = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR) if picture.ndim == 3 else picture)
        if not done:
            raise OSError("OpenCV could not encode it")
        temporary.write_bytes(content)


def list_pictures(folder: str | Path) -> list[Path]:
    """The picture files in `folder` (not below it), hidden ones left out, by name with numbers in order (2 before 10)."""
    try:
        files = [path for path in Path(folder).iterdir() if path.suffix.lower() in PHOTO_ENDINGS]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); give a folder of pictures") from None
    return sorted((path for path in files if not path.name.startswith(".") and path.is_file()), key=natural_key)


def natural_key(path: str | Path) -> tuple:
    """A sort key that counts: 2.png before 10.png."""
    pieces: list[tuple[int, int, str]] = []
    digits = ""
    for character in Path(path).name + "\0":
        if character.isascii() and character.isdigit():
            digits += character
            continue
        if digits:
            pieces.append((0, int(digits[:18]), digits))
            digits = ""
        pieces.append((1, 0, character))
    return tuple(pieces)
