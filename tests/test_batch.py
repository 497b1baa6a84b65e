"""Folders of photos: what is written, what is skipped, what is never overwritten, and bad files among good ones."""

import csv
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from retina_seg.folder import COLUMNS, DONE, find_photos, read_summary, segment_files, to_16_bit
from retina_seg.predict import Segmenter
from retina_seg.synthetic import draw_photo
from torch import nn

from retina_seg import cli, folder
from retina_seg.images import read_label, read_photo, write_picture
from retina_seg.utils import UserError


class Darkness(nn.Module):
    """Calls dark pixels vessels; counts how often it was asked."""

    stride = 4
    receptive_field = 0

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def forward(self, x):
        self.asked += 1
        return 10 * (0.4 - x.mean(dim=1, keepdim=True))


@pytest.fixture
def segmenter() -> Segmenter:
    return Segmenter(Darkness(), {"kind": "fov", "fov_diameter": 64.0}, device="cpu", precision="float32")


@pytest.fixture
def photos(tmp_path):
    """Three photos and what a folder holds beside them."""
    place = tmp_path / "photos"
    (place / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "below/c.tif")):
        write_picture(place / name, draw_photo(number, 64, 72).photo)
    (place / "notes.txt").write_text("no photo")
    (place / ".hidden.png").write_bytes(b"x")
    return place


def run(segmenter, *arguments, **options):
    return segment_files(segmenter, *arguments, progress=False, **options)


def pictures(place) -> set[str]:
    return {path.name for path in place.iterdir()}


