"""The segmenter: any photo at any size, into the network's frame and back."""

import cv2
import numpy as np
import pytest
import torch
from retina_seg.predict import Segmenter, find_checkpoint, tiled, working_diameter
from retina_seg.synthetic import draw_photo
from torch import nn

from retina_seg.fov import find_fov
from retina_seg.model import FastAttentionUNet, attention_unet, save_model
from retina_seg.utils import UserError

FOV_FRAME = {"kind": "fov", "fov_diameter": 90.0}


class Dark(nn.Module):
    """Says how dark a pixel is: logit 10 (0.5 - mean of the channels). No weights, so results are known by hand."""

    stride = 4
    receptive_field = 0

    def forward(self, x):
        return 10 * (0.5 - x.mean(dim=1, keepdim=True))


def small_network(seed: int = 0) -> FastAttentionUNet:
    """A fast network with drawn weights and running statistics, so that its answers vary over a photo."""
    torch.manual_seed(seed)
    network = FastAttentionUNet(width=4, deepest=8, fine=4, dropout=0.0)
    network.train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.rand(2, 3, 64, 64))
    return network.eval()


def fast_segmenter(**options) -> Segmenter:
    return Segmenter(small_network(), FOV_FRAME, precision="float32", device="cpu", **options)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return draw_photo(3, 128, 120).photo


@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (128, 120), (40, 700), (701, 35), (1, 1), (5, 3)])
@pytest.mark.parametrize("frame", [FOV_FRAME, {"kind": "squeeze", "size": [64, 64]}], ids=["fov", "squeeze"])
def test_the_answer_has_the_photos_size_and_is_a_probability(shape, frame):
    photo = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    probability = Segmenter(small_network(), frame, device="cpu")(photo)
    assert probability.shape == shape and probability.dtype == np.float32
    assert np.isfinite(probability).all() and probability.min() >= 0 and probability.max() <= 1


def test_the_network_is_fed_the_photo_itself_when_the_scale_fits(photo):
    diameter = {"kind": "fov", "fov_diameter": float(max(photo.shape))}
    fov = np.ones(photo.shape[:2], bool)
    probability = Segmenter(Dark(), diameter, device="cpu", precision="float32")(photo, fov)
    expected = 1 / (1 + np.exp(-10 * (0.5 - photo.mean(axis=2) / 255)))
    np.testing.assert_allclose(probability, expected, atol=1e-5)


def test_channels_reach_the_network_in_the_originals_order():
    class Blue(nn.Module):
        stride = 4

        def forward(self, x):
            return 20 * x[:, :1] - 10  # the first channel of BGR

    photo = np.zeros((16, 16, 3), np.uint8)
    photo[..., 2] = 255  # blue in RGB
    frame = {"kind": "squeeze", "size": [16, 16]}
    assert Segmenter(Blue(), frame, device="cpu")(photo, np.ones((16, 16), bool)).min() > 0.99
    assert Segmenter(Blue(), frame, device="cpu")(photo[..., ::-1].copy(), np.ones((16, 16), bool)).max() < 0.01


def test_outside_the_field_of_view_the_answer_is_zero(photo):
    fov = find_fov(photo)
    assert 0.3 < fov.mean() < 0.9
    segmenter = Segmenter(Dark(), {"kind": "squeeze", "size": [64, 64]}, device="cpu")
    assert segmenter(photo)[~fov].max() == 0
    assert segmenter(photo, everywhere=True)[~fov].min() > 0.5  # black is dark


def test_scaling_brings_thin_lines_back_to_their_place():
    photo = np.full((400, 400, 3), 200, np.uint8)
    photo[200:208, 40:360] = 20
    probability = Segmenter(Dark(), {"kind": "fov", "fov_diameter": 200.0}, device="cpu")(photo)
    assert probability[203, 100] > 0.9 and probability[150, 100] < 0.1
    assert 6 <= (probability[:, 200] > 0.5).sum() <= 10


@pytest.mark.parametrize("side", [128, 300])
def test_a_working_size_overrides_the_frame(photo, side):
    seen = []

    class Spy(Dark):
        def forward(self, x):
            seen.append(tuple(x.shape[-2:]))
            return super().forward(x)

    Segmenter(Spy(), FOV_FRAME, device="cpu", working_size=side)(photo, np.ones(photo.shape[:2], bool))
    assert max(seen[0]) == pytest.approx(side + 2 * 2 * Dark.stride, abs=4)  # and the dark surround, two strides wide


@pytest.mark.parametrize(
    ("diameter", "expected"), [(20, 100), (100, 100), (121, 110), (200, 141.42), (225, 150), (300, 150)]
)
def test_larger_photos_are_seen_half_way_up_to_a_bound(diameter, expected):
    frame = {"kind": "fov", "fov_diameter": 100.0}
    assert working_diameter(frame, diameter) == 100
    assert working_diameter({**frame, "largest_diameter": 150.0}, diameter) == pytest.approx(expected, abs=0.01)


def test_the_network_sees_larger_photos_larger():
    seen = []

    def look(photo):
        seen.append(int((photo.max(axis=2) > 0).any(axis=0).sum()))  # lit columns
        return np.zeros(photo.shape[:2], np.float32)

    frame = {"kind": "fov", "fov_diameter": 60.0, "largest_diameter": 120.0}
    for options in ({}, {"working_size": 70}):
        segmenter = Segmenter(Dark(), frame, device="cpu", **options)
        segmenter._forward = look
        for side in (50, 135, 400):
            segmenter(np.full((side, side, 3), 90, np.uint8))
    assert seen == [60, 90, 120, 70, 70, 70]


