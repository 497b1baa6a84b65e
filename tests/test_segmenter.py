"""The segmenter: any image at any size, into the network's frame and back."""

import numpy as np
import pytest
import torch
from torch import nn

from retina_seg.checkpoint import save_model
from retina_seg.fov import find_discs, find_fov
from retina_seg.inference.segmenter import Segmenter, tiled
from retina_seg.model import FastAttentionUNet, attention_unet, build_model
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.transforms import FovFrame, ResizeFrame
from retina_seg.utils import UserError


class Dark(nn.Module):
    """Logit 10 (level - mean of the channels): how dark a pixel is. No weights, so results are known by hand."""

    stride = 4
    receptive_field = 0
    level = 0.5

    def forward(self, x):
        self.input = x
        return 10 * (self.level - x.mean(dim=1, keepdim=True))


def small_network() -> FastAttentionUNet:
    """A fast network with random weights and running statistics, so that its predictions vary over an image."""
    torch.manual_seed(0)
    network = FastAttentionUNet(width=4, deepest=8, fine=4, dropout=0.0).train()
    with torch.no_grad():
        for _ in range(20):
            network(torch.rand(2, 3, 64, 64))
    return network.eval()


def small_segmenter(frame=FovFrame(90.0), **options) -> Segmenter:  # noqa: B008
    return Segmenter(small_network(), frame, precision="float32", device="cpu", engine="torch", **options)


def dark_segmenter(frame=ResizeFrame(), **options) -> Segmenter:  # noqa: B008
    return Segmenter(Dark(), frame, precision="float32", device="cpu", **options)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return synthetic_image(3, 128, 120).image


@pytest.mark.parametrize("shape", [(33, 47), (128, 120), (40, 700), (701, 35), (1, 1)])
@pytest.mark.parametrize("frame", [FovFrame(90.0), ResizeFrame(64, 64)], ids=["fov", "resize"])
def test_the_prediction_has_the_images_size_and_is_a_probability(shape, frame):
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    probability = Segmenter(small_network(), frame, device="cpu")(image)
    assert probability.shape == shape and probability.dtype == np.float32
    assert np.isfinite(probability).all() and probability.min() >= 0 and probability.max() <= 1


def test_the_network_is_fed_the_image_itself_where_the_scale_fits(image):
    probability = dark_segmenter(FovFrame(float(max(image.shape))))(image, np.ones(image.shape[:2], bool))
    np.testing.assert_allclose(probability, 1 / (1 + np.exp(10 * (image.mean(axis=2) / 255 - 0.5))), atol=1e-5)


@pytest.mark.parametrize("frame", [FovFrame(90.0), ResizeFrame(64, 64)], ids=["fov", "resize"])
def test_outside_the_field_of_view_the_prediction_is_zero_unless_asked_for(image, frame):
    fov = find_fov(image)
    assert 0.3 < fov.mean() < 0.9
    segmenter = dark_segmenter(frame)
    assert segmenter(image)[~fov].max() == 0 < segmenter(image)[fov].max()
    corner = np.zeros_like(fov)
    corner[:40, :40] = True  # dark, as the surround is
    assert segmenter(image, corner)[~corner].max() == 0 and segmenter(image, corner)[corner].max() > 0.5
    assert dark_segmenter(ResizeFrame(64, 64))(image, everywhere=True)[~fov].min() > 0.5
    assert segmenter(np.zeros((64, 80, 3), np.uint8)).max() == 0  # a black image has no field of view


def test_each_disc_of_a_sheet_is_segmented_on_its_own():
    y, x = np.mgrid[:120, :260]
    left, right = ((x - middle) ** 2 + (y - 60) ** 2 <= 50**2 for middle in (65, 195))
    sheet = np.where((left | right)[..., None], (x % 60)[..., None] + np.array([120, 60, 20]), 2).astype(np.uint8)
    segmenter = small_segmenter()
    calls = []
    segmenter.network.module.register_forward_hook(lambda *_: calls.append(1))
    probability = segmenter(sheet)
    assert len(calls) == 2
    discs = find_discs(sheet)
    for disc, alone in zip(discs, (segmenter(sheet, disc) for disc in discs), strict=True):
        np.testing.assert_array_equal(probability[disc], alone[disc])
    assert probability[~find_fov(sheet)].max() == 0


