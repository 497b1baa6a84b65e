"""Many images: what is written and under which name, what is skipped, what is never overwritten, bad files among good."""

import json
import os
import time

import numpy as np
import pytest
from conftest import call, failing, files, write
from PIL import Image
from test_segmenter import Dark

from retina_seg.checkpoint import find_weights, weights_id
from retina_seg.fov import find_fov
from retina_seg.images import read_image, read_mask
from retina_seg.inference import batch
from retina_seg.inference.batch import COLUMNS, DONE, MEASURES, NUMBERS, OUTPUTS, SUMMARIES, predict_images
from retina_seg.inference.segmenter import Segmenter
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.transforms import FovFrame
from retina_seg.utils import UserError, read_csv
from retina_seg.visualize import OUTLINE


@pytest.fixture
def segmenter() -> Segmenter:
    network = Dark()
    network.level = 0.4
    return Segmenter(network, FovFrame(64.0), 0.4, device="cpu", precision="float32")


def write_synthetic(path, seed=1, height=64):
    write(path, synthetic_image(seed, height, 72).image)


@pytest.fixture
def images(tmp_path):
    """Three images and what a folder holds beside them."""
    for seed, name in enumerate(("a.png", "b.jpg", "below/c.tif")):
        write_synthetic(tmp_path / "images" / name, seed)
    (tmp_path / "images/notes.txt").write_text("no image")
    (tmp_path / "images/.hidden.png").write_bytes(b"x")
    return tmp_path / "images"


def run(segmenter, inputs, output, **options):
    return predict_images(segmenter, inputs, output, progress=False, **options)


def outputs(*names) -> set[str]:
    return {f"{name}_{kind}.png" for name in names for kind in OUTPUTS}


def test_every_image_gets_its_outputs_and_a_row(segmenter, images, tmp_path):
    rows = run(segmenter, [images], tmp_path / "out")
    assert files(tmp_path / "out").keys() == outputs("a", "b", "below/c") | set(SUMMARIES)
    written = read_csv(tmp_path / "out/summary.csv", COLUMNS)
    assert tuple(written[0]) == COLUMNS and [row["name"] for row in written] == ["a", "b", "below/c"]
    assert all((row["status"], row["width"], row["height"]) == (DONE, "72", "64") for row in written)
    assert rows == [{**row, "skipped": False} for row in written]
    image = read_image(images / "a.png")
    probability = segmenter(image)
    with Image.open(tmp_path / "out/a_probability.png") as deep:
        np.testing.assert_array_equal(np.asarray(deep), np.rint(probability * 65535))
    vessels = read_mask(tmp_path / "out/a_vessels.png")
    np.testing.assert_array_equal(vessels, np.where(probability > 0.4, 255, 0))
    percent = float(written[0]["vessel_percent"])
    assert 0 < percent < 100 and percent == pytest.approx(100 * (vessels > 0).sum() / find_fov(image).sum(), rel=1e-3)
    overlay = read_image(tmp_path / "out/a_overlay.png")
    drawn = (overlay != image).any(axis=2)
    assert drawn.any() and not drawn[vessels > 0].any() and (overlay[drawn] == OUTLINE).all()
    listed = json.loads((tmp_path / "out/summary.json").read_text())
    assert [{**row, **{name: json.loads(row[name]) for name in NUMBERS}} for row in written] == listed


def test_a_second_run_does_only_what_is_new_or_changed(segmenter, images, tmp_path):
    calls = []
    segmenter.network.module.register_forward_hook(lambda *_: calls.append(1))
    run(segmenter, [images], tmp_path / "out")
    assert [row["skipped"] for row in run(segmenter, [images], tmp_path / "out")] == [True] * 3
    assert len(calls) == 3
    (tmp_path / "out/b_vessels.png").unlink()
    write_synthetic(images / "below/c.tif", 7)
    os.utime(images / "below/c.tif", (1e9, 1e9))  # another image, older than its maps
    write_synthetic(images / "d.png")
    table = [COLUMNS, *(row.values() for row in read_csv(tmp_path / "out/summary.csv", COLUMNS))]
    text = "\n".join(";".join(f'"{cell}"' for cell in cells) for cells in table)
    (tmp_path / "out/summary.csv").write_text(text, encoding="utf-8-sig")  # as a spreadsheet saves it
    skipped = {row["name"]: row["skipped"] for row in run(segmenter, [images], tmp_path / "out")}
    assert skipped == {"a": True, "b": False, "below/c": False, "d": False}
    vessels = read_mask(tmp_path / "out/below/c_vessels.png") > 0
    assert vessels.any() and np.array_equal(vessels, segmenter.vessels(read_image(images / "below/c.tif")))
    assert not any(row["skipped"] for row in run(segmenter, [images], tmp_path / "out", overwrite=True))
    assert len(files(tmp_path / "out")) == 4 * 3 + 2


