"""Pictures in and out: every format and mode, broken and hostile files, names, and writing whole or not at all."""

import gzip
import os
import struct
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from retina_seg import images
from retina_seg.images import (
    PHOTO_ENDINGS,
    list_pictures,
    natural_key,
    picture_size,
    read_label,
    read_photo,
    write_picture,
)
from retina_seg.utils import UserError

LOSSY = (".jpg", ".jpeg", ".webp", ".gif")  # gif has 256 colours
ODD_NAMES = ["with space.png", "ünï-码.png", "two\nlines.png", "-dash.png", "per%cent{}.png", "a.b.c.PNG"]


def gradient(height=13, width=22):
    """A photo that is no mirror image of itself: red rises to the right, green downwards, blue stays."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], axis=2).astype(np.uint8)


def stripes(height=16, width=32):
    """A label whose edges lie on the blocks of 8 pixels that JPEG works in."""
    label = np.zeros((height, width), np.uint8)
    label[:, 8:16] = 255
    label[8:, 24:] = 255
    return label


def png_header(width, height):
    """The start of a PNG file that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


# -------------------------------------------------------------------------------------------------------- formats, modes


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("ending", PHOTO_ENDINGS)
def test_every_ending_round_trips_photo_and_label(tmp_path, ending, upper):
    photo, label = gradient(), stripes()
    path, label_path = tmp_path / f"photo{ending.upper() if upper else ending}", tmp_path / f"label{ending}"
    write_picture(path, photo)
    write_picture(label_path, label)
    found, found_label = read_photo(path), read_label(label_path)
    assert (found.shape, found.dtype) == (photo.shape, np.uint8)
    assert (found_label.shape, found_label.dtype) == (label.shape, np.uint8)
    assert picture_size(path) == photo.shape[:2]
    if ending in LOSSY:
        assert np.abs(found.astype(int) - photo).mean() < 8
        assert np.array_equal(found_label > 127, label > 127)
    else:
        assert np.array_equal(found, photo)
        assert np.array_equal(found_label, label)


@pytest.mark.parametrize("ending", [".ppm", ".png"])
def test_a_gzipped_picture_is_unpacked(tmp_path, ending):
    write_picture(tmp_path / f"a{ending}", gradient())
    packed = tmp_path / f"im0001{ending}.gz"
    packed.write_bytes(gzip.compress((tmp_path / f"a{ending}").read_bytes()))
    assert np.array_equal(read_photo(packed), gradient())


def test_a_gzip_that_unpacks_beyond_the_bound_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 1 << 20)
    path = tmp_path / "bomb.ppm.gz"
    path.write_bytes(gzip.compress(bytes(2 << 20)))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(UserError, match="bomb.ppm.gz: unpacks to more than 1 MiB"):
        read_photo(path)


def test_a_file_beyond_the_bound_is_refused(tmp_path, monkeypatch):
    write_picture(tmp_path / "a.bmp", gradient())
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="a.bmp: is larger than"):
        read_photo(tmp_path / "a.bmp")


def test_grey_becomes_three_equal_channels(tmp_path):
    grey = gradient()[..., 0]
    write_picture(tmp_path / "a.png", grey)
    assert np.array_equal(read_photo(tmp_path / "a.png"), np.stack([grey] * 3, axis=2))


