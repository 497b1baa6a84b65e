"""Strips, overlays, sheets and curves: their geometry and colours by hand, their files by their signature."""

import math

import numpy as np
import pytest

from retina_seg.metrics import RankingHistogram
from retina_seg.utils import UserError
from retina_seg.visualize import (
    INVENTED,
    MISSED,
    RIGHT,
    contact_sheet,
    curves,
    error_overlay,
    mask_parse,
    new_figure,
    progress_chart,
    ranking_curves,
    save_curves,
    save_figure,
    shrink,
    strip,
    vessel_overlay,
)

PNG = b"\x89PNG\r\n\x1a\n"


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_mask_parse_repeats_the_grey_value_in_three_channels():
    mask = noise(3, 5)
    parsed = mask_parse(mask)
    assert parsed.shape == (3, 5, 3)
    assert all(np.array_equal(parsed[..., channel], mask) for channel in range(3))


def test_the_strip_has_the_originals_geometry():
    photo, mask, prediction = noise(7, 5, 3), noise(7, 5, seed=1), noise(7, 5, seed=2)
    picture = strip(photo, mask, prediction)
    assert (picture.shape, picture.dtype) == ((7, 3 * 5 + 20, 3), np.uint8)
    assert np.array_equal(picture[:, :5], photo)
    assert (picture[:, 5:15] == 128).all()
    assert np.array_equal(picture[:, 15:20], mask_parse(mask))
    assert (picture[:, 20:30] == 128).all()
    assert np.array_equal(picture[:, 30:], mask_parse(prediction))


def test_four_pixels_have_the_four_colours_of_an_error_overlay():
    photo = np.full((2, 2, 3), 100, np.uint8)
    mask = np.array([[True, True], [False, False]])
    prediction = np.array([[True, False], [True, False]])
    picture = error_overlay(photo, mask, prediction)
    assert picture.dtype == np.uint8
    assert [tuple(pixel) for pixel in picture.reshape(4, 3)] == [RIGHT, MISSED, INVENTED, (50, 50, 50)]
    # green, blue, red: the largest channel says which
    assert [int(np.argmax(colour)) for colour in (RIGHT, MISSED, INVENTED)] == [1, 2, 0]


def test_outside_the_field_of_view_nothing_is_coloured():
    photo = noise(4, 6, 3)
    everywhere, nowhere = np.ones((4, 6), bool), np.zeros((4, 6), bool)
    fov = np.zeros((4, 6), bool)
    fov[1, 2:4] = True
    picture = error_overlay(photo, nowhere, everywhere, fov)
    plain = error_overlay(photo, nowhere, nowhere)
    assert (picture[fov] == INVENTED).all()
    assert np.array_equal(picture[~fov], plain[~fov])
    assert (plain[..., 0] == plain[..., 1]).all()


def test_overlays_leave_their_photo_as_it_was():
    photo, vessels = noise(4, 6, 3), noise(4, 6) > 127
    before = photo.copy()
    error_overlay(photo, vessels, ~vessels)
    vessel_overlay(photo, vessels)
    assert np.array_equal(photo, before)


def test_the_vessel_overlay_tints_vessels_by_its_opacity_and_nothing_else():
    photo = np.full((1, 3, 3), 100, np.uint8)
    vessels = np.array([[True, False, True]])
    assert np.array_equal(vessel_overlay(photo, vessels, 0), photo)
    assert vessel_overlay(photo, vessels, 1)[0].tolist() == [[0, 255, 120], [100, 100, 100], [0, 255, 120]]
    red, green, blue = vessel_overlay(photo, vessels)[0, 0].tolist()
    assert (red, green) == (40, 193)
    assert blue == pytest.approx(112, abs=1)


def test_shrink_keeps_the_shape_and_never_enlarges():
    assert shrink(noise(100, 200, 3), 50).shape == (25, 50, 3)
    assert shrink(noise(100, 200), 50).shape == (25, 50)
    assert shrink(noise(1, 200, 3), 50).shape == (1, 50, 3)
    small = noise(10, 20, 3)
    assert shrink(small, 20) is small
    assert shrink(small, 500) is small


@pytest.mark.parametrize(("count", "columns", "rows", "across"), [(1, 4, 1, 1), (5, 2, 3, 2), (4, 4, 1, 4)])
def test_a_contact_sheet_of_mixed_sizes_has_a_tile_for_each(count, columns, rows, across):
    shapes = [(60, 90), (200, 40), (30, 300), (64, 64), (20, 20)][:count]
    pictures = [np.full((*shape, 3), 10 + 20 * i, np.uint8) for i, shape in enumerate(shapes)]
    sheet = contact_sheet(pictures, [f"photo {i}" for i in range(count)], columns=columns, width=64)
    tallest = max(round(height * min(1, 64 / width)) for height, width in shapes)
    tile = tallest + 24
    # a lone tile comes without the 6 px of margin around each
    expected = (tile, 64, 3) if count == 1 else (rows * (tile + 6) + 6, across * (64 + 6) + 6, 3)
    assert (sheet.shape, sheet.dtype) == (expected, np.uint8)
    margin = 0 if count == 1 else 6
    for i in range(count):
        top, left = margin + i // across * (tile + 6), margin + i % across * (64 + 6)
        caption, first = sheet[top : top + 24, left : left + 64], sheet[top + 24, left]
        assert caption.min() < 128  # something is written
        assert (first == 10 + 20 * i).all()