def test_maps_of_other_weights_or_options_are_neither_kept_nor_mixed(segmenter, images, tmp_path):
    run(segmenter, [images], tmp_path / "out")
    before = files(tmp_path / "out")
    segmenter.threshold = 0.6
    for options, said in (({}, "e3b.*=0.4 .*, not e3b.*=0.6 .*"), ({"made_with": "tiny"}, ".*=0.4 .*, not tiny")):
        with pytest.raises(UserError, match=f"out: made with {said}; .*--overwrite.*--output"):
            run(segmenter, [images], tmp_path / "out", **options)
    assert files(tmp_path / "out") == before
    run(segmenter, [images], tmp_path / "out", overwrite=True, save="masks")
    assert files(tmp_path / "out").keys() == {f"{name}_vessels.png" for name in ("a", "b", "below/c")} | set(SUMMARIES)
    # one more map of the same image keeps the others; a failure leaves none
    assert not any(row["skipped"] for row in run(segmenter, [images], tmp_path / "out", save="masks, fov"))
    fov = read_mask(tmp_path / "out/a_fov.png")
    assert np.array_equal(fov, find_fov(read_image(images / "a.png")) * np.uint8(255)) and fov.any()
    (images / "b.jpg").write_bytes(b"")
    rows = run(segmenter, [images], tmp_path / "out", save="fov")
    assert [row["skipped"] for row in rows] == [True, False, True] and rows[1]["status"] != DONE
    left = {f"{name}_{kind}.png" for name in ("a", "below/c") for kind in ("vessels", "fov")}
    assert files(tmp_path / "out").keys() == left | set(SUMMARIES)


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("list.txt", "# mine\n\n b.jpg\r\nbelow\\c.tif\n", {"b", "below/c"}),
        ("list.txt", "{images}/a.png\nbelow\na.png", {"a", "below/c"}),
        ("../list.lst", '"images/below/c.tif"\nother/c.png', {"images/below/c", "other/c"}),
        ("sub/list.csv", "id;Image;grade\n1;../a.png;0\n;;\n2;../b.jpg;1\n", {"a", "b"}),
        ("list.tsv", "file\tgrade\na.png\t0\n", {"a"}),
    ],
)
def test_lists_of_paths(segmenter, images, tmp_path, name, text, names):
    write_synthetic(tmp_path / "other/c.png")
    (images / name).parent.mkdir(exist_ok=True)
    for encoding in ("utf-8-sig", "utf-16"):  # with a byte-order mark
        (images / name).write_text(text.replace("{images}", str(images)), encoding=encoding)
        run(segmenter, images / name, tmp_path / encoding, save="masks")
        assert files(tmp_path / encoding).keys() == {f"{name}_vessels.png" for name in names} | set(SUMMARIES)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("list.csv", 'path\n"b.jpg"\ngone.png\n', "list.csv, line 3: .*images/gone.png: no such file"),
        ("list.txt", "a.png\n\nb.png\n", "list.txt, line 3: .*images/b.png: no such file"),
        ("list.csv", "<html>", "list.csv: is an HTML page"),
        ("list.txt", "# nothing", "no images found in .*list.txt"),
    ],
)
def test_lists_of_what_is_not_there(segmenter, images, tmp_path, name, text, said):
    (images / name).write_text(text)
    with pytest.raises(UserError, match=said):
        run(segmenter, images / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_bad_file_never_stops_the_rest(segmenter, images, tmp_path, monkeypatch):
    (images / "aa.png").write_bytes((images / "a.png").read_bytes()[:500])
    (images / "bb.jpg").write_text("no image")
    write_synthetic(images / "large.png", height=80)
    monkeypatch.setattr(batch, "find_fov", lambda image: bytearray(1 << 62) if len(image) == 80 else find_fov(image))
    status = {row["name"]: row["status"] for row in run(segmenter, [images], tmp_path / "out")}
    assert [name for name in status if status[name] == DONE] == ["a", "b", "below/c"]
    for name, said in (("aa", "is damaged"), ("bb", "is not an image"), ("large", "--working-size")):
        assert said in status[name]
    assert files(tmp_path / "out").keys() == outputs("a", "b", "below/c") | set(SUMMARIES)
    write_synthetic(images / "aa.png")  # mended, it is done by the next run
    assert {row["name"]: row["status"] for row in run(segmenter, [images], tmp_path / "out")}["aa"] == DONE


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        (["left"], {"sub/eye", "eye.jpg", "EYE.png"}),
        (["left", "right"], {"left/sub/eye", "left/eye.jpg", "left/EYE.png", "right/eye"}),
        (["right", "left/EYE.png"], {"right/eye", "EYE"}),
        (["right/eye.png", "left/eye.jpg"], {"eye.png", "eye.jpg"}),
    ],
)
def test_outputs_mirror_the_inputs_and_two_of_one_name_keep_their_ending(segmenter, tmp_path, inputs, names):
    for name in ("left/eye.jpg", "left/EYE.png", "left/sub/eye.png", "right/eye.png"):
        write_synthetic(tmp_path / name)
    run(segmenter, [tmp_path / item for item in inputs], tmp_path / "out", save="masks")
    assert files(tmp_path / "out").keys() == {f"{name}_vessels.png" for name in names} | set(SUMMARIES)