def test_a_colour_label_is_read_as_a_viewer_greys_it(tmp_path):
    colours = np.array([[[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)
    write_picture(tmp_path / "a.png", colours)
    assert read_label(tmp_path / "a.png").tolist() == [[255, 0, 76, 150, 29]]  # 0.299, 0.587, 0.114 of 255


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_black(tmp_path, mode):
    pixels = np.array([[[200, 200, 200, 0], [200, 200, 200, 51], [200, 200, 200, 255]]], np.uint8)
    Image.fromarray(pixels, "RGBA").convert(mode).save(tmp_path / "a.png")
    assert np.abs(read_photo(tmp_path / "a.png")[0, :, 1].astype(int) - [0, 40, 200]).max() <= 1


def test_a_transparent_palette_colour_is_laid_on_black(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.png", transparency=1)
    assert read_photo(tmp_path / "a.png").tolist() == [[[10, 20, 30], [0, 0, 0]]]


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bit_grey_keeps_its_high_byte(tmp_path, ending):
    deep = np.array([[0, 255, 256, 0x7FFF, 0x8000, 65535]], np.uint16)
    write_picture(tmp_path / f"a{ending}", deep)
    with Image.open(tmp_path / f"a{ending}") as picture:
        assert np.array_equal(np.asarray(picture), deep)  # written as sixteen bits
    high = [[0, 0, 1, 127, 128, 255]]
    assert read_label(tmp_path / f"a{ending}").tolist() == high
    assert read_photo(tmp_path / f"a{ending}")[..., 2].tolist() == high


def test_sixteen_bit_pgm_keeps_its_high_byte(tmp_path):
    deep = np.array([[0, 256, 0x7FFF, 65535]], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + deep.tobytes())
    assert read_label(tmp_path / "a.pgm").tolist() == [[0, 1, 127, 255]]
    assert read_photo(tmp_path / "a.pgm")[..., 0].tolist() == [[0, 1, 127, 255]]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_thirty_two_bits_a_pixel_are_refused_not_guessed(tmp_path, dtype):
    Image.fromarray(np.ones((3, 4), dtype)).save(tmp_path / "a.tif")
    for read in (read_photo, read_label):
        with pytest.raises(UserError, match="a.tif: has 32 bits a pixel"):
            read(tmp_path / "a.tif")


def test_one_bit_is_black_and_white(tmp_path):
    picture = Image.fromarray(stripes()).convert("1")
    for ending in (".png", ".tif", ".bmp"):
        picture.save(tmp_path / f"a{ending}")
        assert np.array_equal(read_label(tmp_path / f"a{ending}"), stripes())


@pytest.mark.parametrize("ending", [".png", ".gif", ".tif"])
@pytest.mark.parametrize("palette", [(255, 0), (0, 255), (3, 253)])
def test_a_palette_is_decoded_by_colour_never_by_index(tmp_path, palette, ending):
    index = (stripes() > 0).astype(np.uint8)
    picture = Image.fromarray(index, "P")
    picture.putpalette([value for grey in palette for value in (grey, grey, grey)])
    picture.save(tmp_path / f"a{ending}")
    expected = np.array(palette, np.uint8)[index]
    assert np.array_equal(read_label(tmp_path / f"a{ending}"), expected)
    assert np.array_equal(read_photo(tmp_path / f"a{ending}")[..., 1], expected)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a.swapaxes(0, 1)[::-1, ::-1]),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_a_photo_is_upright_by_its_exif_orientation(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_photo(tmp_path / "a.png"), upright(gradient()))
    assert read_label(tmp_path / "a.png").shape == upright(gradient()).shape[:2]
    assert picture_size(tmp_path / "a.png") == (13, 22)  # as stored


def test_of_several_frames_the_first_is_taken(tmp_path):
    first, second = Image.fromarray(stripes()), Image.fromarray(255 - stripes())
    for ending in (".tif", ".gif"):
        first.save(tmp_path / f"a{ending}", save_all=True, append_images=[second])
        assert np.array_equal(read_label(tmp_path / f"a{ending}"), stripes())


# --------------------------------------------------------------------------------------------- broken and hostile files


def refused(path, match):
    for read in (read_photo, read_label, picture_size):
        with pytest.raises(UserError, match=match) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("ending", PHOTO_ENDINGS)
def test_a_file_cut_short_is_refused_by_name(tmp_path, ending):
    rng = np.random.default_rng(0)
    path = tmp_path / f"cut{ending}"
    write_picture(path, rng.integers(0, 256, (64, 64, 3), np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for read in (read_photo, read_label):
        with pytest.raises(UserError, match="cut"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"this is text, not a picture\n" * 20, b"%PDF-1.4\n", b"\x89PNG\r\n\x1a\n"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_what_is_no_picture_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, "not a picture|damaged")


@pytest.mark.parametrize("content", [b"", b"no gzip", gzip.compress(b"text"), gzip.compress(bytes(9999))[:20]])
def test_a_gzip_that_holds_no_picture_is_refused(tmp_path, content):
    (tmp_path / "a.ppm.gz").write_bytes(content)
    refused(tmp_path / "a.ppm.gz", "not a picture|damaged")


def test_a_program_in_postscript_is_no_picture(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    refused(tmp_path / "a.png", "not a picture|damaged")


def test_a_folder_a_missing_file_and_a_pipe_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "not a regular file")
    refused(tmp_path / "missing.png", "no such file")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")  # whoever opened it would wait for ever
        refused(tmp_path / "pipe.png", "not a regular file")


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (13_360, 13_360), (2**31 - 1, 1)])
def test_a_header_that_claims_too_many_pixels_is_refused_unread(tmp_path, width, height):
    (tmp_path / "huge.png").write_bytes(png_header(width, height))
    refused(tmp_path / "huge.png", "pixels")


def test_a_large_photo_within_the_bound_is_not_refused_for_its_size(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(12_000, 9_000))
    assert picture_size(tmp_path / "large.png") == (9_000, 12_000)


# --------------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names_are_written_read_and_listed(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a bare name may begin with a dash
    write_picture(name, gradient())
    assert os.listdir() == [name]
    assert np.array_equal(read_photo(name), gradient())
    assert [path.name for path in list_pictures(".")] == [name]


@pytest.mark.parametrize("name, writer", [("a.png", (images.Path, "write_bytes")), ("a.jpg", (images.iio, "imwrite"))])
@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_writer_that_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, before, error, name, writer):
    def fail(path, *_, **__):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    path = tmp_path / name
    if before:
        path.write_bytes(before)
    monkeypatch.setattr(*writer, fail)
    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        write_picture(path, gradient())
    assert [found.name for found in tmp_path.iterdir()] == ([name] if before else [])
    assert not before or path.read_bytes() == before


def test_a_written_picture_replaces_the_old_one(tmp_path):
    for value in (0, 200):
        write_picture(tmp_path / "a.png", np.full((4, 5), value, np.uint8))
    assert read_label(tmp_path / "a.png").tolist() == [[200] * 5] * 4
    assert len(list(tmp_path.iterdir())) == 1


def test_where_a_picture_cannot_be_written_the_error_names_it(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing" / "a.png", tmp_path / "file" / "a.png"):
        with pytest.raises(UserError, match="a.png: cannot be written"):
            write_picture(path, gradient())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --------------------------------------------------------------------------------------------------------------- listing


def test_numbers_are_counted_not_spelt():
    ordered = ["1.png", "2.png", "10.png", "9" * 30 + ".png", "a2b.png", "a10b.png", "b1.png"]
    for names in (ordered[::-1], sorted(ordered)):
        assert sorted(names, key=natural_key) == ordered


def test_any_two_names_can_be_compared_and_differ():
    names = ["1", "a", "1a", "a1", "", "²", "١", "1.5", "01", "a01b", "a1b"]
    assert len({natural_key(name) for name in names}) == len(names)
    assert sorted(names, key=natural_key) == sorted(sorted(names), key=natural_key)


def test_list_pictures_leaves_out_hidden_files_folders_and_other_endings(tmp_path):
    for name in ("10.png", "9.JPG", "1.tiff", ".hidden.png", "._1.tiff", "notes.txt", "table.csv", "png", "a.ppm.gz"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "5.png").write_bytes(b"")
    assert [path.name for path in list_pictures(str(tmp_path))] == ["1.tiff", "9.JPG", "10.png"]


def test_what_cannot_be_listed_is_named(tmp_path):
    (tmp_path / "file.png").write_bytes(b"")
    for path in (tmp_path / "missing", tmp_path / "file.png"):
        with pytest.raises(UserError, match=f"{path.name}: cannot be listed"):
            list_pictures(path)


def test_remarks_of_decoders_are_silenced_in_every_thread_and_heard_again_behind(tmp_path):
    class Remark(Warning):
        pass

    inside, out = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def read(leaves_first):
        with images._QUIET:
            inside.wait()
            if leaves_first:
                out.wait()
            else:
                out.wait()
                time.sleep(0.05)  # the other has left by now
                warnings.warn("decoder", Remark, stacklevel=1)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(read, (True, False)))
        assert heard == []
        warnings.warn("behind", Remark, stacklevel=1)
    assert [str(remark.message) for remark in heard] == ["behind"]
