"""The networks as they are fastest to use against the networks themselves."""

import numpy as np
import pytest
import torch
from retina_seg.fused import FusedConv, RunShuffle, RunUnshuffle, _in_runs, fold_batch_norm, inference_network
from retina_seg.predict import Segmenter
from torch import nn
from torch.nn import functional as F

from retina_seg.model import build_model
from retina_seg.utils import UserError


def settled(name, **arguments):
    """A network in evaluation mode whose normalisation is no identity."""
    torch.manual_seed(0)
    model = build_model(name, **arguments)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        for values, low, high in ((norm.weight, 0.5, 2), (norm.bias, -1, 1), (norm.running_mean, -0.5, 0.5)):
            nn.init.uniform_(values, low, high)
        norm.running_var.uniform_(0.5, 2)
    return model.eval()


def joined(network):
    return sum(isinstance(module, FusedConv) for module in network.modules())


PROCESSOR = torch.device("cpu")
KINDS = [("attention_unet", {}), ("fast_attention_unet", {}), ("fast_attention_unet", {"fine": 0})]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "arguments"), KINDS)
def test_the_network_as_it_is_fastest_computes_the_same(name, arguments, precision):
    model = settled(name, **arguments)
    network = inference_network(model, PROCESSOR, precision)
    if precision == torch.float32 and torch.backends.mkldnn.is_available():
        assert joined(network) >= 8
        left = {type(module) for module in network.modules()}
        assert not left & {nn.ReLU, nn.Sigmoid, nn.BatchNorm2d}
    x = torch.rand(2, 3, 48, 32).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        answer = model(x)
        limit = (1e-4 if precision == torch.float32 else 0.1) * float(answer.abs().max())
        seen = x.to(precision, copy=True)
        for _ in range(2):  # results are written into what is no longer needed, and that is not the photo
            torch.testing.assert_close(network(seen).float(), answer, rtol=0, atol=limit)
        assert torch.equal(seen, x.to(precision))


def without_operation(self, x):
    raise AttributeError("no such operation")


def another_operation(self, x):
    return torch.conv2d(x, self.weight, self.bias, padding=self.settings[0])


@pytest.mark.parametrize("forward", [without_operation, another_operation])
def test_where_torchs_operation_is_missing_or_another_nothing_is_joined(monkeypatch, forward):
    monkeypatch.setattr(FusedConv, "forward", forward)
    assert joined(inference_network(settled("attention_unet"), PROCESSOR, torch.float32)) == 0


def test_what_is_no_number_is_not_hidden_by_joining():
    model = settled("fast_attention_unet")
    with torch.no_grad():  # finite, as `load_model` asks, but too large to add up; behind it stands a ReLU
        model.e1.conv1.weight.fill_(3e38)
    segmenter = Segmenter(model, {"kind": "squeeze", "size": [64, 64]}, device="cpu", precision="float32")
    assert joined(segmenter.network) == 0
    with pytest.raises(UserError, match="what is no number"):
        segmenter(np.full((64, 64, 3), 200, np.uint8), everywhere=True)


@pytest.mark.parametrize("name", ["attention_unet", "fast_attention_unet"])
def test_folded_batch_norm_computes_the_same_and_leaves_the_model_alone(name):
    model = settled(name)
    with pytest.raises(ValueError, match="evaluation mode"):
        fold_batch_norm(model.train())
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norm(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    photo = torch.rand(2, 3, 48, 32)
    with torch.inference_mode():
        answer = model(photo)
        torch.testing.assert_close(folded(photo), answer, rtol=1e-4, atol=1e-4 * float(answer.abs().max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("channels", [1, 3])
def test_shuffles_in_runs_are_pixel_shuffles_of_reordered_channels(channels):
    small, large = torch.rand(2, 4 * channels, 3, 5), torch.rand(2, channels, 6, 10)
    order = _in_runs(4 * channels)
    assert torch.equal(RunShuffle()(small[:, order]), F.pixel_shuffle(small, 2))
    assert torch.equal(RunUnshuffle()(large), F.pixel_unshuffle(large, 2)[:, order])