def test_what_two_images_would_share_is_refused_before_anything_is_written(segmenter, tmp_path):
    first, second = tmp_path / "x/eye.jpg", tmp_path / "y/eye.jpg"
    for path in (first, second):
        write_synthetic(path)
    with pytest.raises(UserError, match=r"y/eye.jpg and .*x/eye.jpg.*--output"):
        run(segmenter, [first, second], tmp_path / "out")
    assert not files(tmp_path / "out")
    run(segmenter, [tmp_path / "x"], tmp_path / "out", save="masks")
    with pytest.raises(UserError, match=r"y/eye.jpg and .*x/eye.jpg"):  # nor in the next call
        run(segmenter, [tmp_path / "y"], tmp_path / "out")
    write_synthetic(tmp_path / "x/eye.png")
    run(segmenter, [tmp_path / "x"], tmp_path / "out", save="masks")  # the name of the first is kept
    assert files(tmp_path / "out").keys() == {"eye_vessels.png", "eye.png_vessels.png", *SUMMARIES}


def test_nothing_is_written_over_what_is_not_ours(segmenter, images):
    write_synthetic(images / "a_overlay.png", 5)
    before = files(images)
    with pytest.raises(UserError, match="a_overlay.png: is there already.*--output"):
        run(segmenter, [images], images)
    assert files(images) == before
    (images / "a_overlay.png").unlink()
    assert len(run(segmenter, [images], images)) == 3
    assert files(images).items() >= {k: v for k, v in before.items() if "overlay" not in k}.items()
    # and our own outputs are no images
    assert [row["skipped"] for row in run(segmenter, [images], images)] == [True] * 3
    write_synthetic(
        images / "vessels/other.png"
    )  # an output below the input is left out; outputs in another folder are images
    assert len(run(segmenter, [images], images / "vessels")) == 3 + 9


def test_links_odd_names_and_repeated_inputs(segmenter, images, tmp_path):
    (images / "loop").symlink_to(images, target_is_directory=True)
    (images / "again.png").symlink_to(images / "a.png")
    (images / "gone.png").symlink_to(images / "nowhere.png")
    for name in ("two words", "línea\nnueva", "-dash", "眼", "caf\udce9", "a" * 251):  # the fifth is no UTF-8
        (images / f"{name}.png").write_bytes((images / "a.png").read_bytes())
    rows = run(segmenter, [images, images / "a.png", images], tmp_path / "out")
    failed = {row["name"][-4:]: row["status"] for row in rows if row["status"] != DONE}
    assert len(rows) == 3 + 5 + 2 and failed.keys() == {"gone", "aaaa"}
    assert "no such file" in failed["gone"] and "name is too long" in failed["aaaa"]
    assert sum(row["skipped"] for row in run(segmenter, [images], tmp_path / "out")) == 8


