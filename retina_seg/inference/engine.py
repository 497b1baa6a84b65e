"""A network as it is fastest to use: the same function of an image, up to rounding, with fewer passes over memory.

`inference_network` turns a trained network into one that cannot be trained. Batch normalisation is folded into the
convolution before it. On a processor, where the time between convolutions is that of memory, activations, sums and
products are fused with convolutions: they are taken while the convolution's result is still in the cache.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retina_seg.model import AttentionGate, AttentionUNet, FastAttentionUNet, FinePath, ResidualBlock


def inference_network(model: nn.Module, device: torch.device, precision: torch.dtype) -> nn.Module:
    """A copy of `model` for inference, in evaluation mode: channels last, weights, input and output in `precision`.

    In the networks of this package batch normalisation is folded into convolutions. On a processor their convolutions
    are fused (`fuse_convolutions`) where torch can do so with the same result.
    """
    network = copy.deepcopy(model).eval()
    own = model if isinstance(model, (AttentionUNet, FastAttentionUNet)) else None
    network = (fold_batch_norm(network) if own else network).to(device, precision, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if device.type != "cpu" or own is None:
        return network
    fused = fuse_convolutions(copy.deepcopy(network))
    return fused if _same_on_noise(fused, network, own.stride, precision) else network


@torch.inference_mode()
def _same_on_noise(fused: nn.Module, network: nn.Module, stride: int, precision: torch.dtype) -> bool:
    """Whether `fused` runs here and gives what `network` gives for noise, all of it finite."""
    noise = torch.rand(1, 3, 4 * stride, 4 * stride, generator=torch.Generator().manual_seed(0)).to(precision)
    expected = network(noise).float()
    try:
        result = fused(noise).float()
    except (AttributeError, RuntimeError, TypeError):  # torch without the operation, or with another of its name
        return False
    limit = (1e-4 if precision == torch.float32 else 0.1) * float(expected.abs().max())
    return bool(((result - expected).abs() <= limit).all())  # False for NaN


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` with every batch normalisation folded into the convolution before it: the same up to rounding.

    Raises `ValueError`: `model` is in training mode.
    """
    if model.training:
        raise ValueError("only a network in evaluation mode can be folded; call eval() first")
    folded = copy.deepcopy(model)
    for module in folded.modules():
        previous = None  # in these networks a normalisation is registered right after its convolution
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and previous is not None:
                setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
                setattr(module, name, nn.Identity())
            previous = (name, child) if isinstance(child, nn.Conv2d) else None
    return folded


