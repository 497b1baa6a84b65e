"""Images in and out: every format and mode, broken and hostile files, names, and writing whole or not at all."""

import gzip
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from retina_seg import images
from retina_seg.images import IMAGE_SUFFIXES, image_size, list_images, read_grey, read_image, read_mask, write_image
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
    for read in (read_image, read_grey, *(() if sized else (image_size,))):
        with pytest.raises(UserError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".JPG"])
def test_every_suffix_round_trips_image_and_mask(tmp_path, suffix):
    image, mask = tmp_path / f"image{suffix}", tmp_path / f"mask{suffix}"
    write_image(image, gradient())
    write_image(mask, stripes())
    assert read_image(image).dtype == read_grey(mask).dtype == np.uint8
    assert read_image(image).shape == (*image_size(image), 3) == gradient().shape
    lossy = suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif")  # gif has 256 colours
    assert np.abs(read_image(image).astype(int) - gradient()).mean() <= (8 if lossy else 0)
    assert np.array_equal(read_grey(mask) > 127, stripes() > 127)
    assert lossy or np.array_equal(read_grey(mask), stripes())


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
    colours = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    write_image(tmp_path / "a.png", colours)
    assert read_grey(tmp_path / "a.png").tolist() == [[255, 0, 76, 150, 29]]  # 0.299, 0.587, 0.114 of 255


@pytest.mark.parametrize(("stored", "read"), [((0, 1), (0, 255)), ((0, 2), (0, 2)), ((0, 0), (0, 0)), ((3, 253),) * 2])
def test_a_mask_of_0_and_1_is_stretched_and_no_other(tmp_path, stored, read):
    write_image(tmp_path / "a.png", np.array([stored], np.uint8))
    assert read_mask(tmp_path / "a.png").tolist() == [list(read)]
    assert read_grey(tmp_path / "a.png").tolist() == [list(stored)]


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
    grey, colour = read_grey(tmp_path / f"a{suffix}"), read_image(tmp_path / f"a{suffix}")[..., 2]
    assert grey.tolist() == colour.tolist() == [[0, 0, 1, 127, 128, 255]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_thirty_two_bits_a_pixel_are_refused_not_guessed(tmp_path, dtype):
    Image.fromarray(np.ones((3, 4), dtype)).save(tmp_path / "a.tif")
    refused(tmp_path / "a.tif", "a.tif: has 32 bits a pixel", sized=True)


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
@pytest.mark.parametrize("palette", [(255, 0), (0, 255), (3, 253)])
def test_a_palette_is_decoded_by_colour_never_by_index(tmp_path, palette, suffix):
    index = (stripes() > 0).astype(np.uint8)
    stored = Image.fromarray(index, "P")
    stored.putpalette([value for grey in palette for value in (grey, grey, grey)])
    stored.save(tmp_path / f"a{suffix}")
    expected = np.array(palette, np.uint8)[index]
    assert np.array_equal(read_grey(tmp_path / f"a{suffix}"), expected)
    assert np.array_equal(read_image(tmp_path / f"a{suffix}")[..., 1], expected)


TURNS = [(0, False), (0, True), (2, False), (2, True), (1, True), (3, False), (3, True), (1, False)]


@pytest.mark.parametrize(("orientation", "quarter", "mirror"), [(1 + i, *turn) for i, turn in enumerate(TURNS)])
def test_an_image_is_upright_by_its_exif_orientation(tmp_path, orientation, quarter, mirror):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(gradient()[:, ::-1] if mirror else gradient(), quarter)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)
    assert read_grey(tmp_path / "a.png").shape == upright.shape[:2]
    assert image_size(tmp_path / "a.png") == (13, 22)  # as stored


def test_of_several_frames_the_first_is_taken_and_one_bit_is_black_and_white(tmp_path):
    first, second = Image.fromarray(stripes()), Image.fromarray(255 - stripes())
    for suffix in (".tif", ".gif"):
        first.save(tmp_path / f"a{suffix}", save_all=True, append_images=[second])
        assert np.array_equal(read_grey(tmp_path / f"a{suffix}"), stripes())
    for suffix in (".png", ".tif", ".bmp"):
        first.convert("1").save(tmp_path / f"a{suffix}")
        assert np.array_equal(read_grey(tmp_path / f"a{suffix}"), stripes())


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
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
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "5.png").write_bytes(b"")
    assert [path.name for path in list_images(str(tmp_path))] == ["1.tiff", "9.JPG", "10.png"]
    for path in (tmp_path / "missing", tmp_path / "10.png"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be listed"):
            list_images(path)
