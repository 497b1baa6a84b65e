"""Tensors, the working frames and back, padding, and augmentation that moves image and mask together."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import noise

from retina_seg.transforms import (
    Augmentation,
    FovFrame,
    Placement,
    ResizeFrame,
    augment_colour,
    augment_geometry,
    frame_from_dict,
    mask_to_tensor,
    normalise,
    pad_to_stride,
    to_tensor,
)
from retina_seg.utils import UserError

STILL = Augmentation(**{**dict.fromkeys(Augmentation.__dataclass_fields__, 0), "flip": False})


def box_fov(shape, top, left, bottom, right):
    fov = np.zeros(shape, bool)
    fov[top:bottom, left:right] = True
    return fov


def test_tensors_are_bgr_in_nought_to_one():
    red = np.full((2, 3, 3), [255, 0, 0], np.uint8)
    red[0, 0, 0] = 51
    tensor = to_tensor(red)
    assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == ((3, 2, 3), torch.float32, True)
    assert tensor.amax(dim=(1, 2)).tolist() == [0, 0, 1] and tensor[2, 0, 0].item() == pytest.approx(0.2)
    mask = mask_to_tensor(np.array([[0, 51, 255]], np.uint8))
    assert mask.shape == (1, 1, 3) and mask[0, 0].tolist() == pytest.approx([0, 0.2, 1])


@pytest.mark.parametrize("share", [0.5, 0.96, 0.975, 1.0, 1.025, 1.04, 2.0])
def test_a_field_of_view_is_cut_out_and_scaled_as_cv2_does(share):
    image, mask, fov = noise(150, 130, 3), noise(150, 130), box_fov((150, 130), 20, 10, 120, 100)
    place = FovFrame(100 * share).place(fov)
    cut, mask_cut, size = image[20:120, 10:100], mask[20:120, 10:100], (round(90 * share), round(100 * share))
    if abs(share - 1) <= 0.03:  # nothing is interpolated
        assert np.array_equal(place.enter(image), cut) and np.array_equal(place.enter_mask(mask), mask_cut)
        return
    how, mask_how = (cv2.INTER_AREA,) * 2 if share < 1 else (cv2.INTER_CUBIC, cv2.INTER_LINEAR)
    assert np.array_equal(place.enter(image), cv2.resize(cut, size, interpolation=how))
    assert np.array_equal(place.enter_mask(mask), cv2.resize(mask_cut, size, interpolation=mask_how))
    logits = np.random.default_rng(0).normal(size=size[::-1]).astype(np.float32)
    expected = np.zeros((150, 130), np.float32)
    expected[20:120, 10:100] = 1 / (1 + np.exp(-cv2.resize(logits, (90, 100))))
    np.testing.assert_allclose(place.leave(logits, (150, 130)), expected, atol=1e-6)


def test_the_whole_image_is_resized_without_its_aspect_ratio():
    image, mask = noise(60, 90, 3), noise(60, 90)
    place = ResizeFrame(32, 48).place(box_fov((60, 90), 20, 20, 30, 30))
    assert np.array_equal(place.enter(image), cv2.resize(image, (48, 32)))
    assert np.array_equal(place.enter_mask(mask), cv2.resize(mask, (48, 32)))
    assert place.leave(np.zeros((32, 48), np.float32), (60, 90)).tolist() == [[0.5] * 90] * 60
    assert ResizeFrame().place(np.ones((9, 7), bool)).size == (512, 512)


@pytest.mark.parametrize("frame", [ResizeFrame(200, 160), FovFrame(130), FovFrame(80, 110.0), FovFrame(101)])
def test_what_enters_leaves_where_it_was(frame):
    y, x = np.mgrid[0:150, 0:130]
    wave, fov = (127 + 90 * np.sin(y / 19) * np.cos(x / 23)).astype(np.uint8), box_fov((150, 130), 20, 10, 120, 100)
    place, inside = frame.place(fov), fov if isinstance(frame, FovFrame) else np.ones_like(fov)
    back = place.leave(place.enter(wave).astype(np.float32) / 32 - 4, fov.shape)
    assert np.abs(back - 1 / (1 + np.exp(4 - wave / 32.0)))[inside].max() < 0.03 and not back[~inside].any()


def test_larger_fields_of_view_keep_the_cube_root_of_their_ratio():
    frame = FovFrame(100, 150.0)
    diameters = {50: 100, 100: 100, 172.8: 120, 274.4: 140, 400: 150}  # 1.2 and 1.4 times 100, up to 150
    assert {diameter: frame.working_diameter(diameter) for diameter in diameters} == pytest.approx(diameters)
    assert frame.place(box_fov((400, 300), 0, 0, 343, 200)).size == (150, 87)
    assert FovFrame(100).working_diameter(400) == 100
    assert FovFrame(100).place(np.zeros((50, 60), bool)) == Placement((0, 0, 50, 60), (83, 100), cv2.INTER_CUBIC)


@pytest.mark.parametrize("gain, shift", [(1.0, 0), (0.2, 0), (0.5, 90), (0.6, 3)])
def test_light_haze_and_tint_are_normalised_away_inside_the_field_of_view(gain, shift):
    rng, fov = np.random.default_rng(0), box_fov((40, 50), 4, 6, 36, 44)
    scene = rng.normal([120, 90, 60], [25, 20, 15], (40, 50, 3)).clip(20, 200)
    seen = np.rint(scene * gain * [1.0, 0.9, 0.7] + shift).astype(np.uint8)
    image = normalise(seen, fov)
    assert image.dtype == np.uint8 and not image[~fov].any()
    assert np.allclose(image[fov].mean(axis=0), 128, atol=1) and np.allclose(image[fov].std(axis=0), 32, atol=1)
    expected = 128 + 32 * (scene - scene[fov].mean(axis=0)) / scene[fov].std(axis=0)
    assert np.abs(image - expected)[fov].mean() < 4  # what rounding leaves


def test_a_channel_without_contrast_is_grey_and_the_frame_normalises_before_it_scales():
    fov, image = box_fov((40, 50), 4, 6, 36, 44), noise(40, 50, 3)
    image[..., 2] = 0
    assert (normalise(image, fov)[fov][:, 2] == 128).all()
    placement = FovFrame(20, normalise=True).place(fov)
    expected = FovFrame(20).place(fov).enter(normalise(image, fov))
    assert np.array_equal(placement.enter(image), expected) and expected.any()
    black = np.zeros_like(image)
    assert not FovFrame(20, normalise=True).place(np.zeros((40, 50), bool)).enter(black).any()


def test_frames_travel_as_plain_values_and_nonsense_is_refused():
    for frame in (ResizeFrame(64, 96), FovFrame(720.0), FovFrame(720.0, 1080.0)):
        assert frame_from_dict(frame.to_dict()) == frame
    assert frame_from_dict({"kind": "squeeze", "size": [64, 96]}) == ResizeFrame(64, 96)  # of earlier versions
    assert ResizeFrame(64, 96).with_size(32) == ResizeFrame(32, 32)
    assert FovFrame(720, 1080.0).with_size(32) == FovFrame(32)
    odd = [{"kind": "resize", "size": size} for size in ([64], [0, 64], [64, 9000], ["a", "b"], [64.0, 64.0], None)]
    for least, largest in ((0, None), (9000, None), ("a", None), (np.nan, None), (90, 80), (90, np.nan), (90, "a")):
        odd.append({"kind": "fov", "fov_diameter": least, "largest_diameter": largest})
    for value in (*odd, "resize", {}, {"kind": "other"}):
        with pytest.raises(ValueError, match="none this version knows"):
            frame_from_dict(value)


@pytest.mark.parametrize(("side", "margin", "padded"), [(16, 0, 16), (17, 0, 24), (3, 0, 16), (17, 2, 56), (16, 2, 48)])
def test_padding_is_black_to_a_multiple_of_the_stride(side, margin, padded):
    image = noise(side, 24, 3) | 1
    result, inside = pad_to_stride(image, 8, margin)
    assert result.shape == (padded, 24 + 16 * margin, 3) and np.array_equal(result[inside], image)
    assert (result > 0).sum() == image.size and inside[0].start == 8 * margin
    assert pad_to_stride(image[..., 0], 8, margin)[0].shape == result.shape[:2]


def test_changes_to_the_augmentation_are_checked():
    assert Augmentation.changed({"scale": 0.25, "bend": 0}) == replace(Augmentation(), scale=0.25, bend=0)
    for name, value in {"tomorrow": 1, "noise": -1, "rotate": "far", "blur": float("nan"), "grey": None}.items():
        with pytest.raises(UserError, match=f"--augmentation {name}"):
            Augmentation.changed({name: value})


def smooth(side=128):
    """An image of soft blobs that fades to black at its edges: two interpolations of it hardly differ."""
    values = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(side, side, 3)), (0, 0), 4)
    fade = np.sqrt(np.outer(np.hanning(side), np.hanning(side)))[..., None]
    return np.clip((128 + values * 70 / values.std()) * fade, 0, 255).astype(np.uint8)


STEPS = ({"exact": 1, "flip": True}, {"rotate": 180}, {"flip": True}, {"scale": 0.2}, {"stretch": 0.2}, {"bend": 4})


@pytest.mark.parametrize("how", [*(replace(STILL, **step) for step in STEPS), Augmentation()])
def test_image_and_mask_move_together_and_every_step_moves_something(how):
    image, moved = smooth(), []
    for seed in range(8):
        still, _ = augment_geometry(image, image[..., 1], 90, STILL, np.random.default_rng(seed))
        patch, mask = augment_geometry(image, image[..., 1].copy(), 90, how, np.random.default_rng(seed))
        assert (patch.shape, patch.dtype, mask.shape, mask.dtype) == ((90, 90, 3), np.uint8, (90, 90), np.uint8)
        apart = np.abs(patch[..., 1].astype(int) - mask)
        assert apart.mean() < 1 and apart.max() <= 12
        assert np.abs(patch[:, ::-1, 1].astype(int) - mask).mean() > 5  # a mask left behind would show
        moved.append(np.abs(still.astype(int) - patch).mean())
    assert max(moved) > 5


@pytest.mark.parametrize(("height", "width", "size"), [(60, 80, 32), (60, 80, 33), (31, 30, 47)])
@pytest.mark.parametrize("flip", [True, False])
def test_exact_draws_keep_every_pixel_in_all_eight_positions(height, width, size, flip):
    y, x = np.mgrid[1 : height + 1, 1 : width + 1]
    image = np.stack([y, x, np.full_like(x, 9)], axis=2).astype(np.uint8)  # a pixel says where it is from
    padded, seen, how = np.pad(image, [(size, size), (size, size), (0, 0)]), [], Augmentation(exact=1, flip=flip)
    for seed in range(60):
        patch, mask = augment_geometry(image, image[..., 1], size, how, np.random.default_rng(seed))
        assert np.array_equal(patch[..., 1], mask)
        for position in range(8):
            view = np.rot90(patch[:, ::-1] if position > 3 else patch, position % 4)
            row, column = np.argwhere(view[..., 2] > 0)[0]
            top, left = view[row, column, 0] - 1 - row + size, view[row, column, 1] - 1 - column + size
            if np.array_equal(padded[top : top + size, left : left + size], view):
                seen.append(position)
    assert len(seen) == 60 and set(seen) == set(range(8 if flip else 4))


def test_beyond_the_image_a_patch_is_black():
    white = np.full((20, 20, 3), 255, np.uint8)
    for how in (STILL, replace(STILL, exact=1), replace(STILL, bend=1)):
        patch, mask = augment_geometry(white, white[..., 0], 64, how, np.random.default_rng(0))
        assert not any(part.any() for part in (patch[:8, :8], patch[-8:, -8:], mask[:8, :8], mask[-8:, -8:]))
        assert (patch[28:36, 28:36] == 255).all()


COLOURS = {"gamma": 0.3, "contrast": 0.3, "light": 0.3, "cast": 0.3, "grey": 0.8, "shade": 0.3, "blur": 2, "noise": 0.1}


@pytest.mark.parametrize("step", [*COLOURS, "all"])
def test_every_colour_step_changes_what_is_lit_within_the_range(step):
    image = smooth().astype(np.float32) / 255
    image[:30] = 0
    how = Augmentation(**{**COLOURS, "gamma": 0.8}) if step == "all" else replace(STILL, **{step: COLOURS[step]})
    moved = []
    for seed in range(12):
        changed = augment_colour(image, how, np.random.default_rng(seed))
        assert (changed.shape, changed.dtype) == (image.shape, np.float32)
        assert 0 <= changed.min() < changed.max() <= 1
        assert changed[:20].mean() < (0.06 if step in ("noise", "all") else 1e-6)  # black stays black
        moved.append(np.abs(changed - image).mean())
    assert max(moved) > 0.01
    if step in ("blur", "noise"):  # these in half of the draws
        assert 2 <= sum(change < 1e-6 for change in moved) <= 10


def test_with_every_step_off_colours_stay_and_black_passes_through_all():
    image, black = smooth().astype(np.float32) / 255, np.zeros((9, 7, 3), np.float32)
    for seed in range(4):
        np.testing.assert_allclose(augment_colour(image, STILL, np.random.default_rng(seed)), image, atol=1e-6)
        assert not augment_colour(black, Augmentation(noise=0), np.random.default_rng(seed)).any()
