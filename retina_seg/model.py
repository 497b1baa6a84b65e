"""The networks, leaf to root: the original's blocks and `attention_unet`, then the fast network grown from them.

Sources: the original's `model` notebook for the blocks, names and widths; U-Net (arXiv 1505.04597) for the shape;
Attention U-Net (arXiv 1804.03999) for gating a skip connection; ResNet (arXiv 1512.03385) for the fast network's
residual blocks and sub-pixel convolution (arXiv 1609.05158) for its stem and head. Deviations stand at the classes.

Attribute names are checkpoint keys and never change.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retina_seg.utils import UserError


def _conv_norm(in_channels: int, out_channels: int, kernel: int = 3, bias: bool = True) -> nn.Sequential:
    """A convolution that keeps height and width, then batch normalisation."""
    convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _conv_norm_relu(in_channels: int, out_channels: int, bias: bool = True) -> nn.Sequential:
    return _conv_norm(in_channels, out_channels, bias=bias).append(nn.ReLU(inplace=True))


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, normalised, with ReLU: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        first = _conv_norm_relu(in_channels, out_channels)
        self.conv = nn.Sequential(*first, *_conv_norm_relu(out_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class EncoderBlock(nn.Module):
    """A `ConvBlock`, then max-pooling: (N, out, H, W) and (N, out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.conv(x)
        return skip, self.pool(skip)


class AttentionGate(nn.Module):
    """Weighs merged features by how well coarse path (query) and skip (key) agree.

    Of gate g (N, G, H, W) and skip s (N, S, H, W): q = Wg(g), k = Ws(s), v = Wv([g, s]),
    a = sigmoid(conv(relu(k q))) in (0, 1), result v a + v, (N, out, H, W). Unlike in
    Attention U-Net the agreement is a product, not a sum, the weights are one a channel,
    and the weighted features are added to themselves: the gate amplifies, never mutes.

    `in_channels` is [G, S]; `kernel` the side of Wg's and Ws's convolutions.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, kernel: int = 3):
        super().__init__()
        gate, skip = in_channels
        self.Wg = _conv_norm(gate, out_channels, kernel)
        self.Ws = _conv_norm(skip, out_channels, kernel)
        self.Wv = _conv_norm(gate + skip, out_channels)
        self.output = nn.Sequential(nn.Conv2d(out_channels, out_channels, 1), nn.Sigmoid())

    def attention(self, gate: Tensor, skip: Tensor) -> Tensor:
        """The weights a, (N, out, H, W) in (0, 1)."""
        return self.output((self.Ws(skip) * self.Wg(gate)).relu_())

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        value = self.Wv(torch.cat([gate, skip], dim=1))
        return torch.addcmul(value, value, self.attention(gate, skip))  # v + v a


class DecoderBlock(nn.Module):
    """Bilinear up-sampling by 2, an `AttentionGate` with the skip, a `ConvBlock`.

    (N, G, H, W) and skip (N, S, 2H, 2W) -> (N, out, 2H, 2W); `in_channels` is [G, S].
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int) -> None:
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.ag = AttentionGate(in_channels, out_channels)
        self.c1 = ConvBlock(out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.c1(self.ag(self.up(x), skip))


class AttentionUNet(nn.Module):
    """The original's network: (N, 3, H, W) BGR in [0, 1] -> logits (N, 1, H, W).

    664,071 trainable parameters; a state dict of the original loads with `strict=True`.
    Raises `ValueError`: H or W is no multiple of 4 (`Segmenter` pads any image).
    """

    stride = 4  # height and width must be multiples of this
    receptive_field = None  # unbounded: up-sampling with aligned corners

    def __init__(self) -> None:
        super().__init__()
        self.e1 = EncoderBlock(3, 32)
        self.e2 = EncoderBlock(32, 64)
        self.b1 = ConvBlock(64, 128)
        self.d1 = DecoderBlock([128, 64], 64)
        self.d2 = DecoderBlock([64, 32], 32)
        self.output1 = nn.Conv2d(32, 3, 3, padding=1)
        self.finaloutput = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        check_multiple(x, self.stride)
        s1, p1 = self.e1(x)  # (N, 32, H, W), (N, 32, H/2, W/2)
        s2, p2 = self.e2(p1)  # (N, 64, H/2, W/2), (N, 64, H/4, W/4)
        b = self.b1(p2)  # (N, 128, H/4, W/4)
        d = self.d1(b, s2)  # (N, 64, H/2, W/2)
        d = self.d2(d, s1)  # (N, 32, H, W)
        return self.finaloutput(self.output1(d))  # (N, 1, H, W)


def check_multiple(x: Tensor, stride: int) -> None:
    """Raises `ValueError` unless height and width of `x` (N, C, H, W) are multiples of `stride`."""
    height, width = x.shape[-2:]
    if height % stride or width % stride:
        raise ValueError(f"height and width must be multiples of {stride}, got {height}x{width}; pad the image")


# the original's names for the same objects
conv_block, encoder_block, attention_gate, decoder_block = ConvBlock, EncoderBlock, AttentionGate, DecoderBlock
attention_unet = AttentionUNet


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, the second with `dilation`, and batch normalisation around a shortcut: (N, C, H, W) -> same."""

    def __init__(self, channels: int, dilation: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.drop = nn.Dropout2d(dropout) if dropout else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.norm1(self.conv1(x)).relu_())
        return (x + self.norm2(self.conv2(y))).relu_()


class FinePath(nn.Sequential):
    """Convolutions at full resolution: features (N, F, H, W) and image (N, 3, H, W) -> logits (N, styles, H, W)."""

    def forward(self, *parts: Tensor) -> Tensor:
        return super().forward(torch.cat(parts, dim=1))


class FastAttentionUNet(nn.Module):
    """The original's two attention gates in a network that needs a fifth of the arithmetic.

    (N, 3, H, W) BGR in [0, 1], H and W multiples of 8 -> logits (N, styles, H, W). What differs from `AttentionUNet`:

    - a pixel-unshuffle stem and a pixel-shuffle head: all wide layers work at half the resolution;
    - residual blocks, the deepest ones dilated: a receptive field several times as wide;
    - a thin full-resolution path after the head, for edges narrower than two pixels;
    - the gates' query and key are 1x1 convolutions, and most convolutions have no bias where normalisation follows.

    Args:
        width: channels of the first level; the second has twice as many.
        deepest: channels of the third level.
        fine: channels of the full-resolution path, 0 for none.
        dropout: share of feature maps dropped inside the deepest blocks while training.
        styles: output channels, one for each style of labelling that is trained.
    """

    stride = 8
    receptive_field = 160  # pixels to either side that a pixel's logit depends on, at most

    def __init__(self, width: int = 32, deepest: int = 64, fine: int = 12, dropout: float = 0.1, styles: int = 1):
        super().__init__()
        w1, w2, w3 = width, 2 * width, deepest
        self.unshuffle: nn.Module = nn.PixelUnshuffle(2)
        self.stem = _conv_norm_relu(12, w1, bias=False)
        self.e1 = ResidualBlock(w1)
        self.down1 = _conv_norm_relu(w1, w2, bias=False)
        self.e2 = ResidualBlock(w2)
        self.down2 = _conv_norm_relu(w2, w3, bias=False)
        self.b1 = nn.Sequential(*(ResidualBlock(w3, dilation, dropout) for dilation in (1, 2, 4)))
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.ag1 = AttentionGate([w3, w2], w2, kernel=1)
        self.d1 = ResidualBlock(w2)
        self.ag2 = AttentionGate([w2, w1], w1, kernel=1)
        self.d2 = ResidualBlock(w1)
        self.head = nn.Conv2d(w1, 4 * (fine or styles), 3, padding=1)
        self.shuffle: nn.Module = nn.PixelShuffle(2)
        last = nn.Conv2d(fine, styles, 3, padding=1) if fine else None
        self.fine = FinePath(_conv_norm_relu(fine + 3, fine, bias=False), last) if last else None

    def forward(self, x: Tensor) -> Tensor:
        check_multiple(x, self.stride)
        s1 = self.e1(self.stem(self.unshuffle(x)))  # (N, w1, H/2, W/2)
        s2 = self.e2(self.down1(self.pool(s1)))  # (N, w2, H/4, W/4)
        b = self.b1(self.down2(self.pool(s2)))  # (N, w3, H/8, W/8)
        d = self.d1(self.ag1(self.up(b), s2))  # (N, w2, H/4, W/4)
        d = self.d2(self.ag2(self.up(d), s1))  # (N, w1, H/2, W/2)
        y = self.shuffle(self.head(d))  # (N, fine, H, W); the logits where there is no fine path
        return y if self.fine is None else self.fine(y, x)  # (N, styles, H, W)

    def mix_styles(self, shares: Sequence[Sequence[float]]) -> None:
        """Replace the styles' logits by sums of them, one for each row of `shares`: the last convolution is linear."""
        last: Any = self.head if self.fine is None else self.fine[-1]
        mixed = torch.tensor(shares)
        for name in ("weight", "bias"):
            values = getattr(last, name).detach().unflatten(0, (mixed.shape[1], 4 if self.fine is None else 1))
            setattr(last, name, nn.Parameter(torch.tensordot(mixed, values, dims=1).flatten(0, 1)))
        last.out_channels = len(last.bias)


Factory = Callable[..., nn.Module]
MODELS: dict[str, Factory] = {"attention_unet": AttentionUNet, "fast_attention_unet": FastAttentionUNet}
DEFAULT_STRIDE = 32  # of a network that does not say what its height and width must be multiples of


def register_model(name: str, factory: Factory) -> None:
    """Make a network usable by `name`: in `TrainConfig.model`, in the command (`--import`), in checkpoints.

    `factory`, of `model_arguments`, gives a network: (N, 3, H, W) BGR in [0, 1] -> logits (N, 1, H, W), maybe with `stride`
    (else 32) and `receptive_field` (else it is not tiled). Raises `UserError`: the name is one of this package's.
    """
    if name in MODELS and MODELS[name].__module__ == __name__:
        raise UserError(f"{name}: is a network of this package; register yours under another name")
    MODELS[name] = factory


def build_model(name: str = "attention_unet", **arguments: Any) -> nn.Module:
    """A freshly initialised entry of `MODELS`. Raises `UserError`: there is none, or it does not take `arguments`."""
    if name not in MODELS:
        remedy = "or register yours: retina_seg.model.register_model, in the command --import MODULE"
        raise UserError(f"--model {name}: unknown; choose one of {', '.join(MODELS)}; {remedy}")
    try:
        return MODELS[name](**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"--model-arguments {arguments}: {name} does not take them ({error})") from None


def count_parameters(model: nn.Module) -> int:
    """How many trainable parameters `model` has."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def count_macs(model: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of a forward pass on an image (3, height, width): those of the convolutions, nearly all there are."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a second to import

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() // 2
