"""The original network against a plain re-implementation, the fast one by its invariants."""

import re

import pytest
import torch
from conftest import shaken, shaken_network
from torch import nn
from torch.nn import functional as F

from retina_seg import model as networks
from retina_seg.model import MODELS, attention_unet, build_model, count_macs, count_parameters
from retina_seg.utils import UserError


def image(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def original():
    return shaken_network("attention_unet")


@pytest.fixture(scope="module")
def fast():
    return shaken_network("fast_attention_unet")


class Plain:
    """The original's forward pass in functional operations on a state dict's tensors, written from its description."""

    def __init__(self, weights):
        self.w = weights

    def convolve(self, x, key, padding):
        return F.conv2d(x, self.w[f"{key}.weight"], self.w[f"{key}.bias"], padding=padding)

    def normalise(self, x, key):
        statistics = (self.w[f"{key}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *statistics, eps=1e-5)

    def block(self, x, key):
        for first in (0, 3):
            x = self.convolve(x, f"{key}.conv.{first}", 1)
            x = self.normalise(x, f"{key}.conv.{first + 1}").clamp(min=0)
        return x

    def gate(self, gate, skip, key):
        q, k, v = (
            self.normalise(self.convolve(x, f"{key}.{name}.0", 1), f"{key}.{name}.1")
            for name, x in (("Wg", gate), ("Ws", skip), ("Wv", torch.cat([gate, skip], 1)))
        )
        a = 1 / (1 + torch.exp(-self.convolve((k * q).clamp(min=0), f"{key}.output.0", 0)))
        return v * a + v

    def decode(self, x, skip, key):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return self.block(self.gate(x, skip, f"{key}.ag"), f"{key}.c1")

    def __call__(self, x):
        s1 = self.block(x, "e1.conv")
        s2 = self.block(F.max_pool2d(s1, 2), "e2.conv")
        d1 = self.decode(self.block(F.max_pool2d(s2, 2), "b1"), s2, "d1")
        d2 = self.decode(d1, s1, "d2")
        return self.convolve(self.convolve(d2, "output1", 1), "finaloutput", 0)


@pytest.mark.parametrize(("height", "width", "batch"), [(20, 28, 1), (4, 12, 2), (36, 8, 1)])
def test_the_original_computes_what_its_description_says(original, height, width, batch):
    x = image(batch, 3, height, width)
    with torch.no_grad():
        expected, logits = Plain(original.state_dict())(x), original(x)
    assert logits.shape == (batch, 1, height, width)
    assert logits.std() > 1e-3  # not two constants
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_the_original_has_the_published_parameters_and_keys(original):
    state = original.state_dict()
    assert (count_parameters(original), len(state)) == (664_071, 120)
    assert sum(value.numel() for value in state.values()) == 665_943
    shapes = {
        **{"e1.conv.conv.0.weight": (32, 3, 3, 3), "e1.conv.conv.4.num_batches_tracked": (), "b1.conv.3.bias": (128,)},
        **{"d1.ag.Wg.0.weight": (64, 128, 3, 3), "d1.ag.Wg.1.running_mean": (64,), "d1.c1.conv.0.bias": (64,)},
        **{"d2.ag.Wv.0.weight": (32, 96, 3, 3), "d2.ag.output.0.weight": (32, 32, 1, 1), "output1.bias": (3,)},
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_the_lower_case_names_are_the_same_objects():
    for upper in ("ConvBlock", "EncoderBlock", "AttentionGate", "DecoderBlock", "AttentionUNet"):
        lower = re.sub("(?<=[a-z])(?=[A-Z])", "_", upper).lower()  # attention_unet
        assert getattr(networks, lower) is getattr(networks, upper)


@pytest.mark.parametrize("name", MODELS)
def test_a_size_off_the_stride_is_refused_by_name(name):
    model = build_model(name)
    for height, width in ((33, 32), (34, 30), (1, 8)):
        with pytest.raises(ValueError, match=f"multiples of {model.stride}, got {height}x{width}"):
            model(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_reaches_every_parameter_and_the_image(name):
    model = shaken(build_model(name))  # in training, normalisation takes back what a bias adds: no gradient to see
    x = image(2, 3, 32, 48).requires_grad_()
    model(x).square().mean().backward()
    starved = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert starved == []
    assert (x.grad.abs().sum(dim=(0, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "parameters"),
    [({}, 600_457), ({"fine": 0}, 585_988), ({"width": 12, "deepest": 16, "fine": 8}, 67_041)],
)
def test_the_fast_network_at_other_widths_has_the_published_parameters(arguments, parameters):
    model = build_model("fast_attention_unet", **arguments).eval()
    assert count_parameters(model) == parameters
    for height, width in ((8, 8), (24, 40), (56, 8)):
        assert model(image(2, 3, height, width)).shape == (2, 1, height, width)


@pytest.mark.parametrize("fine", [0, 3])
def test_mixed_styles_are_the_weighted_sum_of_their_logits(fine):
    model = shaken(build_model("fast_attention_unet", width=4, deepest=4, fine=fine, styles=3)).eval()
    x, shares = image(2, 3, 24, 16), [[0.5, 0.0, 0.25], [0.0, 1.0, 0.0]]
    with torch.no_grad():
        every = model(x)
        model.mix_styles(shares)
        mixed = model(x)
    assert every.shape == (2, 3, 24, 16) and mixed.shape == (2, 2, 24, 16)
    assert torch.allclose(mixed[:, 1], every[:, 1], atol=1e-5)
    assert torch.allclose(mixed[:, 0], 0.5 * every[:, 0] + 0.25 * every[:, 2], atol=1e-5) and mixed.std() > 1e-3


def test_the_fast_network_sees_single_pixels(fast):
    # half the resolution inside, but no pixel is thrown away: each of four neighbours changes the logits in its own way
    x = torch.full((1, 3, 16, 16), 0.5)
    moved = []
    with torch.no_grad():
        for row, column in ((8, 8), (8, 9), (9, 8), (9, 9)):
            spot = x.clone()
            spot[..., row, column] = 1
            moved.append(fast(spot) - fast(x))
    for i, one in enumerate(moved):
        assert one.abs().max() > 1e-5
        assert all(not torch.allclose(one, other, atol=1e-6) for other in moved[:i])


def test_build_model_names_what_it_does_not_know():
    with pytest.raises(UserError, match="--model unet: unknown.*attention_unet, fast_attention_unet"):
        build_model("unet")
    for name, arguments in (("attention_unet", {"depth": 5}), ("fast_attention_unet", {"width": -1})):
        with pytest.raises(UserError, match=f"--model-arguments.*{name} does not take them"):
            build_model(name, **arguments)


def test_macs_are_counted_and_grow_with_the_pixels():
    convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert count_macs(convolution, 10, 12) == 3 * 8 * 9 * 10 * 12
    original = attention_unet()
    assert count_macs(original, 64, 128) == 8 * count_macs(original, 32, 32)
