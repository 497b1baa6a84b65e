"""Images in and out: every format and mode, broken and hostile files, names, and writing whole or not at all."""

import gzip
import io
import os
import shutil
import struct
import sys
import zlib

import cv2
import numpy as np
import pytest
import tifffile  # of scikit-image
from PIL import Image

from retina_seg import images
from retina_seg.images import image_size, list_images, load_image, load_mask, read_image, read_mask, write_image
from retina_seg.utils import UserError


def gradient(height=13, width=22):
    """(H, W, 3) uint8, no mirror image of itself: red rises to the right, green downwards, blue stays."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], axis=2).astype(np.uint8)


def stripes(height=16, width=32):
    """A mask whose edges lie on the blocks of 8 pixels that JPEG works in."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, 8:16] = mask[8:, 24:] = 255
    return mask


def png_header(width, height):
    """The start of a PNG file that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def refused(path, match, sized=False):
    """All readers refuse the file, naming it; a `sized` one has a sound header."""
    for read in (read_image, read_mask, *(() if sized else (image_size,))):
        with pytest.raises(UserError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


WRITTEN = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".ppm", ".pgm", ".gif", ".webp")


@pytest.mark.parametrize("suffix", [*WRITTEN, ".JPG"])
def test_every_suffix_round_trips_image_and_mask(tmp_path, suffix):
    image, mask = tmp_path / f"image{suffix}", tmp_path / f"mask{suffix}"
    write_image(image, gradient())
    write_image(mask, stripes())
    assert read_image(image).dtype == read_mask(mask).dtype == np.uint8
    assert read_image(image).shape == (*image_size(image), 3) == gradient().shape
    lossy = suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif")  # gif has 256 colours
    assert np.abs(read_image(image).astype(int) - gradient()).mean() <= (8 if lossy else 0)
    assert np.array_equal(read_mask(mask) > 127, stripes() > 127)
    assert lossy or np.array_equal(read_mask(mask), stripes())


def test_a_gzipped_image_is_unpacked_within_bounds(tmp_path, monkeypatch):
    write_image(tmp_path / "a.ppm", gradient())
    packed = tmp_path / "im0001.ppm.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.ppm").read_bytes()))
    assert np.array_equal(read_image(packed), gradient())
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    packed.write_bytes(gzip.compress(bytes(2 << 20)))
    refused(packed, ".gz: unpacks to more than 1 MiB")
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    refused(packed, ".gz: is larger than")


def test_grey_and_colour_become_one_another(tmp_path):
    grey = gradient()[..., 0]
    write_image(tmp_path / "a.png", grey)
    assert np.array_equal(read_image(tmp_path / "a.png"), np.stack([grey] * 3, axis=2))
    assert np.array_equal(read_mask(tmp_path / "a.png"), grey)


BLOCKS = np.zeros((24, 40), np.uint8)  # vessels 3 pixels wide and more, where classes are solid, and on less than half
BLOCKS[2:8, 2:38], BLOCKS[12:15, 2:20] = 1, 2
VESSEL = np.where(BLOCKS > 0, 255, 0).astype(np.uint8)
SOFT = np.minimum(cv2.blur(VESSEL, (3, 1)), 254)  # 0, 85, 170, 254
RED, LIT = (np.uint8(channel) * (BLOCKS > 0)[..., None] for channel in ((255, 0, 0), (60, 60, 60)))
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)[BLOCKS]
MASKS = {
    "0 and 1": (BLOCKS.clip(0, 1), VESSEL, "values 0, 1: all above 0 are vessel"),
    "0 and 127": (BLOCKS.clip(0, 1) * 127, VESSEL, "values 0, 127: all above 0 are vessel"),
    "classes": (BLOCKS, VESSEL, "values 0, 1, 2: all above 0 are vessel"),
    "classes with 255": (np.uint8([0, 85, 255])[BLOCKS], VESSEL, "values 0, 85, 255: all above 0 are vessel"),
    "grey edges": (SOFT, SOFT, ""),
    "3 and 253": (np.uint8([3, 253, 253])[BLOCKS], np.uint8([3, 253, 253])[BLOCKS], ""),
    "one class everywhere": (BLOCKS * 0 + 1, BLOCKS * 0 + 255, "values 1: all above 0 are vessel"),
    "16 bits of 0 and 255": (VESSEL.astype(np.uint16), VESSEL, "16 bits, scaled from 8"),
    "16 bits of 0 and 1": (BLOCKS.clip(0, 1).astype(np.uint16), VESSEL, "values 0, 1: all above 0 are vessel"),
    "one channel": (RED, VESSEL, "colours: the brightest channel counts"),
    "artery and vein": (COLOURS, VESSEL, "colours: the brightest channel counts"),
    "alpha under black": (np.dstack([RED * 0, VESSEL]), VESSEL, "in the alpha channel"),
    "alpha under white": (np.dstack([RED * 0 + 255, VESSEL]), VESSEL, "in the alpha channel"),
    "grey of 60": (LIT, VESSEL, "values 0, 60: all above 0 are vessel"),
    "dark shades": (gradient()[..., 0] // 3, gradient()[..., 0] // 3, "its brightest value is 85, vessel is above 127"),
    "black": (BLOCKS * 0, BLOCKS * 0, "all black, so its image counts as without vessels"),
}


@pytest.mark.parametrize(("stored", "expected", "said"), MASKS.values(), ids=MASKS)
def test_a_mask_is_read_as_it_is_meant_and_what_was_done_is_said(tmp_path, stored, expected, said):
    Image.fromarray(stored).save(tmp_path / "a.png")
    mask, remark = load_mask(tmp_path / "a.png")
    assert np.array_equal(mask, expected) and mask.dtype == np.uint8
    assert remark.removeprefix("16 bits, scaled from 8; ") == said


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_black(tmp_path, mode):
    pixels = np.array([[[200, 200, 200, 0], [200, 200, 200, 51], [200, 200, 200, 255]]], np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(tmp_path / "a.png")
    assert np.abs(read_image(tmp_path / "a.png")[0, :, 1].astype(int) - [0, 40, 200]).max() <= 1
    stored = Image.new("P", (2, 1))
    stored.putpalette([10, 20, 30, 200, 100, 50])
    stored.putdata([0, 1])
    stored.save(tmp_path / "a.png", transparency=1)
    assert read_image(tmp_path / "a.png").tolist() == [[[10, 20, 30], [0, 0, 0]]]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path, suffix):
    deep = np.array([[0, 255, 256, 0x7FFF, 0x8000, 65535]], np.uint16)
    write_image(tmp_path / f"a{suffix}", deep)
    with Image.open(tmp_path / f"a{suffix}") as stored:
        assert np.array_equal(np.asarray(stored), deep)  # written as sixteen bits
    grey, colour = read_mask(tmp_path / f"a{suffix}"), read_image(tmp_path / f"a{suffix}")[..., 2]
    assert grey.tolist() == colour.tolist() == [[0, 0, 1, 127, 128, 255]]


def cv2_write(path, array):
    cv2.imwrite(
        str(path), array if array.ndim == 2 else np.ascontiguousarray(array[..., [2, 1, 0, 3][: array.shape[2]]])
    )


COLOUR, GREY = gradient(40, 60) & 252, gradient(40, 60)[..., 0] & 252
WIDE = COLOUR.astype(np.uint16) * 16


@pytest.mark.parametrize("pixels", [COLOUR, GREY], ids=["colour", "grey"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".pnm", ".jp2"])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_deep_images_are_scaled_from_the_bits_in_use(tmp_path, pixels, suffix, bits):
    cv2_write(tmp_path / f"a{suffix}", pixels.astype(np.uint16) << (bits - 8))
    image, remark = load_image(tmp_path / f"a{suffix}")
    assert np.array_equal(image, pixels if pixels.ndim == 3 else np.dstack([pixels] * 3))
    assert remark == ("" if bits == 16 else f"16 bits, scaled from {bits}")


@pytest.mark.parametrize(
    ("stored", "options", "expected", "said"),
    [
        (GREY.astype(np.int16) * 16, {}, GREY, "16 bits, scaled from 12"),
        (GREY.astype(np.int16) * 16 - 500, {}, GREY, "16 bits, scaled from 12, -500 became 0"),
        (COLOUR.astype(np.uint32) << 20, {}, COLOUR, "32 bits, scaled from 28"),
        (np.float32(COLOUR / 255), {}, COLOUR, "floats, scaled from 0 to 1"),
        (np.where(GREY == 0, np.nan, GREY / 255), {}, GREY, "floats, scaled from 0 to 1"),
        (np.float32(GREY), {}, GREY, "32 bits, scaled from 8"),
        (np.float32(GREY / 126 - 1), {}, np.rint(GREY * (255 / 252)), "floats, scaled from -1 to 1"),
        ((252 - GREY) * np.uint16(16) + 63, {"photometric": "miniswhite"}, GREY, "16 bits, scaled from 12"),
        (
            np.dstack([WIDE, WIDE[..., :1] * 0 + 65535]),
            {"extrasamples": ["unassalpha"]},
            COLOUR,
            "16 bits, scaled from 12",
        ),
        (
            COLOUR.astype(np.uint16) * 16,
            {"extratags": [(274, "H", 1, 6, True)]},
            np.rot90(COLOUR, 3),
            "16 bits, scaled from 12",
        ),
        (WIDE, {"bigtiff": True}, COLOUR, "16 bits, scaled from 12"),
    ],
)
def test_a_tiff_of_any_dtype_is_scaled(tmp_path, stored, options, expected, said):
    colours = {"photometric": "rgb"} if stored.ndim == 3 else {}
    tifffile.imwrite(tmp_path / "small.tif", stored[:20, :20], **colours, **options)
    shutil.copy(tmp_path / "small.tif", tmp_path / "a.tif")
    tifffile.imwrite(
        tmp_path / "a.tif", stored, append=True, **colours, **{k: options[k] for k in options if k != "bigtiff"}
    )
    image, remark = load_image(tmp_path / "a.tif")
    assert np.array_equal(image, expected if expected.ndim == 3 else np.dstack([expected] * 3))
    assert remark == f"page 2 of 2; {said}" and sorted(image_size(tmp_path / "a.tif")) == [40, 60]


def dicom(path, array, how, bits, frames=1, jpeg=None):
    """A DICOM file of an array of `frames` frames, or of these bytes of JPEG."""
    pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom")
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit if jpeg else pydicom.uid.ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, pydicom.uid.generate_uid()
    data.Rows, data.Columns, data.SamplesPerPixel = *(shape := array.shape[frames > 1 :])[:2], (*shape, 1)[2]
    data.PhotometricInterpretation, data.PlanarConfiguration, data.NumberOfFrames = how, 0, frames
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * array.dtype.itemsize, bits, bits - 1
    data.PixelRepresentation = int(array.dtype.kind == "i")
    data.PixelData = pydicom.encaps.encapsulate(jpeg) if jpeg else array.tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)


DEEP = GREY.astype(np.uint16)


@pytest.mark.parametrize(
    ("array", "how", "bits", "expected", "said"),
    [
        (GREY, "MONOCHROME2", 8, GREY, ""),
        (255 - GREY, "MONOCHROME1", 8, GREY, ""),
        (DEEP * 4, "MONOCHROME2", 12, GREY // 4, "16 bits, scaled from 12"),  # dark, as its bits say
        (DEEP * 16, "MONOCHROME2", 16, GREY, "16 bits, scaled from 12"),
        (4095 - DEEP * 16, "MONOCHROME1", 12, GREY, "16 bits, scaled from 12"),
        (DEEP.astype(np.int16) * 16 - 99, "MONOCHROME2", 16, GREY, "16 bits, scaled from 12, -99 became 0"),
        (COLOUR, "RGB", 8, COLOUR, ""),
        (COLOUR.astype(np.uint16) * 256, "RGB", 16, COLOUR, ""),
        (np.stack([COLOUR, 255 - COLOUR]), "RGB", 8, COLOUR, "page 1 of 2"),
    ],
)
def test_dicom(tmp_path, array, how, bits, expected, said):
    path = tmp_path / "no_ending"
    dicom(path, array, how, bits, frames=2 if array.ndim == 4 else 1)
    image, remark = load_image(path)
    assert np.array_equal(image, expected if expected.ndim == 3 else np.dstack([expected] * 3)) and remark == said
    assert image_size(path) == (40, 60) and list_images(tmp_path) == [path]


def test_dicom_of_jpeg_and_without_its_package(tmp_path, monkeypatch):
    frames = [io.BytesIO(), io.BytesIO()]
    for frame, pixels in zip(frames, (COLOUR, 255 - COLOUR), strict=True):
        Image.fromarray(pixels).save(frame, "JPEG", quality=100, subsampling=0)
    jpeg = [frame.getvalue() for frame in frames]
    dicom(tmp_path / "a.dcm", np.stack([COLOUR] * 2), "YBR_FULL", 8, 2, jpeg)
    assert np.abs(read_image(tmp_path / "a.dcm").astype(int) - COLOUR).max() <= 4
    monkeypatch.setitem(sys.modules, "pydicom", None)
    refused(tmp_path / "a.dcm", r'pip install "retina_seg\[formats\]"')


def test_heic(tmp_path, monkeypatch):
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif")
    file = heif.HeifFile()
    for pixels in (COLOUR[:32, :32], COLOUR):
        file.add_from_pillow(Image.fromarray(pixels))
    file.save(tmp_path / "a.heic", quality=-1, chroma=444)
    image, remark = load_image(tmp_path / "a.heic")
    assert np.abs(image.astype(int) - COLOUR).max() <= 8 and remark == "page 2 of 2"
    assert image_size(tmp_path / "a.heic") == (40, 60)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    refused(tmp_path / "a.heic", r'pip install "retina_seg\[formats\]"')


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
@pytest.mark.parametrize("palette", [(255, 0), (0, 255), (3, 253)])
def test_a_palette_is_decoded_by_colour_never_by_index(tmp_path, palette, suffix):
    index = (stripes() > 0).astype(np.uint8)
    stored = Image.fromarray(index, "P")
    stored.putpalette([value for grey in palette for value in (grey, grey, grey)])
    stored.save(tmp_path / f"a{suffix}")
    expected = np.array(palette, np.uint8)[index]
    assert np.array_equal(read_mask(tmp_path / f"a{suffix}"), expected)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}")[..., 1], expected)


TURNS = [(0, False), (0, True), (2, False), (2, True), (1, True), (3, False), (3, True), (1, False)]


@pytest.mark.parametrize(("orientation", "quarter", "mirror"), [(1 + i, *turn) for i, turn in enumerate(TURNS)])
def test_an_image_is_upright_by_its_exif_orientation(tmp_path, orientation, quarter, mirror):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(gradient()[:, ::-1] if mirror else gradient(), quarter)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)
    assert read_mask(tmp_path / "a.png").shape == upright.shape[:2]
    assert image_size(tmp_path / "a.png") == (13, 22)  # as stored


def test_of_several_frames_the_first_of_the_largest_is_taken_and_one_bit_is_black_and_white(tmp_path):
    small, first, second = (Image.fromarray(a) for a in (stripes(8, 16), stripes(), 255 - stripes()))
    for suffix, frames, number in (
        (".tif", (small, first, second), 2),
        (".gif", (first, second), 1),
        ("", (small, first), 2),
    ):
        kind = {"": "MPO"}.get(suffix, suffix[1:].replace("tif", "tiff"))
        frames[0].save(tmp_path / f"a{suffix}", kind, save_all=True, append_images=frames[1:])
        mask, remark = load_mask(tmp_path / f"a{suffix}")
        assert np.array_equal(mask > 127, stripes() > 127) and remark == f"page {number} of {len(frames)}"
        assert image_size(tmp_path / f"a{suffix}") == (16, 32)
    for suffix in (".png", ".tif", ".bmp"):
        first.convert("1").save(tmp_path / f"a{suffix}")
        assert np.array_equal(read_mask(tmp_path / f"a{suffix}"), stripes())


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_file_cut_short_is_refused_by_name(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    write_image(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(path, "cut", sized=True)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # a program


@pytest.mark.parametrize("content", [b"", b"text" * 20, b"%PDF-1.4\n", b"\x89PNG\r\n\x1a\n", POSTSCRIPT])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.ppm.gz"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_no_image_is_refused(tmp_path, name, content, packed):
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    refused(tmp_path / name, "not an image|damaged")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a,b\n1,2\n", "not an image but a text file; give an image file"),
        (b"<!DOCTYPE html><html>", "not an image but an HTML page.*download it again"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "not an image but a video; save the frame"),
        (b"\x93NUMPY\1\0", "not an image but a NumPy array; .*write_image"),
        (bytes(range(200)), "give a PNG, JPEG, TIFF or DICOM file"),
    ],
)
def test_what_a_file_is_instead_is_said_and_its_ending_alone_makes_it_an_image(tmp_path, content, said):
    for name in ("a.png", "a"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, said)
    assert list_images(tmp_path) == [tmp_path / "a.png"]


def test_a_folder_a_missing_file_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "not a regular file")
    refused(tmp_path / "missing.png", "no such file")
    os.mkfifo(tmp_path / "pipe.png")  # whoever opened it would wait for ever
    refused(tmp_path / "pipe.png", "not a regular file")


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (13_360, 13_360), (2**31 - 1, 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_unread(tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png_header(width, height))
    refused(tmp_path / "huge.png", "pixels")
    (tmp_path / "large.png").write_bytes(png_header(12_000, 9_000))
    assert image_size(tmp_path / "large.png") == (9_000, 12_000)  # within the bound


@pytest.mark.parametrize("name", ["with space.png", "ünï-码.png", "two\nlines.png", "-dash.png", "per%cent{}.a.PNG"])
def test_odd_names_are_written_read_and_listed(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a bare name may begin with a dash
    write_image(name, gradient())
    assert os.listdir() == [name]
    assert np.array_equal(read_image(name), gradient())
    assert [path.name for path in list_images(".")] == [name]


@pytest.mark.parametrize("name, writer", [("a.png", (images.Path, "write_bytes")), ("a.jpg", (images.iio, "imwrite"))])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, error, name, writer):
    def fail(path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    path = tmp_path / name
    path.write_bytes(b"old")
    monkeypatch.setattr(*writer, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        write_image(path, gradient())
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [(name, b"old")]
    monkeypatch.undo()
    write_image(path, gradient())
    assert os.listdir(tmp_path) == [name] and read_image(path).shape == gradient().shape


def test_where_an_image_cannot_be_written_the_error_names_it(tmp_path):
    with pytest.raises(UserError, match="missing/a.png: cannot be written"):
        write_image(tmp_path / "missing" / "a.png", gradient())
    assert not any(tmp_path.iterdir())


def test_list_images_leaves_out_hidden_files_folders_and_other_files(tmp_path):
    for name in ("10.png", "9.JPG", "1.tiff", ".hidden.png", "._1.tiff", "notes.txt", "table.csv", "png", "a.ppm.gz"):
        (tmp_path / name).write_bytes(b"")
    Image.fromarray(gradient()).save(tmp_path / "11", "JPEG")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "5.png").write_bytes(b"")
    assert [path.name for path in list_images(str(tmp_path))] == ["1.tiff", "9.JPG", "10.png", "11"]
    for path in (tmp_path / "missing", tmp_path / "10.png"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be listed"):
            list_images(path)