def test_scaling_brings_thin_lines_back_to_their_place():
    image = np.full((400, 400, 3), 200, np.uint8)
    image[200:208, 40:360] = 20
    segmenter = dark_segmenter(FovFrame(200.0))
    probability = segmenter(image)
    assert probability[203, 100] > 0.9 and probability[150, 100] < 0.1
    assert 6 <= (probability[:, 200] > 0.5).sum() <= 10
    segmenter.network.module.register_forward_hook(lambda _, __, logits: logits * np.inf)
    assert np.isfinite(segmenter(image)).all()  # clamped before they are interpolated


def test_an_image_without_a_border_is_segmented_to_its_edges():
    image = np.full((100, 100, 3), 180, np.uint8)
    image[20:80, 0:4] = 10
    assert dark_segmenter(FovFrame(100.0))(image)[20:80, 1].min() > 0.9


@pytest.mark.parametrize(
    ("frame", "side", "expected"),
    [
        (FovFrame(90.0), 128, 128 + 2 * 2 * Dark.stride),  # and the dark surround, two strides wide
        (FovFrame(60.0, 120.0), 300, 300 + 2 * 2 * Dark.stride),
        (ResizeFrame(64, 64), 300, 300),
    ],
)
def test_a_working_size_overrides_the_frame(image, frame, side, expected):
    segmenter = dark_segmenter(frame, working_size=side)
    segmenter(image, np.ones(image.shape[:2], bool))
    assert max(segmenter.network.module.input.shape) == pytest.approx(expected, abs=4)


def test_larger_images_are_seen_larger_up_to_a_bound():
    segmenter = dark_segmenter(FovFrame(60.0, 80.0))
    widths = []
    for side in (50, 117, 400):
        segmenter(np.full((side, side, 3), 90, np.uint8))
        widths.append(int((segmenter.network.module.input > 0).any(dim=1).any(dim=1).sum()))  # lit columns
    assert widths == [60, 75, 80]


def test_grey_images_are_taken(image):
    grey = image[..., 0]
    segmenter = small_segmenter()
    np.testing.assert_array_equal(segmenter(grey), segmenter(np.repeat(grey[..., None], 3, axis=2)))


@pytest.mark.parametrize("frame", [FovFrame(90.0), FovFrame(60.0)], ids=["same scale", "scaled"])
def test_with_tta_a_rotated_image_gives_the_rotated_prediction(image, frame):
    plain, augmented = small_segmenter(frame), small_segmenter(frame, tta=True)
    rotated = np.ascontiguousarray(np.rot90(image)[:, ::-1])
    np.testing.assert_allclose(augmented(rotated), np.rot90(augmented(image))[:, ::-1], atol=3e-3)
    # and without it does not: the test could fail
    assert np.abs(plain(rotated) - np.rot90(plain(image))[:, ::-1]).max() > 0.01


def test_tiles_give_the_prediction_of_the_whole_image():
    image = synthetic_image(5, 660, 600).image
    whole = small_segmenter(FovFrame(600.0), tile=4096)
    tiles = small_segmenter(FovFrame(600.0), tile=2 * whole.model.receptive_field + 160)
    calls = []
    tiles.network.module.register_forward_hook(lambda *_: calls.append(1))
    np.testing.assert_allclose(tiles(image), whole(image), atol=1e-4)
    assert len(calls) > 3


def test_the_stated_receptive_field_is_no_smaller_than_the_real_one():
    network = small_network()
    reach = network.receptive_field
    middle = (reach + 40) // 8 * 8 + 4
    x = torch.rand(1, 3, 2 * middle, 2 * middle, requires_grad=True)
    network(x)[0, 0, middle : middle + 8, middle : middle + 8].sum().backward()
    rows = torch.nonzero(x.grad.abs().sum(dim=(0, 1, 3))).flatten()
    assert middle - rows.min() <= reach and rows.max() - (middle + 7) <= reach


def test_tiled_covers_every_pixel_once_with_its_halo():
    image = np.random.default_rng(1).integers(0, 255, (52, 36, 3), dtype=np.uint8)
    result = tiled(lambda part: part[..., 1].astype(np.float32), image, tile=16, halo=4, stride=4)
    np.testing.assert_array_equal(result, image[..., 1])