def test_several_at_once_give_the_same_bytes_and_large_ones_take_turns(segmenter, tmp_path, monkeypatch):
    for number in range(6):
        write_synthetic(tmp_path / f"images/{number}.png", number)
    forward, running, most, made = segmenter.network.module.forward, [], {}, []

    def slow(x):
        running.append(1)
        most[case] = max(most.get(case, 0), len(running))
        time.sleep(0.02)
        running.pop()
        return forward(x)

    segmenter.network.module.forward = slow
    for case, count, large in (("alone", 1, 1 << 30), ("several", 3, 1 << 30), ("large", 3, 0)):
        monkeypatch.setattr(batch, "LARGE", large)
        run(segmenter, [tmp_path / "images"], tmp_path / case, jobs=count)
        made.append({name: content for name, content in files(tmp_path / case).items() if name not in SUMMARIES})
    assert most["alone"] == 1 and most["several"] > 1 and most["large"] == 1
    assert len(made[0]) == 18 and made[0] == made[1] == made[2]


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_done_before_an_interruption_is_not_done_again(segmenter, images, monkeypatch, killed):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Segmenter, "__call__", failing(segmenter.__call__, 2, KeyboardInterrupt()))
        patch.setattr(batch, "_merge", (lambda _: None) if killed else batch._merge)
        run(segmenter, [images], images)
    assert (images / ".summary.0.csv").exists() == killed
    if killed:
        for name in outputs("below/c"):
            (images / name).write_bytes(b"here, but its row is cut short")
        with open(images / ".summary.0.csv", "a") as file:
            file.write(f"{images / 'below/c.tif'},bel")
    assert [row["skipped"] for row in run(segmenter, [images], images)] == [True, True, False]
    assert files(images).keys() >= outputs("a", "b", "below/c") and not (images / ".summary.0.csv").exists()


def test_the_command_says_what_it_did_and_what_failed_and_exits_with_1(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(batch, "load_image", lambda path: (read_image(path), "page 2 of 2" if path.stem == "a" else ""))
    (images / "bad\none.png").write_text("no image")
    for name in ("more.TXT", "table.csv", "README", "below/Makefile", "below/README"):
        (images / name).write_text("no image")
    arguments = ["predict", "~/images", "--output", "~/out", "--weights", "tiny"]
    assert call(*arguments, "--dry-run", "--style", "none") == 0 and not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "/a.png -> ~/out/a_*" in shown and "dry run: 4 to segment, 0 done before" in shown
    assert call(*arguments) == 1
    shown = "".join(capsys.readouterr())
    said = "3 segmented, 0 done before, 1 failed: ~/out; passed over: 3 without ending, 2 .txt, 1 .csv\n"
    assert said in shown and "bad\\none.png: is not an image" in shown
    assert call(*arguments, "--threshold", "0.4") == 2
    tiny = f"tiny {weights_id(find_weights('tiny'))}"
    assert f"made with {tiny}, not {tiny} threshold=0.4; " in capsys.readouterr().err
    (images / "bad\none.png").unlink()
    assert call(*arguments, "--threshold", "0.4", "--tta", "--overwrite") == 0
    shown, rows = capsys.readouterr().out, read_csv(tmp_path / "out/summary.csv", COLUMNS)
    assert {row["made_with"] for row in rows if row["status"] == DONE} == {f"{tiny} threshold=0.4 tta"}
    assert rows[0]["remark"].startswith("page 2 of 2; small: field of view of 62 pixels") and not rows[2]["remark"]
    assert [row["gradable"] for row in rows] == ["no", "no", "", "no"] and "3 doubtful or not gradable" in shown
    assert call(*arguments, "--threshold", "0.4", "--tta") == 0
    assert "0 segmented, 3 done before" in capsys.readouterr().out


def test_measures_are_columns_where_asked_for(segmenter, images, tmp_path, capsys):
    pixels, sizes = (run(segmenter, [images], tmp_path / str(n), measure=True, pixel_size=n) for n in (None, 8.0))
    assert [row["skipped"] for row in run(segmenter, [images], tmp_path / "None", measure=True)] == [True] * 3
    for one, other in zip(pixels, sizes, strict=True):
        known = {name for name in MEASURES if name in one}
        physical = {name for name in MEASURES if name.endswith(("_um", "_mm"))}
        assert {name for name in MEASURES if name in other} - known == physical
        assert float(other["calibre_mean_um"]) == pytest.approx(8 * float(one["calibre_mean_px"]), rel=1e-3)
    listed = json.loads((tmp_path / "None/summary.json").read_text())
    assert listed[0]["fractal_d0"] == float(pixels[0]["fractal_d0"])
    with pytest.raises(UserError, match="made with .*measure"):
        run(segmenter, [images], tmp_path / "None")
    for options, said in ((["--pixel-size", "8"], "add --measure"), (["--measure", "--pixel-size", "0"], "above 0")):
        assert call("predict", images, "--output", tmp_path / "new", "--weights", "tiny", *options) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "new").exists()