def test_a_black_photo_has_no_vessels():
    assert fast_segmenter()(np.zeros((64, 80, 3), np.uint8)).max() == 0


def test_a_photo_without_a_border_is_segmented_to_its_edges():
    photo = np.full((100, 100, 3), 180, np.uint8)
    photo[20:80, 0:4] = 10
    probability = Segmenter(Dark(), {"kind": "fov", "fov_diameter": 100.0}, device="cpu")(photo)
    assert probability[20:80, 1].min() > 0.9


def test_grey_photos_are_taken(photo):
    grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    segmenter = fast_segmenter()
    np.testing.assert_array_equal(segmenter(grey), segmenter(np.repeat(grey[..., None], 3, axis=2)))


@pytest.mark.parametrize("frame", [FOV_FRAME, {"kind": "fov", "fov_diameter": 60.0}], ids=["same scale", "scaled"])
def test_with_flips_a_turned_photo_gives_the_turned_answer(photo, frame):
    segmenter = Segmenter(small_network(), frame, precision="float32", device="cpu", flips=True)
    plain = Segmenter(small_network(), frame, precision="float32", device="cpu")
    answer = segmenter(photo)
    turned = np.ascontiguousarray(np.rot90(photo)[:, ::-1])
    np.testing.assert_allclose(segmenter(turned), np.rot90(answer)[:, ::-1], atol=3e-3)
    # and without flips it does not: the test could fail
    assert np.abs(plain(turned) - np.rot90(plain(photo))[:, ::-1]).max() > 0.01


def test_tiles_give_the_answer_of_the_whole_photo():
    photo = draw_photo(5, 660, 600).photo
    frame = {"kind": "fov", "fov_diameter": 600.0}
    whole = Segmenter(small_network(), frame, precision="float32", device="cpu", tile=4096)
    halo = whole.model.receptive_field
    tiles = Segmenter(small_network(), frame, precision="float32", device="cpu", tile=2 * halo + 160)
    calls = []
    tiles.network.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(tiles(photo), whole(photo), atol=1e-4)
    assert len(calls) > 3


def test_the_stated_receptive_field_is_no_smaller_than_the_real_one():
    network = small_network()
    reach = network.receptive_field
    side = 2 * ((reach + 40) // 8 * 8) + 8
    x = torch.rand(1, 3, side, side, requires_grad=True)
    middle = side // 2
    network(x)[0, 0, middle : middle + 8, middle : middle + 8].sum().backward()
    rows = torch.nonzero(x.grad.abs().sum(dim=(0, 1, 3))).flatten()
    assert middle - rows.min() <= reach and rows.max() - (middle + 7) <= reach


def test_tiled_covers_every_pixel_once_with_its_halo():
    photo = np.random.default_rng(1).integers(0, 255, (52, 36, 3), dtype=np.uint8)
    seen = tiled(lambda piece: piece[..., 0].astype(np.float32), photo, tile=16, halo=4, stride=4)
    np.testing.assert_array_equal(seen, photo[..., 0])


@pytest.mark.parametrize(
    "photo",
    [
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros(8, np.uint8),
        "photo.png",
    ],
)
def test_what_is_no_photo_is_refused(photo):
    with pytest.raises(ValueError, match="photo"):
        fast_segmenter()(photo)


def test_a_plain_state_dict_of_the_original_loads_with_its_frame(tmp_path):
    torch.manual_seed(1)
    network = attention_unet().eval()
    torch.save(network.state_dict(), tmp_path / "original.pth")
    segmenter = Segmenter.load(tmp_path / "original.pth", precision="float32", device="cpu")
    assert segmenter.frame == {"kind": "squeeze", "size": [512, 512]} and segmenter.threshold == 0.5
    photo = draw_photo(2, 64, 64).photo
    segmenter = Segmenter.load(tmp_path / "original.pth", precision="float32", device="cpu", working_size=64)
    x = torch.from_numpy(photo[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = torch.sigmoid(network(x))[0, 0].numpy()
    np.testing.assert_allclose(segmenter(photo, everywhere=True), expected, atol=1e-5)


def test_checkpoints_are_found_by_file_folder_or_name(tiny_run, tmp_path):
    assert find_checkpoint(tiny_run) == tiny_run / "checkpoint.pth"
    assert find_checkpoint(tiny_run / "last.pth") == tiny_run / "last.pth"
    with pytest.raises(UserError, match="no such checkpoint"):
        find_checkpoint("nobody")
    with pytest.raises(UserError, match="holds no checkpoint.pth"):
        find_checkpoint(tmp_path)


def test_a_frame_this_version_does_not_know_is_refused(tmp_path):
    save_model(tmp_path / "odd.pth", attention_unet(), "attention_unet", {}, frame={"kind": "spiral"})
    with pytest.raises(UserError, match="spiral"):
        Segmenter.load(tmp_path / "odd.pth")


def test_vessels_are_cut_at_the_threshold():
    photo = np.full((32, 32, 3), 128, np.uint8)  # p = 0.495
    frame = {"kind": "squeeze", "size": [32, 32]}
    fov = np.ones((32, 32), bool)
    assert not Segmenter(Dark(), frame, threshold=0.5, device="cpu").vessels(photo, fov).any()
    assert Segmenter(Dark(), frame, threshold=0.4, device="cpu").vessels(photo, fov).all()
