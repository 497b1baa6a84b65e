"""The networks as they are fastest to use: the same function of a photo, with fewer passes over memory.

Trained networks go in, and what comes out cannot be trained: `inference_network` is the way in. On a processor the time
between convolutions is that of memory, so normalisation is folded into the convolution before it, and activations, sums
and products are taken where the convolution's result is still in the cache.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retina_seg.model import AttentionGate, FastAttentionUNet, FinePath, ResidualBlock


def inference_network(model: nn.Module, device: torch.device, precision: torch.dtype) -> nn.Module:
    """A copy of `model` (in evaluation mode) as it is fastest: batch normalisation folded, channels last, in `precision`.

    On a processor, what stands before and behind convolutions is joined to them (`fuse_operations`), where that gives
    the same. It takes (N, 3, H, W) in `precision`, channels last, on `device`. All weights are brought to bfloat16 once,
    where autocast would do it at every call. The number of threads is torch's own choice, one a core: convolutions of this
    size keep all cores busy, and more threads than cores only take turns.
    """
    network = fold_batch_norm(model).to(device, precision, memory_format=torch.channels_last)
    if device.type != "cpu":
        return network
    fused = fuse_operations(copy.deepcopy(network))
    joined = any(isinstance(module, FusedConv) for module in fused.modules())
    return fused if joined and _same_answers(fused, network, model.stride, precision) else network


@torch.inference_mode()
def _same_answers(fused: nn.Module, network: nn.Module, stride: int, precision: torch.dtype) -> bool:
    """Whether `fused` can be run here, and gives on noise what `network` does, which are numbers."""
    noise = torch.rand(1, 3, 4 * stride, 4 * stride, generator=torch.Generator().manual_seed(0)).to(precision)
    expected = network(noise).float()
    try:
        answer = fused(noise).float()
    except (AttributeError, RuntimeError, TypeError):  # torch without the operation, or with another
        return False
    limit = (1e-4 if precision == torch.float32 else 0.1) * float(expected.abs().max())
    return bool(((answer - expected).abs() <= limit).all())  # never so where it is no number


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference, every batch normalisation folded into the convolution before it.

    In evaluation mode a normalisation is a fixed scale and shift a channel, which the convolution's weights can take
    over: the same function, up to rounding, with one pass over memory less for each.

    Raises:
        ValueError: `model` is in training mode.
    """
    if model.training:
        raise ValueError("only a network in evaluation mode can be folded; call eval() first")
    folded = copy.deepcopy(model)
    for module in folded.modules():
        before = None  # in these networks a normalisation is registered where it is applied
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and isinstance(before, tuple):
                setattr(module, before[0], fuse_conv_bn_eval(before[1], child))
                setattr(module, name, nn.Identity())
            before = (name, child) if isinstance(child, nn.Conv2d) else None
    return folded


