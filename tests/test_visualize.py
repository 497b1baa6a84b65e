"""Strips, overlays, sheets and curves: their geometry and colours by hand, their files by their signature."""

import math

import numpy as np
import pytest
from conftest import noise

from retina_seg import visualize
from retina_seg.metrics import RankingHistogram
from retina_seg.utils import UserError
from retina_seg.visualize import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE, error_overlay, mask_parse, save_figure

PNG = b"\x89PNG\r\n\x1a\n"


def test_mask_parse_repeats_the_grey_value_in_three_channels():
    assert mask_parse(np.array([[0, 7]], np.uint8)).tolist() == [[[0, 0, 0], [7, 7, 7]]]


def test_the_strip_has_the_originals_geometry():
    image, mask, prediction = noise(7, 5, 3), noise(7, 5, seed=1), noise(7, 5, seed=2)
    strip = visualize.strip(image, mask, prediction)
    assert (strip.shape, strip.dtype) == ((7, 3 * 5 + 20, 3), np.uint8)
    assert np.array_equal(strip[:, :5], image)
    assert (strip[:, 5:15] == 128).all() and (strip[:, 20:30] == 128).all()
    assert np.array_equal(strip[:, 15:20], mask_parse(mask))
    assert np.array_equal(strip[:, 30:], mask_parse(prediction))


def test_four_pixels_have_the_four_colours_of_an_error_overlay():
    image = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[True, True], [False, False]])
    predicted = np.array([[True, False], [True, False]])
    colours = [tuple(pixel) for pixel in error_overlay(image, mask, predicted).reshape(4, 3)]
    assert colours == [TRUE_POSITIVE, FALSE_NEGATIVE, FALSE_POSITIVE, (50, 50, 50)]
    assert colours[:3] == [(255, 255, 255), (86, 180, 233), (230, 159, 0)]  # white, sky blue, orange


def test_outside_the_field_of_view_nothing_is_coloured():
    image = noise(4, 6, 3)
    everywhere, nowhere, fov = np.ones((4, 6), bool), np.zeros((4, 6), bool), np.zeros((4, 6), bool)
    fov[1, 2:4] = True
    overlay, plain = error_overlay(image, nowhere, everywhere, fov), error_overlay(image, nowhere, nowhere)
    assert (overlay[fov] == FALSE_POSITIVE).all()
    assert np.array_equal(overlay[~fov], plain[~fov])
    assert (plain[..., 0] == plain[..., 1]).all()


@pytest.mark.parametrize(("side", "width"), [(7, 1), (1500, 1), (1501, 2)])
def test_the_vessel_overlay_outlines_vessels_and_leaves_them_as_they_are(side, width):
    image, vessels = noise(7, side, 3), np.zeros((7, side), bool)
    before, vessels[3, 2] = image.copy(), True
    overlay = visualize.vessel_overlay(image, vessels)
    drawn = (overlay == visualize.OUTLINE).all(axis=2)
    assert np.array_equal(overlay[~drawn], image[~drawn]) and np.array_equal(image, before)
    assert not drawn[3, 2] and drawn[3].sum() == drawn[:, 2].sum() == 2 * width


def test_shrink_keeps_the_aspect_ratio_and_never_enlarges():
    shapes = [(100, 200, 3), (100, 200), (1, 200, 3)]
    assert [visualize.shrink(noise(*shape), 50).shape for shape in shapes] == [(25, 50, 3), (25, 50), (1, 50, 3)]
    small = noise(10, 20, 3)
    assert visualize.shrink(small, 20) is small and visualize.shrink(small, 500) is small


@pytest.mark.parametrize(("count", "columns", "rows", "across"), [(1, 4, 1, 1), (5, 2, 3, 2), (4, 4, 1, 4)])
def test_a_contact_sheet_of_mixed_sizes_has_a_tile_for_each(count, columns, rows, across):
    shapes = [(60, 90), (200, 40), (30, 300), (64, 64), (20, 20)][:count]
    images = [np.full((*shape, 3), 10 + 20 * i, np.uint8) for i, shape in enumerate(shapes)]
    sheet = visualize.contact_sheet(images, [f"image {i}" for i in range(count)], columns=columns, width=64)
    tile = 24 + max(round(height * min(1, 64 / width)) for height, width in shapes)
    margin = 0 if count == 1 else 6  # a lone tile comes without the 6 px of margin around each
    expected = (rows * (tile + margin) + margin, across * (64 + margin) + margin, 3)
    assert (sheet.shape, sheet.dtype) == (expected, np.uint8)
    for i in range(count):
        top, left = margin + i // across * (tile + 6), margin + i % across * (64 + 6)
        assert sheet[top : top + 24, left : left + 64].min() < 128  # a caption
        assert (sheet[top + 24, left] == 10 + 20 * i).all()
    with pytest.raises(ValueError, match="zip"):
        visualize.contact_sheet(images, ["a"] * (count + 1))


