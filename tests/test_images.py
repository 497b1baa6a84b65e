"""Images in and out: every format and mode, broken and hostile files, names, and writing whole or not at all."""

import gzip
import sys

import cv2
import numpy as np
import pytest
import tifffile  # of scikit-image
from conftest import encoded, png
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


def refused(path, match):
    """All readers refuse the file, naming it."""
    for read in (read_image, read_mask, image_size):
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


BLOCKS = np.zeros((24, 40), np.uint8)  # vessels 3 pixels wide and more, where classes are solid, and on less than half
BLOCKS[2:8, 2:38], BLOCKS[12:15, 2:20] = 1, 2
VESSEL = np.where(BLOCKS > 0, 255, 0).astype(np.uint8)
SOFT = np.minimum(cv2.blur(VESSEL, (3, 1)), 254)  # 0, 85, 170, 254
LIT = np.dstack([BLOCKS.clip(0, 1) * np.uint8(60)] * 3)
COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255)], np.uint8)[BLOCKS]
THIN = np.where(cv2.erode(VESSEL, np.ones((3, 3))) < VESSEL, 100, VESSEL).astype(np.uint8)  # the rims are a class
ONE_HOT = np.eye(3, dtype=np.uint8)[:, [2, 0, 1]][BLOCKS] * (BLOCKS > 0)[..., None]
MASKS = {
    "0 and 1": (BLOCKS.clip(0, 1), VESSEL, "values 0, 1: all above 0 are vessel"),
    "classes": (BLOCKS, VESSEL, "values 0, 1, 2: all above 0 are vessel"),
    "classes with 255": (np.uint8([0, 85, 255])[BLOCKS], VESSEL, "values 0, 85, 255: all above 0 are vessel"),
    "grey edges": (SOFT, SOFT, ""),
    "3 and 253": (np.uint8([3, 253, 253])[BLOCKS], np.uint8([3, 253, 253])[BLOCKS], ""),
    "one class everywhere": (BLOCKS * 0 + 1, BLOCKS * 0 + 255, "values 1: all above 0 are vessel"),
    "16 bits of 0 and 255": (VESSEL.astype(np.uint16), VESSEL, "16 bits, scaled from 8"),
    "16 bits of 0 and 1": (BLOCKS.clip(0, 1).astype(np.uint16), VESSEL, "values 0, 1: all above 0 are vessel"),
    "artery and vein": (COLOURS, VESSEL, "colours: the brightest channel counts"),
    "alpha under black": (np.dstack([COLOURS * 0, VESSEL]), VESSEL, "in the alpha channel"),
    "alpha under white": (np.dstack([COLOURS * 0 + 255, VESSEL]), VESSEL, "in the alpha channel"),
    "a grey of 60 in colour": (LIT, VESSEL, "values 0, 60: all above 0 are vessel"),
    "dark shades": (gradient()[..., 0] // 3, gradient()[..., 0] // 3, "its brightest value is 85, vessel is above 127"),
    "a thin class of three": (THIN, VESSEL, "values 0, 100, 255: all above 0 are vessel"),
    "one-hot": (ONE_HOT, VESSEL, "colours: the brightest channel counts; values 0, 1: all above 0 are vessel"),
    "black": (BLOCKS * 0, BLOCKS * 0, "all black, so its image counts as without vessels"),
}


@pytest.mark.parametrize(("stored", "expected", "said"), MASKS.values(), ids=MASKS)
def test_a_mask_is_read_as_it_is_meant_and_what_was_done_is_said(tmp_path, stored, expected, said):
    Image.fromarray(stored).save(tmp_path / "a.png")
    mask, remark = load_mask(tmp_path / "a.png")
    assert np.array_equal(mask, expected) and mask.dtype == np.uint8
    assert remark.removeprefix("16 bits, scaled from 8; ") == said


def test_a_dim_mask_in_jpeg_keeps_its_vessels_and_one_below_the_noise_is_refused(tmp_path):
    large = np.kron(VESSEL > 0, np.ones((5, 5), bool))
    for white in (100, 127):
        Image.fromarray(large * np.uint8(white)).save(tmp_path / "a.jpg", quality=75)
        mask, remark = load_mask(tmp_path / "a.jpg")
        assert np.mean((mask > 127) == large) > 0.99 and remark.startswith("values up to 1")
    Image.fromarray(VESSEL // 255).save(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="a.jpg: has no value above 1, where JPEG has noise"):
        load_mask(tmp_path / "a.jpg")


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


COLOUR, GREY = gradient(40, 60) & 252, gradient(40, 60)[..., 0] & 252
WIDE, DEEP = (array.astype(np.uint16) * 16 + 15 for array in (COLOUR, GREY))  # 12 bits in 16, the lowest 4 to be cut
CLEAR = np.dstack([WIDE, WIDE[..., :1] * 0 + 65535])
SIDEWAYS = {"extratags": [(274, "H", 1, 6, True)]}
HALF = 255 / 252  # the maximum of GREY becomes 255


def coded(array, suffix):
    """Writes a file in the format of this ending, by OpenCV."""
    array = array if array.ndim == 2 else np.ascontiguousarray(array[..., ::-1])
    return lambda path: path.write_bytes(cv2.imencode(suffix, array)[1])


def tiff(array, **options):
    """Writes a TIFF file whose second page is `array`, its first a part of it."""

    def write(path):
        options.update({"photometric": "rgb"} if array.ndim == 3 else {})
        with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
            file.write(array[:20, :20], **options)
            file.write(array, **options)

    return write


def dicom(array, how, bits, jpeg=None):
    """Writes a DICOM file of an array, of several frames where it has four axes, or of these bytes of JPEG."""

    def write(path):
        pydicom = pytest.importorskip("pydicom", reason="DICOM needs pydicom")
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        data.set_pixel_data(array, how, bits)
        if jpeg:
            data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
            data.NumberOfFrames, data.PixelData = len(jpeg), pydicom.encaps.encapsulate(jpeg)
        pydicom.dcmwrite(path, data, enforce_file_format=True)

    return write


def heic(*frames):
    def write(path):
        file = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif").HeifFile()
        for pixels in frames:
            file.add_from_pillow(Image.fromarray(pixels))
        file.save(path, format="HEIF", quality=-1, chroma=444)

    return write


JPEGS = [encoded(a, "JPEG", quality=100, subsampling=0) for a in (COLOUR, 255 - COLOUR)]
FROM_12, SECOND = "16 bits, scaled from 12", "page 2 of 2; "
PHOTOS = [
    *((coded(WIDE, ending), COLOUR, FROM_12) for ending in (".png", ".tif", ".pnm", ".jp2")),
    *((coded(DEEP, ending), GREY, FROM_12) for ending in (".png", ".tif", ".pnm", ".jp2")),
    (coded(WIDE * 16, ".png"), COLOUR, ""),
    (coded(DEEP * 16, ".jp2"), GREY, ""),
    (coded(DEEP >> 2, ".png"), GREY, "16 bits, scaled from 10"),
    (tiff(DEEP.astype(np.int16) - 500), (DEEP - DEEP.min()) >> 4, SECOND + FROM_12 + ", -485 became 0"),
    (tiff(WIDE.astype(np.uint32) << 16), COLOUR, SECOND + "32 bits, scaled from 28"),
    (tiff(np.where(GREY == 0, np.nan, GREY / 255)), GREY, SECOND + "floats, scaled from 0 to 1"),
    (tiff(np.float32(COLOUR)), COLOUR, SECOND + "32 bits, scaled from 8"),
    (tiff(np.float32(GREY / 126 - 1)), np.rint(GREY * HALF), SECOND + "floats, scaled from -1 to 1"),
    (tiff(4095 - DEEP, photometric="miniswhite"), GREY, SECOND + FROM_12),
    (tiff(CLEAR, extrasamples=["unassalpha"], bigtiff=True), COLOUR, SECOND + FROM_12),
    (tiff(WIDE, **SIDEWAYS), np.rot90(COLOUR, 3), SECOND + FROM_12),
    (dicom(255 - GREY, "MONOCHROME1", 8), GREY, ""),
    (dicom(DEEP // 4, "MONOCHROME2", 12), GREY // 4, FROM_12),  # dark, as its bits say
    (dicom(DEEP, "MONOCHROME2", 16), GREY, FROM_12),
    (dicom(np.stack([COLOUR, 255 - COLOUR]), "RGB", 8), COLOUR, "page 1 of 2"),
    (dicom(COLOUR, "YBR_FULL", 8, JPEGS), COLOUR, "page 1 of 2"),
    (heic(COLOUR, COLOUR[:32, :32]), COLOUR, "page 1 of 2"),
]


@pytest.mark.parametrize(("write", "expected", "said"), PHOTOS)
def test_what_is_deep_or_of_another_format_is_read_right_whatever_its_ending(tmp_path, write, expected, said):
    write(tmp_path / "a")
    image, remark = load_image(tmp_path / "a")
    expected = (expected if expected.ndim == 3 else np.dstack([expected] * 3)).astype(int)
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= (8 if write in [row[0] for row in PHOTOS[-2:]] else 0)  # the lossy ones
    assert remark == said and sorted(image_size(tmp_path / "a")) == [40, 60]
    assert list_images(tmp_path) == [tmp_path / "a"]


@pytest.mark.parametrize(
    ("write", "package"), [(dicom(GREY, "MONOCHROME2", 8), "pydicom"), (heic(GREY), "pillow_heif")]
)
def test_a_format_whose_package_is_missing_says_what_to_install(tmp_path, write, package, monkeypatch):
    write(tmp_path / "a")
    monkeypatch.setitem(sys.modules, package, None)
    refused(tmp_path / "a", r'pip install "retina_seg\[formats\]"')


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
def test_a_palette_is_decoded_by_colour_never_by_index(tmp_path, suffix):
    index = (stripes() > 0).astype(np.uint8)
    for palette in ((255, 0), (3, 253)):
        stored = Image.fromarray(index, "P")
        stored.putpalette([value for grey in palette for value in (grey, grey, grey)])
        stored.save(tmp_path / f"a{suffix}")
        assert np.array_equal(read_mask(tmp_path / f"a{suffix}"), np.array(palette, np.uint8)[index])


TURNS = [(0, False), (0, True), (2, False), (2, True), (1, True), (3, False), (3, True), (1, False)]


def test_an_image_is_upright_by_its_exif_orientation(tmp_path):
    exif, path = Image.Exif(), tmp_path / "a.png"
    for exif[0x0112], (quarter, mirror) in enumerate(TURNS, 1):
        Image.fromarray(gradient()).save(path, exif=exif)
        upright = np.rot90(gradient()[:, ::-1] if mirror else gradient(), quarter)
        assert np.array_equal(read_image(path), upright), exif
        assert read_mask(path).shape == upright.shape[:2] and image_size(path) == (13, 22)  # as stored


def test_of_several_frames_the_first_of_the_largest_is_taken_and_one_bit_is_black_and_white(tmp_path):
    small, first, second = (Image.fromarray(a) for a in (stripes(8, 16), stripes(), 255 - stripes()))
    for name, kind, frames, number in (
        ("a.tif", "TIFF", (small, first, second), 2),
        ("a.gif", "GIF", (first, second), 1),
        ("a", "MPO", (first, small), 1),
    ):
        frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:])
        mask, remark = load_mask(tmp_path / name)
        assert np.array_equal(mask > 127, stripes() > 127) and remark == f"page {number} of {len(frames)}"
        assert image_size(tmp_path / name) == (16, 32)
    for suffix in (".png", ".tif", ".bmp"):
        first.convert("1").save(tmp_path / f"a{suffix}")
        assert np.array_equal(read_mask(tmp_path / f"a{suffix}"), stripes())


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # a program
OTHERS = [
    (b"", "an empty file"),
    (b"a,b\n1,2\n", "a text file"),
    (POSTSCRIPT, "a text file"),
    (b"<!DOCTYPE html><html>", "an HTML page"),
    (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
    (bytes(range(200)), "give a PNG, JPEG, TIFF or DICOM file"),
    (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
]


@pytest.mark.parametrize(("content", "said"), OTHERS)
def test_what_a_file_is_instead_is_said_and_its_ending_alone_makes_it_an_image(tmp_path, content, said):
    for name in ("a.png", "a"):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, said)
    for packed in (content, gzip.compress(content)):
        (tmp_path / "a.ppm.gz").write_bytes(packed)
        refused(tmp_path / "a.ppm.gz", "not an image|damaged")
    assert list_images(tmp_path) == [tmp_path / "a.png"]


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (13_360, 13_360), (2**31 - 1, 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_unread(tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png(width, height))
    refused(tmp_path / "huge.png", "pixels")
    (tmp_path / "large.png").write_bytes(png(12_000, 9_000))
    assert image_size(tmp_path / "large.png") == (9_000, 12_000)  # within the bound


def test_list_images_leaves_out_hidden_files_folders_and_other_files(tmp_path):
    for name in ("10.png", "9.JPG", "1.tiff", ".hidden.png", "notes.txt", "table.csv", "png", "a.ppm.gz"):
        (tmp_path / name).write_bytes(b"")
    Image.fromarray(gradient()).save(tmp_path / "11", "JPEG")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(str(tmp_path))] == ["1.tiff", "9.JPG", "10.png", "11"]
    refused(tmp_path / "folder.png", "not a regular file")
    refused(tmp_path / "missing.png", "no such file")
    for path in (tmp_path / "missing", tmp_path / "10.png"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be listed"):
            list_images(path)