class FusedConv(nn.Module):
    """A convolution with what follows it in one call of oneDNN, while its result is still in the processor's cache.

    x (N, in, H, W) -> a(conv(x)), or with a second tensor b (N, out, H, W) a(conv(x) + b) or a(conv(x) b); floats,
    inference only. The operation is the one behind `torch.compile` on processors, had without compiling. It makes 0 of
    what is not a number where ReLU keeps it.

    Args:
        convolution: its weights, in their precision.
        activation: a, "relu", "sigmoid" (without a second tensor), or "none".
        weight, bias: instead of the convolution's, for more or fewer channels than it has.
    """

    def __init__(
        self,
        convolution: nn.Conv2d,
        activation: str = "none",
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        if weight is None:
            weight, bias = convolution.weight, convolution.bias
        c = convolution
        self.register_buffer("weight", weight.detach().contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.settings = (list(c.padding), list(c.stride), list(c.dilation), c.groups)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        operation = torch.ops.mkldnn._convolution_pointwise
        return operation(x, self.weight, self.bias, *self.settings, self.activation, [], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """a(conv(x) + other), written into `other`."""
        operation = torch.ops.mkldnn._convolution_pointwise_.binary
        return operation(other, x, self.weight, self.bias, *self.settings, "add", 1.0, *self._then())

    def times(self, x: Tensor, other: Tensor) -> Tensor:
        """a(conv(x) other)."""
        operation = torch.ops.mkldnn._convolution_pointwise.binary
        return operation(x, other, self.weight, self.bias, *self.settings, "mul", 1.0, *self._then())

    def _then(self) -> tuple:
        return None if self.activation == "none" else self.activation, [], None


class FusedResidualBlock(nn.Module):
    """A `ResidualBlock` for inference, its normalisation folded. It writes its result into what it is given."""

    def __init__(self, block: ResidualBlock) -> None:
        super().__init__()
        self.conv1, self.conv2 = FusedConv(block.conv1, "relu"), FusedConv(block.conv2, "relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2.plus(self.conv1(x), x)


class FusedJoin(nn.Module):
    """A convolution of two tensors' channels, a (N, A, H, W) and b (N, B, H, W), that are not joined for it.

    The sum of a convolution of each is the same, without a pass over memory to join them.
    """

    def __init__(self, convolution: nn.Conv2d, first: int, activation: str = "none") -> None:
        super().__init__()
        weight = convolution.weight
        self.first = FusedConv(convolution, "none", weight[:, :first], convolution.bias)
        self.second = FusedConv(convolution, activation, weight[:, first:])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.second.plus(b, self.first(a))


class FusedGate(nn.Module):
    """An `AttentionGate` for inference, its normalisation folded."""

    def __init__(self, gate: AttentionGate) -> None:
        super().__init__()
        query, key, value, weights = gate.Wg[0], gate.Ws[0], gate.Wv[0], gate.output[0]
        self.query, self.key, self.weights = FusedConv(query), FusedConv(key, "relu"), FusedConv(weights, "sigmoid")
        self.value = FusedJoin(value, query.in_channels)

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        weights = self.weights(self.key.times(skip, self.query(gate)))
        value = self.value(gate, skip)
        return value.addcmul_(value, weights)


class FusedFinePath(nn.Module):
    """A `FinePath` for inference, its normalisation folded."""

    def __init__(self, path: FinePath) -> None:
        super().__init__()
        first, last = path[0][0], path[1]
        self.first, self.last = FusedJoin(first, first.in_channels - 3, "relu"), FusedConv(last)

    def forward(self, features: Tensor, photo: Tensor) -> Tensor:
        return self.last(self.first(features, photo))


class RunShuffle(nn.Module):
    """Pixel-shuffle by 2 of channels ordered (row, column, channel): (N, 4 C, H, W) -> (N, C, 2H, 2W), channels last.

    So ordered, two neighbours in a row lie side by side before and after, and are copied in one run.
    """

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        runs = x.permute(0, 2, 3, 1).reshape(n, h, w, 2, c // 2).transpose(2, 3)
        return runs.reshape(n, 2 * h, 2 * w, c // 4).permute(0, 3, 1, 2)


class RunUnshuffle(nn.Module):
    """The reverse of `RunShuffle`: (N, C, 2H, 2W) -> (N, 4 C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        runs = x.permute(0, 2, 3, 1).reshape(n, h // 2, 2, w // 2, 2 * c).transpose(2, 3)
        return runs.reshape(n, h // 2, w // 2, 4 * c).permute(0, 3, 1, 2)


def _in_runs(channels: int) -> list[int]:
    """The channels of a pixel-shuffle by 2, which are ordered (channel, row, column), as `RunShuffle` orders them."""
    return torch.arange(channels).view(-1, 4).T.flatten().tolist()


def fuse_operations(model: nn.Module) -> nn.Module:
    """`model`, from `fold_batch_norm`, made of the fused modules above, in place: the same function, up to rounding.

    Their operation is private to torch and may go any day: `inference_network` tries the result before it is used.
    """
    if isinstance(model, FastAttentionUNet):
        stem, head = model.stem[0], model.head
        stem.weight = nn.Parameter(stem.weight[:, _in_runs(stem.in_channels)])
        head.weight, head.bias = (
            nn.Parameter(value[_in_runs(head.out_channels)]) for value in (head.weight, head.bias)
        )
        model.unshuffle, model.shuffle = RunUnshuffle(), RunShuffle()
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
            fuse_operations(child)
    return model