def test_every_photo_gets_its_three_pictures_and_a_row(segmenter, photos, tmp_path):
    rows = run(segmenter, [photos], tmp_path / "out")
    names = {f"{name}_{kind}.png" for name in "abc" for kind in ("probability", "vessels", "overlay")}
    assert pictures(tmp_path / "out") == names | {"summary.csv"}
    with open(tmp_path / "out/summary.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == COLUMNS and [row["name"] for row in written] == ["a", "b", "c"]
    assert all(row["status"] == DONE and row["width"] == "72" and row["height"] == "64" for row in written)
    assert [row["skipped"] for row in rows] == [False] * 3
    photo = read_photo(photos / "a.png")
    probability = segmenter(photo)
    with Image.open(tmp_path / "out/a_probability.png") as image:
        deep = np.asarray(image).astype(float)
    np.testing.assert_allclose(deep / 65535, probability, atol=1 / 65535)
    vessels = read_label(tmp_path / "out/a_vessels.png")
    np.testing.assert_array_equal(vessels, np.where(probability > 0.5, 255, 0))
    share = float(written[0]["vessel_share"])
    assert 0 < share < 1 and share == pytest.approx((vessels > 0).sum() / (folder.find_fov(photo)).sum(), abs=1e-4)
    overlay = read_photo(tmp_path / "out/a_overlay.png")
    assert (overlay != photo).any(axis=2).sum() == pytest.approx((vessels > 0).sum(), rel=0.02)


def test_a_second_run_does_only_what_is_new_or_changed(segmenter, photos, tmp_path):
    run(segmenter, [photos], tmp_path / "out")
    segmenter.network.asked = 0
    assert [row["skipped"] for row in run(segmenter, [photos], tmp_path / "out")] == [True] * 3
    assert segmenter.network.asked == 0
    (tmp_path / "out/b_vessels.png").unlink()
    changed = photos / "below/c.tif"
    os.utime(changed, (2e9, 2e9))
    write_picture(photos / "d.png", draw_photo(9, 64, 64).photo)
    skipped = {row["name"]: row["skipped"] for row in run(segmenter, [photos], tmp_path / "out")}
    assert skipped == {"a": True, "b": False, "c": False, "d": False}
    assert len(read_summary(tmp_path / "out/summary.csv")) == 4
    assert not any(row["skipped"] for row in run(segmenter, [photos], tmp_path / "out", overwrite=True))
    assert not any(row["skipped"] for row in run(segmenter, [photos], tmp_path / "out", weights="others"))
    assert len(pictures(tmp_path / "out")) == 13


def test_one_bad_file_never_stops_the_rest(segmenter, photos, tmp_path):
    (photos / "aa.png").write_bytes((photos / "a.png").read_bytes()[:500])
    (photos / "bb.jpg").write_text("no picture")
    rows = {row["name"]: row for row in run(segmenter, [photos], tmp_path / "out")}
    assert [name for name, row in rows.items() if row["status"] == DONE] == ["a", "b", "c"]
    assert "damaged" in rows["aa"]["status"] and "not a picture" in rows["bb"]["status"]
    assert not [name for name in pictures(tmp_path / "out") if name.startswith(("aa", "bb"))]
    # mended, it is done by the next run
    write_picture(photos / "aa.png", draw_photo(4, 64, 64).photo)
    assert {row["name"]: row["status"] for row in run(segmenter, [photos], tmp_path / "out")}["aa"] == DONE


def test_two_photos_of_one_stem_keep_their_own_pictures(segmenter, tmp_path):
    for place, shade in (("left", 60), ("right", 200)):
        (tmp_path / place).mkdir()
        write_picture(tmp_path / place / "eye.png", np.full((64, 64, 3), shade, np.uint8))
    write_picture(tmp_path / "right/EYE.jpg", np.full((64, 64, 3), 30, np.uint8))
    # also when they come in different calls
    run(segmenter, [tmp_path / "right/eye.png"], tmp_path / "out")
    rows = run(segmenter, [tmp_path / "left", tmp_path / "right"], tmp_path / "out")
    assert len({row["name"].casefold() for row in rows}) == 3
    names = {row["input"]: row["name"] for row in rows}
    dark = names[str((tmp_path / "left/eye.png").resolve())]
    light = names[str((tmp_path / "right/eye.png").resolve())]
    assert light == "eye" and dark != "eye"
    assert read_label(tmp_path / f"out/{dark}_vessels.png").min() == 255
    assert read_label(tmp_path / f"out/{light}_vessels.png").max() == 0


def test_nothing_is_written_over_an_input(segmenter, tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    write_picture(place / "eye.png", draw_photo(1, 64, 64).photo)
    write_picture(place / "eye_overlay.png", draw_photo(2, 64, 64).photo)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    run(segmenter, [place], place)
    assert all((place / name).read_bytes() == content for name, content in before.items())
    # and yesterday's pictures are no photos today
    count = len(pictures(place))
    assert [row["skipped"] for row in run(segmenter, [place], place)] == [True, True]
    assert len(pictures(place)) == count == 2 + 6 + 1


def test_a_folder_of_pictures_inside_the_photos_is_not_segmented(segmenter, photos):
    run(segmenter, [photos], photos / "vessels")
    assert len(run(segmenter, [photos], photos / "vessels")) == 3


def test_links_odd_names_and_repeated_inputs(segmenter, photos, tmp_path):
    (photos / "loop").symlink_to(photos, target_is_directory=True)
    (photos / "again.png").symlink_to(photos / "a.png")
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    for name in ("two words.png", "línea\nnueva.png", "-dash.png", "眼.png"):
        write_picture(photos / name, draw_photo(1, 64, 64).photo)
    rows = run(segmenter, [photos, photos / "a.png", photos], tmp_path / "out")
    failed = [row for row in rows if row["status"] != DONE]
    assert len(rows) == 3 + 4 + 1 and [row["name"] for row in failed] == ["gone"]
    assert "no such file" in failed[0]["status"]
    again = run(segmenter, [photos], tmp_path / "out")
    assert sum(row["skipped"] for row in again) == 7


def test_names_as_long_as_they_may_be_or_without_an_encoding(segmenter, tmp_path):
    place = tmp_path / "photos"
    place.mkdir()
    write_picture(place / "eye.png", draw_photo(1, 64, 64).photo)
    content = (place / "eye.png").read_bytes()
    for name in (b"a" * 251 + b".png", b"a" * 250 + b"b.png", b"caf\xe9.png"):
        with open(os.path.join(os.fsencode(place), name), "wb") as file:
            file.write(content)
    rows = run(segmenter, [place], tmp_path / "out")
    assert [row["status"] for row in rows] == [DONE] * 4 and len({row["name"] for row in rows}) == 4
    assert all(row["skipped"] for row in run(segmenter, [place], tmp_path / "out"))


def test_a_photo_too_large_for_the_machine_does_not_stop_the_rest(segmenter, photos, tmp_path, monkeypatch):
    real = folder.find_fov

    def full_at_the_tif(photo):
        if photo.shape == (64, 64, 3):
            raise MemoryError("no room")
        return real(photo)

    write_picture(photos / "aa.png", draw_photo(1, 64, 64).photo)
    monkeypatch.setattr(folder, "find_fov", full_at_the_tif)
    rows = {row["name"]: row["status"] for row in run(segmenter, [photos], tmp_path / "out")}
    assert "no room" in rows.pop("aa") and set(rows.values()) == {DONE}


def test_photos_side_by_side_are_those_one_by_one_and_large_ones_take_turns(segmenter, tmp_path, monkeypatch):
    place = tmp_path / "photos"
    place.mkdir()
    for number in range(8):
        write_picture(place / f"{number}.png", draw_photo(number, 64, 72).photo)
    running, most = [], {}
    plain = segmenter.model.forward

    def slow(x):
        running.append(1)
        most[case] = max(most.get(case, 0), len(running))
        time.sleep(0.02)
        running.pop()
        return plain(x)

    segmenter.network.forward = slow
    threads = torch.get_num_threads()
    for case, count, large in (("alone", 1, 1 << 30), ("beside", 3, 1 << 30), ("large", 3, 0)):
        torch.set_num_threads(count)
        monkeypatch.setattr(folder, "LARGE", large)
        run(segmenter, [place], tmp_path / case)
    torch.set_num_threads(threads)
    assert most["alone"] == 1 and most["beside"] > 1 and most["large"] == 1
    made = {case: {p.name: p.read_bytes() for p in (tmp_path / case).glob("*.png")} for case in most}
    assert len(made["alone"]) == 24 and made["alone"] == made["beside"] == made["large"]


def test_photos_are_upright(segmenter, tmp_path):
    photo = Image.fromarray(draw_photo(1, 64, 96).photo)
    exif = photo.getexif()
    exif[0x0112] = 6  # turn by a quarter to be upright
    photo.save(tmp_path / "turned.jpg", exif=exif)
    row = run(segmenter, [tmp_path / "turned.jpg"], tmp_path / "out")[0]
    assert (row["width"], row["height"]) == (64, 96)
    assert read_label(tmp_path / "out/turned_vessels.png").shape == (96, 64)


def test_an_interrupted_run_keeps_what_was_done(segmenter, photos, tmp_path, monkeypatch):
    real, calls = Segmenter.__call__, []

    def stop_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(Segmenter, "__call__", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(segmenter, [photos], tmp_path / "out")
    monkeypatch.undo()
    assert [row["skipped"] for row in run(segmenter, [photos], tmp_path / "out")] == [True, True, False]


def test_a_call_that_was_killed_leaves_its_names_to_the_next(segmenter, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "write_summary", lambda *_: None)  # the pictures are there, the summary is not
    run(segmenter, [photos], tmp_path / "out")
    monkeypatch.undo()
    files = {"a": photos / "a.png", "b": photos / "b.jpg", "c": photos / "below/c.tif"}
    plan = [{"input": str(file.resolve()), "name": name, "path": str(file)} for name, file in files.items()]
    folder._write_table(tmp_path / "out" / folder.PLAN, folder.PLAN_COLUMNS, plan)
    rows = run(segmenter, [photos], tmp_path / "out")
    assert [(row["name"], row["skipped"]) for row in rows] == [(name, False) for name in files]
    assert not (tmp_path / "out" / folder.PLAN).exists()


def test_somebody_elses_summary_is_not_replaced(segmenter, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/summary.csv").write_text("my,own,table\n1,2,3\n")
    with pytest.raises(UserError, match="not a summary of this command"):
        run(segmenter, [photos], tmp_path / "out")
    assert (tmp_path / "out/summary.csv").read_text().startswith("my,own")


def test_no_photos_is_said(segmenter, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no photos found"):
        run(segmenter, [tmp_path / "empty"], tmp_path / "out")
    with pytest.raises(UserError, match="nowhere: no such file"):
        find_photos([tmp_path / "nowhere"])


def test_sixteen_bits_are_the_rounded_probability():
    probability = np.linspace(0, 1, 1030 * 3, dtype=np.float32).reshape(1030, 3)
    np.testing.assert_array_equal(to_16_bit(probability), np.rint(probability * 65535).astype(np.uint16))


def test_the_command_says_what_failed_and_exits_with_1(photos, tiny_run, tmp_path, capsys):
    (photos / "bad\none.png").write_text("no picture")
    arguments = ["predict", str(photos), "--output", str(tmp_path / "out"), "--weights", str(tiny_run)]
    assert cli.main(arguments) == 1
    shown = capsys.readouterr()
    assert "3 segmented, 0 done before, 1 failed" in shown.out
    lines = [line for line in shown.err.replace("\r", "\n").splitlines() if "retina-seg:" in line]
    assert len(lines) == 1 and "bad\\none.png: is not a picture" in lines[0]
    (photos / "bad\none.png").unlink()
    assert cli.main(arguments) == 0
    assert "0 segmented, 3 done before, 0 failed" in capsys.readouterr().out
    # other options are other answers
    assert cli.main([*arguments, "--threshold", "0.4"]) == 0
    assert "3 segmented" in capsys.readouterr().out


def test_weights_that_do_not_load_are_refused_before_anything_is_written(photos, tmp_path, capsys):
    torch.save({"a": torch.zeros(1)}, tmp_path / "odd.pth")
    assert (
        cli.main(["predict", str(photos), "--output", str(tmp_path / "out"), "--weights", str(tmp_path / "odd.pth")])
        == 2
    )
    assert not (tmp_path / "out").exists()