def test_a_contact_sheet_needs_a_caption_a_picture():
    with pytest.raises(ValueError, match="zip"):
        contact_sheet([noise(4, 4, 3)], ["a", "b"])


# -------------------------------------------------------------------------------------------------------------- figures


def history(epochs, validated=True):
    unknown = math.nan
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "validation_loss": 1.1 / epoch if validated else unknown,
            "validation_f1": 1 - 1 / (epoch + 1) if validated else unknown,
        }
        for epoch in range(1, epochs + 1)
    ]


def drawn_lines(axis):
    return {line.get_label(): line.get_ydata() for line in axis.get_lines()}


def test_curves_draw_both_losses_and_f1_and_mark_the_kept_epoch():
    rows = history(5)
    losses, scores = curves(rows, best=4).axes
    assert list(drawn_lines(losses)["training"]) == [row["train_loss"] for row in rows]
    assert list(drawn_lines(losses)["validation"]) == [row["validation_loss"] for row in rows]
    assert set(losses.get_lines()[-1].get_xdata()) == {4}
    assert any(list(line.get_ydata()) == [row["validation_f1"] for row in rows] for line in scores.get_lines())


def test_curves_without_validation_are_one_picture():
    (losses,) = curves(history(3, validated=False)).axes
    assert list(drawn_lines(losses)) == ["training"]


@pytest.mark.parametrize("epochs", [1, 40])
@pytest.mark.parametrize("validated", [True, False])
def test_curves_of_any_length_are_saved_as_png(tmp_path, epochs, validated):
    path = tmp_path / "curves.png"
    save_curves(path, history(epochs, validated), best=1)
    assert path.read_bytes()[:8] == PNG
    assert [found.name for found in tmp_path.iterdir()] == ["curves.png"]


def test_ranking_curves_draw_a_line_a_region_with_its_scores(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.random(5000) < 0.2
    ranking = RankingHistogram()
    ranking.add(label, np.clip(0.4 * label + 0.6 * rng.random(5000), 0, 1))
    figure = ranking_curves({"fov": ranking, "frame": ranking, "no vessel": RankingHistogram()})
    roc, precision_recall = figure.axes
    regions = ("field of view", "whole frame")
    assert list(drawn_lines(roc)) == [f"{region}, AUC {ranking.auc():.4f}" for region in regions]
    score = ranking.average_precision()
    assert list(drawn_lines(precision_recall)) == [f"{r}, average precision {score:.4f}" for r in regions]
    for axis in (roc, precision_recall):
        for line in axis.get_lines():
            assert all(value.min() >= 0 and value.max() <= 1 for value in line.get_data())
    x, y = roc.get_lines()[0].get_data()
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
    assert area == pytest.approx(ranking.auc(), abs=0.01)
    save_figure(tmp_path / "roc.png", figure)
    assert (tmp_path / "roc.png").read_bytes()[:8] == PNG


def test_ranking_curves_of_nothing_to_rank_are_empty_axes(tmp_path):
    figure = ranking_curves({"fov": RankingHistogram()})
    assert all(not axis.get_lines() for axis in figure.axes)
    save_figure(tmp_path / "roc.png", figure)


def test_figures_leave_matplotlibs_global_state_alone():
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    figure, axes = new_figure(3)
    curves(history(2))
    assert len(axes) == len(figure.axes) == 3
    assert pyplot.get_fignums() == before


def test_a_figure_that_cannot_be_saved_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="a.png"):
        save_figure(tmp_path / "missing" / "a.png", new_figure()[0])
    assert list(tmp_path.iterdir()) == []


def test_progress_is_drawn_over_minutes_with_its_goal_and_its_range():
    history = [{"seconds": 30.0, "validation_f1": value} for value in (0.6, 0.7, 0.8)]
    (axis,) = progress_chart({"one": history}).axes
    (line,) = axis.lines
    assert line.get_xdata() == pytest.approx([0.5, 1.0, 1.5])
    assert list(line.get_ydata()) == [0.6, 0.7, 0.8]
    assert axis.get_ylim() == (0, 1)
    (axis,) = progress_chart({"one": history}, goal=0.77, lowest=0.65).axes
    assert axis.get_ylim()[0] == 0.65 and 0.8 <= axis.get_ylim()[1] < 0.9
    assert set(axis.lines[1].get_ydata()) == {0.77}