def history(epochs, validated=True):
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1.1 / epoch if validated else math.nan,
            "validation_f1": 1 - 1 / (epoch + 1) if validated else math.nan,
            "seconds": 30.0,
        }
        for epoch in range(1, epochs + 1)
    ]


def lines_of(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}


def test_curves_show_both_losses_and_f1_and_mark_the_kept_epoch():
    rows = history(5)
    losses, scores = visualize.curves(rows, best=4).axes
    assert lines_of(losses)["training"] == [row["train_loss"] for row in rows]
    assert lines_of(losses)["validation"] == [row["validation_loss"] for row in rows]
    assert set(losses.get_lines()[-1].get_xdata()) == {4}
    assert [row["validation_f1"] for row in rows] in lines_of(scores).values()
    (losses,) = visualize.curves(history(3, validated=False)).axes
    assert list(lines_of(losses)) == ["training"]


@pytest.mark.parametrize(("epochs", "validated"), [(1, True), (40, False)])
def test_curves_of_any_length_are_saved_as_png(tmp_path, epochs, validated):
    visualize.save_figure(tmp_path / "curves.png", visualize.curves(history(epochs, validated), best=1))
    assert (tmp_path / "curves.png").read_bytes()[:8] == PNG
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    with pytest.raises(UserError, match="a.png"):
        save_figure(tmp_path / "missing" / "a.png", visualize.new_figure()[0])


def test_ranking_curves_have_a_line_a_region_with_its_scores():
    rng = np.random.default_rng(0)
    mask, ranking = rng.random(5000) < 0.2, RankingHistogram()
    ranking.add(mask, np.clip(0.4 * mask + 0.6 * rng.random(5000), 0, 1))
    figure = visualize.ranking_curves({"fov": ranking, "frame": ranking, "no vessel": RankingHistogram()})
    roc, precision_recall = figure.axes
    area, precision = ranking.scores()
    regions = ("field of view", "whole frame")
    assert list(lines_of(roc)) == [f"{region}, AUC {area:.4f}" for region in regions]
    assert list(lines_of(precision_recall)) == [f"{r}, average precision {precision:.4f}" for r in regions]
    for line in (*roc.get_lines(), *precision_recall.get_lines()):
        assert all(value.min() >= 0 and value.max() <= 1 for value in line.get_data())
    x, y = roc.get_lines()[0].get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(area)


def test_a_line_chart_has_a_line_a_name_with_its_own_x_values_and_upright_marks():
    lines = {"one": ([0.5, 1.0], [0.2, 0.4]), "two": (range(40), range(40))}
    (axis,) = visualize.line_chart(lines, "minutes", "F1", {"a": 0.3, "b": 0.4}, ylim=(0, 1), title="title").axes
    one, two, *marks = axis.lines
    assert (list(one.get_xdata()), list(one.get_ydata())) == lines["one"]
    assert list(two.get_xdata()) == list(two.get_ydata()) == list(range(40))
    assert [set(mark.get_xdata()) for mark in marks] == [{0.3}, {0.4}]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two", "a", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title()) == ("minutes", "F1", "title")
    assert axis.get_ylim() == (0, 1)


def test_a_gallery_names_the_error_colours_and_heat_maps_their_range(tmp_path):
    figure = visualize.gallery([noise(20, 30, 3), noise(20, 30) > 9], ["a", "b"], colours=True)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["true positive", "false negative", "false positive"]
    figure = visualize.heat_maps(noise(20, 30, 3), "image", {"flat": np.zeros((4, 6)), "ramp": np.arange(101.0)[None]})
    assert [axis.get_title() for axis in figure.axes] == ["image", "flat\n0 to 0", "ramp\n1 to 99"]
    ramp = np.asarray(figure.axes[2].images[0].get_array(), int)[0].sum(axis=1)
    assert ramp[0] < ramp[50] < ramp[100]  # dark to light
    save_figure(tmp_path / "maps.png", figure)