class FusedConv(nn.Module):
    """A convolution and what follows it in one call of oneDNN: x (N, in, H, W) -> a(conv(x)), (N, out, H, W).

    With a second tensor b (N, out, H, W): `plus` gives a(conv(x) + b), written into b; `times` gives a(conv(x) b). The
    operation is the one that `torch.compile` uses on processors. Its ReLU makes 0 of NaN.

    Args:
        convolution: its settings, weights and bias, in their precision.
        activation: a, "relu", "sigmoid" (not for `plus` and `times`), or "none".
        weights: (weight, bias) instead of the convolution's own.
    """

    def __init__(self, convolution: nn.Conv2d, activation: str = "none", weights: tuple | None = None) -> None:
        super().__init__()
        c = convolution
        weight, bias = weights or (c.weight, c.bias)
        self.register_buffer("weight", weight.detach().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.settings = (list(c.padding), list(c.stride), list(c.dilation), c.groups)
        self.activation = activation
        self.after: tuple = (1.0, None if activation == "none" else activation, [], None)  # of a second tensor

    def forward(self, x: Tensor) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise
        return operation(x, self.weight, self.bias, *self.settings, self.activation, [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise_.binary
        return operation(other, x, self.weight, self.bias, *self.settings, "add", *self.after)

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise.binary
        return operation(x, other, self.weight, self.bias, *self.settings, "mul", *self.after)


class FusedResidualBlock(nn.Module):
    """A folded `ResidualBlock`; it writes its result into its input."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = FusedConv(block.conv1, "relu"), FusedConv(block.conv2, "relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2.plus(self.conv1(x), x)


class FusedConcatConv(nn.Module):
    """A convolution of a (N, A, H, W) and b (N, B, H, W) without concatenating them: the sum of a convolution of each."""

    def __init__(self, convolution: nn.Conv2d, a_channels: int, activation: str = "none") -> None:
        super().__init__()
        self.conv_a = FusedConv(convolution, "none", (convolution.weight[:, :a_channels], convolution.bias))
        self.conv_b = FusedConv(convolution, activation, (convolution.weight[:, a_channels:], None))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.conv_b.plus(b, self.conv_a(a))


class FusedGate(nn.Module):
    """A folded `AttentionGate`."""

    def __init__(self, gate: AttentionGate) -> None:
        super().__init__()
        convolutions: list[Any] = [gate.Wg[0], gate.Ws[0], gate.output[0], gate.Wv[0]]
        query, key, weights, value = convolutions
        self.query, self.key = FusedConv(query), FusedConv(key, "relu")
        self.weights, self.value = FusedConv(weights, "sigmoid"), FusedConcatConv(value, query.in_channels)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        weights = self.weights(self.key.times(skip, self.query(gate)))
        value = self.value(gate, skip)
        return value.addcmul_(value, weights)


class FusedFinePath(nn.Module):
    """A folded `FinePath`."""

    def __init__(self, path: FinePath) -> None:
        super().__init__()
        layers: Any = path
        first, last = layers[0][0], layers[1]
        self.first, self.last = FusedConcatConv(first, first.in_channels - 3, "relu"), FusedConv(last)

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        return self.last(self.first(features, image))


class ChannelsLastShuffle(nn.Module):
    """Pixel-shuffle by 2 of channels in `shuffle_order`, which are copied in runs: (N, 4 C, H, W) -> (N, C, 2H, 2W)."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        runs = x.permute(0, 2, 3, 1).reshape(n, h, w, 2, c // 2).transpose(2, 3)
        return runs.reshape(n, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)


class ChannelsLastUnshuffle(nn.Module):
    """The reverse of `ChannelsLastShuffle`: (N, C, 2H, 2W) -> (N, 4 C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        runs = x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2 * c).transpose(2, 3)
        return runs.reshape(n, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


def shuffle_order(channels: int) -> list[int]:
    """`nn.PixelShuffle(2)`'s channels, ordered (channel, row, column), in the order (row, column, channel)."""
    return torch.arange(channels).view(-1, 4).T.flatten().tolist()


def fuse_convolutions(model: nn.Module) -> nn.Module:
    """`model`, from `fold_batch_norm`, with its parts replaced in place by the fused modules above.

    Their operation is private to torch and may change: `inference_network` tries the result before it is used.
    """
    if isinstance(model, FastAttentionUNet):
        convolutions: list[Any] = [model.stem[0], model.head]
        stem, head = convolutions
        order = shuffle_order(head.out_channels)
        stem.weight = nn.Parameter(stem.weight[:, shuffle_order(stem.in_channels)])
        head.weight, head.bias = nn.Parameter(head.weight[order]), nn.Parameter(head.bias[order])
        model.unshuffle, model.shuffle = ChannelsLastUnshuffle(), ChannelsLastShuffle()
    activations = {nn.ReLU: "relu", nn.Sigmoid: "sigmoid"}
    fused = {ResidualBlock: FusedResidualBlock, AttentionGate: FusedGate, FinePath: FusedFinePath, nn.Conv2d: FusedConv}
    for name, child in list(model.named_children()):
        if type(child) in fused:
            setattr(model, name, fused[type(child)](child))
        elif isinstance(child, nn.Sequential) and any(type(layer) in activations for layer in child):
            layers: list[nn.Module] = []
            for layer in child:
                if type(layer) in activations and layers and isinstance(layers[-1], nn.Conv2d):
                    layers[-1] = FusedConv(layers[-1], activations[type(layer)])
                elif not isinstance(layer, nn.Identity):  # where a normalisation was
                    layers.append(layer)
            setattr(model, name, nn.Sequential(*layers))
        else:
            fuse_convolutions(child)
    return model
