"""The decoders of image files: each gives one frame, upright, with 8 bits a channel. `images` bounds and names what fails.

Pillow decodes what has 8 bits, OpenCV what has more, pillow-heif HEIC and pydicom DICOM where they are installed.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from retina_seg.utils import UserError

MAX_FRAMES = 1_000  # the frames after them are not looked at
# none that runs another program (EPS, WMF) or is not known by its first bytes (TGA)
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "PPM", "GIF", "WEBP", "JPEG2000", "AVIF", "PCX", "QOI")
_NEEDS = 'is {}, which needs another package: pip install "retina_seg[formats]"'
# (height, width) as stored, which frame it is, and what decodes it: to the image, and what was done to its values
Frame = tuple[tuple[int, int], str, Callable[[], tuple[Image.Image, str]]]


def file_format(start: bytes) -> str:
    """What the first 160 bytes of a file tell: "dicom", "heic", "video", "tiff" or "other"."""
    brands = start[8:40]
    if start[128:132] == b"DICM":
        return "dicom"
    if start[4:8] == b"ftyp" and b"avif" not in brands and b"avis" not in brands:
        return "heic" if any(brand in brands for brand in (b"hei", b"hevc", b"mif1", b"msf1")) else "video"
    return "tiff" if start[:4] in (b"II*\0", b"MM\0*", b"II+\0") else "other"


def open_frame(file: BinaryIO) -> Frame:
    """The largest frame in a file (the first of equals) by its header. Raises whatever decoders raise, and `UserError`."""
    kind = file_format(file.read(160))
    file.seek(0)
    return {"dicom": _dicom, "tiff": _tiff, "heic": _heic}.get(kind, _pillow)(file)


def _page(number: int, count: int) -> str:
    return f"page {number + 1} of {count if count < MAX_FRAMES else 'many'}" if count > 1 else ""


def _largest(sizes: Sequence[tuple[float, float]]) -> int:
    return max(range(len(sizes)), key=lambda number: sizes[number][0] * sizes[number][1])


def _heic(file: BinaryIO) -> Frame:
    try:
        from pillow_heif import HeifImageFile  # not registered: which formats Pillow reads is the caller's choice
    except ImportError:
        raise UserError(_NEEDS.format("HEIC")) from None
    return _pillow(file, HeifImageFile(file))


def _pillow(file: BinaryIO, image: Any = None) -> Frame:
    image = image or Image.open(file, formats=FORMATS)
    count, best = 1, 0
    with contextlib.suppress(Exception):  # damage after the first frame
        count = getattr(image, "n_frames", 1)
    if count > 1 and image.format in ("MPO", "HEIF"):  # in an animation all have one size
        sizes = []
        for number in range(min(count, MAX_FRAMES)):
            image.seek(number)
            sizes.append(image.size)
        image.seek(best := _largest(sizes))

    def decode() -> tuple[Image.Image, str]:
        file.seek(0)
        bits = {"PNG": file.read(25)[-1], "JPEG2000": 16, "PPM": 16}.get(image.format, 0)  # of the last two at most
        file.seek(0)
        deep, said = _opencv(file.read(), bits) if bits > 8 else (None, "")
        if deep is None:
            upright = ImageOps.exif_transpose(image)
            upright.format = image.format
            return as_8_bits(upright)
        deep.getexif().update(image.getexif())
        return ImageOps.exif_transpose(deep), said

    return image.size[::-1], _page(best, count), decode


def _tiff(file: BinaryIO) -> Frame:
    head = file.read(8)
    head += file.read(8) if head[2] == 43 else b""  # BigTIFF
    offset = TiffImagePlugin.ImageFileDirectory_v2(head).next
    pages: dict[int, tuple[int, int, Any]] = {}
    with contextlib.suppress(Exception):  # damage after the first page
        while offset and offset not in pages and len(pages) < MAX_FRAMES:
            file.seek(offset)
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            tags.load(file)
            pages[offset] = (int(tags[257]), int(tags[256]), tags)
            offset = tags.next
    if not pages:
        raise Image.UnidentifiedImageError
    # of pages of one size, one in colour: others may be masks
    best = _largest([(2 * page[0], page[1] + (np.size(page[2].get(258, 1)) > 2) / 2) for page in pages.values()])
    offset, (height, width, tags) = list(pages.items())[best]
    if tags.get(254, 0) & 1:  # it calls itself the reduced version of another image
        raise UserError("holds only a preview, as a camera's raw file does; export it as PNG or TIFF")
    samples, photometric = np.atleast_1d(tags.get(258, 1)), tags.get(262)
    if photometric in (0, 1) and len(samples) in (3, 4):
        raise UserError(f"calls its {len(samples)} samples a pixel grey; save it as RGB")
    bits, unsigned = int(samples.max()), np.all(np.atleast_1d(tags.get(339, 1)) == 1)

    def decode() -> tuple[Image.Image, str]:
        file.seek(0)
        content = bytearray(file.read())
        place = slice(4, 8) if len(head) == 8 else slice(8, 16)  # of the first page's offset
        content[place] = offset.to_bytes(place.stop - place.start, "little" if head[:2] == b"II" else "big")
        if (bits > 8 or not unsigned) and photometric in (0, 1, 2):  # grey or RGB
            if tags.get(284) == 2 and len(samples) > 1:
                raise UserError("keeps each colour in a plane of its own; save it with interleaved colours")
            image, said = _opencv(content, bits, 8 < bits < 16, tags.get(338, (0,))[0] in (1, 2))
            if image:
                return ImageOps.invert(image) if photometric == 0 else image, said
        return as_8_bits(ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=("TIFF",))))

    return (height, width), _page(best, len(pages)), decode


def _opencv(content: bytes | bytearray, bits: int, packed: bool = False, alpha: bool = True):
    """The first frame of more than 8 bits, scaled; None: OpenCV does not read it. Of these files TIFF alone is upright."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it would print is raised
    try:
        deep = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if deep is None or deep.dtype == np.uint8:
        return None, ""
    deep = np.right_shift(deep, 16 - bits) if packed else deep  # packed samples come as the high bits of 16
    colours, said = scale_to_8_bits(deep if deep.ndim == 2 else deep[:, :, 2::-1], bits)
    image = Image.fromarray(np.ascontiguousarray(colours))
    if deep.ndim == 3 and deep.shape[2] == 4 and alpha:
        image.putalpha(Image.fromarray(scale_to_8_bits(deep[:, :, 3])[0]))
    return image, said


