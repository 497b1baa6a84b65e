"""Strips, overlays, sheets and curves: their geometry and colours by hand, their files by their signature."""

import math

import numpy as np
import pytest
from conftest import noise

from retina_seg import visualize
from retina_seg.metrics import RankingHistogram
from retina_seg.utils import UserError
from retina_seg.visualize import FALSE_NEGATIVE, FALSE_POSITIVE, TRUE_POSITIVE, error_overlay, save_figure


def test_the_strip_has_the_originals_geometry():
    image, mask, prediction = noise(7, 5, 3), noise(7, 5, seed=1), noise(7, 5, seed=2)
    strip = visualize.strip(image, mask, prediction)
    assert (strip.shape, strip.dtype) == ((7, 3 * 5 + 20, 3), np.uint8)
    assert np.array_equal(strip[:, :5], image)
    assert (strip[:, 5:15] == 128).all() and (strip[:, 20:30] == 128).all()
    for first, grey in ((15, mask), (30, prediction)):
        assert (strip[:, first : first + 5] == grey[:, :, None]).all()


def test_four_pixels_have_the_four_colours_of_an_error_overlay_inside_the_field_of_view():
    image, fov = np.full((2, 3, 3), 100, np.uint8), np.array([[True, True, False], [True, True, False]])
    mask, predicted = np.array([[True, True, True], [False, False, False]]), np.array([[True, False, True]] * 2)
    colours = [tuple(pixel) for pixel in error_overlay(image, mask, predicted, fov).reshape(6, 3)]
    grey = (50, 50, 50)
    assert colours == [TRUE_POSITIVE, FALSE_NEGATIVE, grey, FALSE_POSITIVE, grey, grey]
    assert (error_overlay(image, mask, predicted)[0, 2] == TRUE_POSITIVE).all()


@pytest.mark.parametrize(("side", "width"), [(7, 1), (1500, 1), (1501, 2)])
def test_the_vessel_overlay_outlines_vessels_and_leaves_them_as_they_are(side, width):
    image, vessels = noise(7, side, 3), np.zeros((7, side), bool)
    vessels[3, 2] = True
    overlay = visualize.vessel_overlay(image, vessels)
    drawn = (overlay == visualize.OUTLINE).all(axis=2)
    assert np.array_equal(overlay[~drawn], image[~drawn]) and np.array_equal(image, noise(7, side, 3))
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
    expected = (rows * (tile + 6) + 6, across * (64 + 6) + 6, 3)
    assert (sheet.shape, sheet.dtype) == (expected, np.uint8)
    for i in range(count):
        top, left = 6 + i // across * (tile + 6), 6 + i % across * (64 + 6)
        assert sheet[top : top + 24, left : left + 64].min() < 128  # a caption
        assert (sheet[top + 24, left] == 10 + 20 * i).all()
    with pytest.raises(ValueError, match="zip"):
        visualize.contact_sheet(images, ["a"] * (count + 1))


def history(epochs, validated=True):
    row = {"validation_loss": math.nan, "validation_f1": math.nan, "seconds": 30.0}
    if validated:
        row |= {"validation_loss": 0.5, "validation_f1": 0.7}
    return [{**row, "epoch": epoch, "train_loss": 1 / epoch} for epoch in range(1, epochs + 1)]


def lines_of(axis):
    return {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}


def test_curves_show_both_losses_and_f1_and_mark_the_kept_epoch(tmp_path):
    rows = history(5)
    losses, scores = visualize.curves(rows, best=4).axes
    assert lines_of(losses)["training"] == [row["train_loss"] for row in rows]
    assert lines_of(losses)["validation"] == [0.5] * 5 and [0.7] * 5 in lines_of(scores).values()
    assert set(losses.get_lines()[-1].get_xdata()) == {4}
    (losses,) = visualize.curves(history(40, validated=False)).axes
    assert list(lines_of(losses)) == ["training"]
    save_figure(tmp_path / "curves.png", visualize.curves(history(1), 1))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="a.png"):
        save_figure(tmp_path / "missing" / "a.png", losses.figure)


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
    x, y = roc.get_lines()[0].get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert (np.diff(x) * (y[1:] + y[:-1]) / 2).sum() == pytest.approx(area)
    recall, found = precision_recall.get_lines()[0].get_data()
    assert recall[-1] == 1 and found[-1] == pytest.approx(mask.mean()) and np.isfinite(found).all()


def test_a_line_chart_has_a_line_a_name_with_its_own_x_values_and_upright_marks():
    lines = {"one": ([0.5, 1.0], [0.2, 0.4]), "two": ([0, 1, 2], [3, 4, 5])}
    (axis,) = visualize.line_chart(lines, "minutes", "F1", {"a": 0.3, "b": 0.4}).axes
    one, two, *marks = axis.lines
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in (one, two)] == list(lines.values())
    assert [set(mark.get_xdata()) for mark in marks] == [{0.3}, {0.4}]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["one", "two", "a", "b"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("minutes", "F1")


def test_a_gallery_names_the_error_colours_and_heat_maps_their_range():
    figure = visualize.gallery([noise(20, 30, 3), noise(20, 30) > 9], ["a", "b"], colours=True)
    assert [axis.get_title() for axis in figure.axes] == ["a", "b"]
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["true positive", "false negative", "false positive"]
    figure = visualize.heat_maps(noise(20, 30, 3), "image", {"flat": np.zeros((4, 6)), "ramp": np.arange(101.0)[None]})
    assert [axis.get_title() for axis in figure.axes] == ["image", "flat\n0 to 0", "ramp\n1 to 99"]
    ramp = np.asarray(figure.axes[2].images[0].get_array(), int)[0].sum(axis=1)
    assert ramp[0] < ramp[50] < ramp[100]  # dark to light


def test_a_preview_is_the_image_and_the_image_with_outlines_cut_to_the_field_of_view():
    image, (fov, vessels) = np.full((900, 1400, 3), 90, np.uint8), np.zeros((2, 900, 1400), bool)
    fov[100:900, 200:1000], vessels[480:520] = True, True
    shown = visualize.preview(image, fov, vessels)
    side = shown.shape[0]
    assert shown.shape == (560, 1120, 3)
    assert (shown[:, :side] == 90).all()
    outlined = np.flatnonzero((shown[:, side + 50] == visualize.OUTLINE).all(axis=1))
    assert np.abs(outlined / side - [380 / 800, 420 / 800]).max() < 2 / side
