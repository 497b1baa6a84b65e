"""The network as it is fastest to use against the network itself."""

import numpy as np
import pytest
import torch
from conftest import shaken
from torch import nn
from torch.nn import functional as F

from retina_seg.inference import engine
from retina_seg.inference.segmenter import Segmenter
from retina_seg.model import build_model
from retina_seg.transforms import ResizeFrame
from retina_seg.utils import UserError

CPU = torch.device("cpu")
MODELS = [("attention_unet", {}), ("fast_attention_unet", {}), ("fast_attention_unet", {"fine": 0})]


def network_of(name, **arguments):
    torch.manual_seed(0)
    return shaken(build_model(name, **arguments))


def count_fused(network):
    return sum(isinstance(module, engine.FusedConv) for module in network.modules())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "arguments"), MODELS)
def test_the_inference_network_computes_the_same(name, arguments, precision):
    model = network_of(name, **arguments)
    network = engine.inference_network(model, CPU, precision)
    if precision == torch.float32 and torch.backends.mkldnn.is_available():
        assert count_fused(network) >= 8
        assert not {type(module) for module in network.modules()} & {nn.ReLU, nn.Sigmoid, nn.BatchNorm2d}
    x = torch.rand(2, 3, 48, 32).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(x)
        limit = (1e-4 if precision == torch.float32 else 0.1) * float(expected.abs().max())
        given = x.to(precision, copy=True)
        for _ in range(2):  # results are written into tensors no longer needed, and the image is none of these
            torch.testing.assert_close(network(given).float(), expected, rtol=0, atol=limit)
        assert torch.equal(given, x.to(precision))


@pytest.mark.parametrize("operation", ["missing", "another"])
def test_where_torchs_operation_is_missing_or_another_nothing_is_fused(monkeypatch, operation):
    def forward(self, x):
        if operation == "missing":
            raise AttributeError("no such operation")
        return torch.conv2d(x, self.weight, self.bias, padding=self.settings[0])  # without the activation

    monkeypatch.setattr(engine.FusedConv, "forward", forward)
    assert count_fused(engine.inference_network(network_of("attention_unet"), CPU, torch.float32)) == 0


def test_nan_is_not_hidden_by_fusing():
    model = network_of("fast_attention_unet")
    nn.init.constant_(model.e1.conv1.weight, 3e38)  # finite, as `load_model` asks, but sums are not; a ReLU follows
    segmenter = Segmenter(model, ResizeFrame(64, 64), device="cpu", precision="float32")
    assert count_fused(segmenter.network) == 0
    with pytest.raises(UserError, match="NaN"):
        segmenter(np.full((64, 64, 3), 200, np.uint8), everywhere=True)


@pytest.mark.parametrize("name", ["attention_unet", "fast_attention_unet"])
def test_folded_batch_norm_computes_the_same_and_leaves_the_model_alone(name):
    model = network_of(name)
    with pytest.raises(ValueError, match="evaluation mode"):
        engine.fold_batch_norm(model.train())
    before = {key: value.clone() for key, value in model.eval().state_dict().items()}
    x = torch.rand(2, 3, 48, 32)
    with torch.inference_mode():
        expected, result = model(x), engine.fold_batch_norm(model)(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_shuffles_are_pixel_shuffles_of_reordered_channels(channels):
    small, large = torch.rand(2, 4 * channels, 3, 5), torch.rand(2, channels, 6, 10)
    order = engine.shuffle_order(4 * channels)
    assert torch.equal(engine.ChannelsLastShuffle()(small[:, order]), F.pixel_shuffle(small, 2))
    assert torch.equal(engine.ChannelsLastUnshuffle()(large), F.pixel_unshuffle(large, 2)[:, order])