def as_8_bits(image: Image.Image) -> tuple[Image.Image, str]:
    """An image of one deep channel scaled (`scale_to_8_bits`), any other as it is; and what was done."""
    if image.mode[0] not in "IF":
        return image, ""
    array, said = scale_to_8_bits(np.asarray(image))
    return Image.fromarray(array), said


def scale_to_8_bits(deep: np.ndarray, bits: int = 0) -> tuple[np.ndarray, str]:
    """An array of any dtype as uint8, and what was done to its values, "" for a plain high byte.

    Integers keep the high 8 of the `bits` in use, if they are stated and fewer than the dtype's; else of as many as the
    maximum has, 8 at least. Floats below 2 count as [0, 1] (resampling overshoots), others as integers. Of values below 0
    the minimum becomes 0. NaN and infinity are 0.
    """
    width, real = 8 * deep.dtype.itemsize, deep.dtype.kind == "f"
    deep = np.where(np.isfinite(deep), deep, 0) if real else deep
    low, high = min(0, deep.min()), deep.max()
    if real and (low < 0 or high < 2):
        top = high - low if low < 0 else max(1, high)
        return np.rint((deep - low) * (255 / top)).astype(np.uint8), f"floats, scaled from {low:g} to {low + top:g}"
    if low < 0:
        deep, high, bits = deep.astype(np.int64) - int(low), int(high) - int(low), 0
    used = bits if bits < width and int(high) < 1 << bits else max(8, int(high).bit_length())
    array = (np.rint(deep * 2.0 ** (8 - used)).clip(0, 255) if real else deep >> (used - 8)).astype(np.uint8)
    raised = f", {low} became 0" if low < 0 else ""
    return array, f"{width} bits, scaled from {used}{raised}" if used < width or raised else ""


def _dicom(file: BinaryIO) -> Frame:
    try:
        import pydicom
        from pydicom.pixels import apply_color_lut, pixel_array
    except ImportError:
        raise UserError(_NEEDS.format("DICOM")) from None
    header = pydicom.dcmread(file, stop_before_pixels=True)
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        raise UserError("is a DICOM file without an image; give one that holds a photo")

    def decode() -> tuple[Image.Image, str]:
        file.seek(0)
        data = pydicom.dcmread(file)
        how, bits = data.PhotometricInterpretation, data.BitsStored
        try:
            array = pixel_array(data, index=0)
        except RuntimeError as error:
            if "missing dependencies" not in str(error):
                raise
            way = data.file_meta.TransferSyntaxUID.name
            raise UserError(f"is compressed by {way}: pip install python-gdcm, or save it as PNG") from None
        if how == "PALETTE COLOR":
            array, bits = apply_color_lut(array, data), data.RedPaletteColorLookupTableDescriptor[2]
        array, said = scale_to_8_bits(array, bits)
        return Image.fromarray(255 - array if how == "MONOCHROME1" else array), said

    return (header.Rows, header.Columns), _page(0, int(header.get("NumberOfFrames") or 1)), decode