@pytest.mark.parametrize("shape", [(8, 8, 5), (0, 8, 3), (8,), None])
def test_what_is_no_image_is_refused(shape):
    image = np.zeros((8, 8, 3), bool) if shape is None else np.zeros(shape, np.uint8)
    with pytest.raises(ValueError, match="image"):
        dark_segmenter()(image)
    with pytest.raises(ValueError, match="got None: cv2.imread gives None .* retina_seg.images.read_image"):
        dark_segmenter()(None)


def test_a_field_of_view_of_another_shape_or_dtype_is_refused(image):
    for fov in (np.ones((4, 4), bool), np.ones(image.shape[:2], np.uint8)):
        with pytest.raises(ValueError, match="fov must be bool"):
            dark_segmenter()(image, fov)


def test_a_plain_state_dict_of_the_original_loads_with_its_frame(tmp_path):
    torch.manual_seed(1)
    network = attention_unet().eval()
    torch.save(network.state_dict(), tmp_path / "original.pth")
    segmenter = Segmenter.load(tmp_path / "original.pth", precision="float32", device="cpu")
    assert segmenter.frame == ResizeFrame(512, 512) and segmenter.threshold == 0.5
    image = synthetic_image(2, 64, 64).image
    segmenter = Segmenter.load(tmp_path / "original.pth", precision="float32", device="cpu", working_size=64)
    x = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        expected = torch.sigmoid(network(x))[0, 0].numpy()
    np.testing.assert_allclose(segmenter(image, everywhere=True), expected, atol=1e-5)


def test_a_checkpoints_frame_and_threshold_are_its_segmenters(tmp_path):
    path = tmp_path / "odd.pth"
    for frame in (ResizeFrame(48, 64), FovFrame(70.0, 90.0)):
        save_model(path, attention_unet(), "attention_unet", {}, frame=frame.to_dict(), threshold=0.3)
        assert Segmenter.load(path).frame == frame and Segmenter.load(path).threshold == 0.3
        assert Segmenter.load(path, threshold=0.6).threshold == 0.6
    for notes, said in (({"frame": {"kind": "spiral"}}, "spiral"), ({"threshold": "high"}, "threshold high")):
        save_model(path, attention_unet(), "attention_unet", {}, **notes)
        with pytest.raises(UserError, match=f"odd.pth: its .*{said}"):
            Segmenter.load(path)
    assert Segmenter.load().frame == Segmenter.load("general").frame != ResizeFrame()


def test_vessels_are_cut_at_the_threshold():
    image = np.full((32, 32, 3), 128, np.uint8)  # probability 0.495
    fov = np.ones((32, 32), bool)
    assert not dark_segmenter(ResizeFrame(32, 32), threshold=0.5).vessels(image, fov).any()
    assert dark_segmenter(ResizeFrame(32, 32), threshold=0.4).vessels(image, fov).all()
    for option, value in (("threshold", 1.0), ("working_size", 31)):
        with pytest.raises(UserError, match=f"--{option.replace('_', '-')} {value}"):
            dark_segmenter(**{option: value})


def test_the_automatic_style_goes_by_the_diameter_of_the_field_of_view(tmp_path):
    torch.manual_seed(0)
    arguments = {"width": 4, "deepest": 4, "fine": 4, "styles": 2}
    model, frame = build_model("fast_attention_unet", **arguments), FovFrame(64.0).to_dict()
    styles = {"fine": [1.0, 0.0], "bold": [0.0, 1.0], "balanced": [0.5, 0.5]}
    save_model(tmp_path / "w.pth", model, "fast_attention_unet", arguments, frame=frame, styles=styles, style="auto")
    load, image = Segmenter.load, np.full((840, 840, 3), 90, np.uint8)
    for side, style in ((780, "fine"), (820, "balanced")):
        fov = np.zeros((840, 840), bool)
        fov[10 : 10 + side, 10 : 10 + side] = True  # its diameter is the side of its box
        names = (None, "auto", "fine", "balanced")
        results = {name: load(tmp_path / "w.pth", style=name)(image, fov) for name in names}
        assert np.array_equal(results[None], results["auto"])
        assert [n for n in ("fine", "balanced") if np.abs(results[n] - results["auto"]).max() < 1e-6] == [style]
