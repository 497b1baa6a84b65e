"""The networks, leaf to root: the original's blocks and `attention_unet`, then the fast network grown from them.

Sources: the original's `model` notebook for the blocks, names and widths; U-Net (arXiv 1505.04597) for the shape;
Attention U-Net (arXiv 1804.03999) for gating a skip connection; ResNet (arXiv 1512.03385) for the fast network's
residual blocks and sub-pixel convolution (arXiv 1609.05158) for its stem and head. Deviations stand at the classes.

Attribute names are checkpoint keys and never change.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retina_seg.utils import UserError, whole_file

# ------------------------------------------------------------------------------------------------ the original's blocks


class ConvBlock(nn.Module):
    """Two 3x3 convolutions, each with batch normalisation and ReLU: (N, in, H, W) -> (N, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class EncoderBlock(nn.Module):
    """A `ConvBlock`, then max-pooling by 2: (N, in, H, W) -> skip (N, out, H, W), pooled (N, out, H/2, W/2)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvBlock(in_channels, out_channels)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = self.conv(x)
        return skip, self.pool(skip)


class AttentionGate(nn.Module):
    """Weighs the merged features by how well the coarse path (query) and the skip (key) agree.

    With gate g (N, G, H, W) and skip s (N, S, H, W): q = Wg(g), k = Ws(s), a = sigmoid(conv(relu(k q))) in (0, 1),
    v = Wv([g, s]), result v a + v, (N, out, H, W). Unlike Attention U-Net the agreement is a product, not a sum, the
    weights are one a channel, and the weighted features are added to themselves, so the gate amplifies and never mutes.

    Args:
        in_channels: [G, S].
        out_channels: channels of the result.
        query_kernel: side of the query's and the key's convolutions, 3 in the original.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, query_kernel: int = 3) -> None:
        super().__init__()
        gate, skip = in_channels
        self.Wg = self._conv_norm(gate, out_channels, query_kernel)
        self.Ws = self._conv_norm(skip, out_channels, query_kernel)
        self.Wv = self._conv_norm(gate + skip, out_channels, 3)
        self.output = nn.Sequential(nn.Conv2d(out_channels, out_channels, 1), nn.Sigmoid())

    @staticmethod
    def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
        convolution = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def attention(self, gate: Tensor, skip: Tensor) -> Tensor:
        """The weights a, (N, out, H, W) in (0, 1): what the gate looks at."""
        return self.output((self.Ws(skip) * self.Wg(gate)).relu_())

    def forward(self, gate: Tensor, skip: Tensor) -> Tensor:
        value = self.Wv(torch.cat([gate, skip], dim=1))
        return torch.addcmul(value, value, self.attention(gate, skip))  # in one pass over memory


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
    """The original's network: (N, 3, H, W) BGR in [0, 1], H and W multiples of 4 -> logits (N, 1, H, W).

    664,071 trainable parameters, 120 state-dict entries; a state dict of the original loads with `strict=True`.

    Raises:
        ValueError: H or W is no multiple of 4 (`predict.Segmenter` pads any photo).
    """

    stride = 4  # height and width must be multiples of this
    receptive_field = None  # up-sampling with aligned corners sees a tile otherwise than the whole: it cannot be tiled

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
    """Raises ValueError unless height and width of `x` (N, C, H, W) are multiples of `stride`."""
    height, width = x.shape[-2:]
    if height % stride or width % stride:
        raise ValueError(f"height and width must be multiples of {stride}, got {height}x{width}; pad the photo")


# the original's names for the same objects
conv_block = ConvBlock
encoder_block = EncoderBlock
attention_gate = AttentionGate
decoder_block = DecoderBlock
attention_unet = AttentionUNet


# ------------------------------------------------------------------------------------------------------ the fast network


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut: (N, C, H, W) -> the same.

    The convolutions have no bias: batch normalisation removes it. `dilation` widens the second one's view.
    """

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
    """Convolutions at full resolution: features (N, F, H, W) and photo (N, 3, H, W) -> logits (N, 1, H, W)."""

    def forward(self, features: Tensor, photo: Tensor) -> Tensor:
        return super().forward(torch.cat([features, photo], dim=1))


class FastAttentionUNet(nn.Module):
    """The original's two attention gates in a network that spends its arithmetic better.

    (N, 3, H, W) BGR in [0, 1], H and W multiples of 8 -> logits (N, 1, H, W). What differs from `AttentionUNet`:

    - a pixel-unshuffle stem and a pixel-shuffle head: all wide layers work at half the resolution, a quarter of the
      arithmetic, and no pixel is thrown away;
    - residual blocks, the deepest ones dilated, so a pixel's view is several times wider;
    - a thin full-resolution path beside the head, which restores edges narrower than two pixels;
    - the gates' query and key are 1x1 convolutions, and most convolutions have no bias where normalisation follows.

    Args:
        width: channels of the first level; the second has twice as many.
        deepest: channels of the third level.
        fine: channels of the full-resolution path, 0 for none.
        dropout: share of feature maps dropped inside the deepest blocks while training.
    """

    stride = 8
    receptive_field = 160  # pixels to either side that a pixel's answer depends on, at most

    def __init__(self, width: int = 32, deepest: int = 64, fine: int = 12, dropout: float = 0.1) -> None:
        super().__init__()
        w1, w2, w3 = width, 2 * width, deepest
        self.unshuffle = nn.PixelUnshuffle(2)
        self.stem = self._conv_norm_relu(12, w1)
        self.e1 = ResidualBlock(w1)
        self.down1 = self._conv_norm_relu(w1, w2)
        self.e2 = ResidualBlock(w2)
        self.down2 = self._conv_norm_relu(w2, w3)
        self.b1 = nn.Sequential(
            ResidualBlock(w3, 1, dropout), ResidualBlock(w3, 2, dropout), ResidualBlock(w3, 4, dropout)
        )
        self.pool = nn.MaxPool2d(2)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
        self.ag1 = AttentionGate([w3, w2], w2, query_kernel=1)
        self.d1 = ResidualBlock(w2)
        self.ag2 = AttentionGate([w2, w1], w1, query_kernel=1)
        self.d2 = ResidualBlock(w1)
        self.head = nn.Conv2d(w1, 4 * max(fine, 1), 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.fine = FinePath(self._conv_norm_relu(fine + 3, fine), nn.Conv2d(fine, 1, 3, padding=1)) if fine else None

    @staticmethod
    def _conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        check_multiple(x, self.stride)
        s1 = self.e1(self.stem(self.unshuffle(x)))  # (N, w1, H/2, W/2)
        s2 = self.e2(self.down1(self.pool(s1)))  # (N, w2, H/4, W/4)
        b = self.b1(self.down2(self.pool(s2)))  # (N, w3, H/8, W/8)
        d = self.d1(self.ag1(self.up(b), s2))  # (N, w2, H/4, W/4)
        d = self.d2(self.ag2(self.up(d), s1))  # (N, w1, H/2, W/2)
        y = self.shuffle(self.head(d))  # (N, fine, H, W); the logits where there is no fine path
        return y if self.fine is None else self.fine(y, x)  # (N, 1, H, W)


# --------------------------------------------------------------------------------------------------- build, save and load

ARCHITECTURES: dict[str, type[nn.Module]] = {"attention_unet": AttentionUNet, "fast_attention_unet": FastAttentionUNet}
CHECKPOINT_FORMAT = "retina_seg checkpoint 1"
MAX_PARAMETERS = 2**28  # a gigabyte; the networks that ship have less than a million


def build_model(name: str = "attention_unet", **arguments: Any) -> nn.Module:
    """A freshly initialised network of the architecture `name`, with that class's `arguments`.

    Raises:
        UserError: no such architecture, one that does not take these arguments, or would be absurdly large by them.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"model {name!r} is unknown; choose one of {', '.join(ARCHITECTURES)}")
    try:
        with torch.device("meta"), warnings.catch_warnings():  # on paper first: no memory, no random number is taken
            warnings.simplefilter("ignore")  # torch's remark on layers without channels, refused below
            sizes = [parameter.numel() for parameter in ARCHITECTURES[name](**arguments).parameters()]
        if 0 in sizes:
            raise ValueError("a layer would have no channels")
        if sum(sizes) > MAX_PARAMETERS:
            raise ValueError(f"it would have {sum(sizes):,} parameters, more than {MAX_PARAMETERS:,}")
        return ARCHITECTURES[name](**arguments)
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(f"model {name!r} cannot be built with {str(arguments)[:80]}: {str(error)[:160]}") from None


def count_parameters(model: nn.Module) -> int:
    """The number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_arithmetic(model: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of a forward pass on one photo (3, height, width): convolutions only, the rest is a few hundredths."""
    from torch.utils.flop_counter import FlopCounterMode  # takes a second to import

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, height, width))
    return counter.get_total_flops() // 2


def save_model(path: str | Path, model: nn.Module, name: str, arguments: dict[str, Any], **notes: Any) -> None:
    """Write weights, and all that is needed to use them, to `path`: whole or not at all.

    Args:
        name, arguments: what `build_model` took.
        notes: plain values that travel with the weights: working frame, threshold and where it is from, data, recipe.
    """
    weights = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    checkpoint = {"format": CHECKPOINT_FORMAT, "model": name, "arguments": arguments, **notes, "state_dict": weights}
    # in memory first: torch's writer hides a full disk, or a folder closed to us, behind a RuntimeError of its own
    content = io.BytesIO()
    torch.save(checkpoint, content)
    with whole_file(path) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read `path` without running any code in it: one of our checkpoints, or a plain state dict of the original.

    Returns:
        The dictionary `save_model` wrote. A plain state dict comes back as the original network's, with "notes" absent.

    Raises:
        UserError: no such file, no checkpoint, one that would run code, or of a format this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        if zipfile.is_zipfile(path):  # as torch writes them since 1.6, never packed
            with zipfile.ZipFile(path) as archive:
                if sum(item.file_size for item in archive.infolist()) > path.stat().st_size:
                    raise ValueError("it would unpack to more than it is")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd files before it refuses them
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler of hostile bytes raises anything
        raise UserError(
            f"{path}: is not a checkpoint that can be read safely ({type(error).__name__}); "
            "give a checkpoint.pth of a run, or a state dict saved by torch.save"
        ) from None
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(v, Tensor) for v in checkpoint.values()):
        return {"format": None, "model": "attention_unet", "arguments": {}, "state_dict": checkpoint}
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: is not a checkpoint of this package, nor a plain state dict")
    needed = {"model": str, "arguments": dict, "state_dict": dict}
    if not all(isinstance(checkpoint.get(key), kind) for key, kind in needed.items()):
        raise UserError(f"{path}: the checkpoint is incomplete; it needs {', '.join(needed)}")
    return checkpoint


def load_model(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The network in the checkpoint `path`, in evaluation mode on the processor, and the checkpoint without its weights.

    Raises:
        UserError: as `load_checkpoint`, or weights of another architecture, or weights that are not finite.
    """
    checkpoint = load_checkpoint(path)
    weights = checkpoint.pop("state_dict")
    claimed = sum(value.numel() * value.element_size() for value in weights.values() if isinstance(value, Tensor))
    if claimed > Path(path).stat().st_size:
        raise UserError(f"{path}: claims more weights than it holds; it is damaged or not meant well")

    def filled() -> nn.Module:
        model = build_model(checkpoint["model"], **checkpoint["arguments"])
        model.load_state_dict(weights, strict=True)
        return model

    try:
        with torch.device("meta"), warnings.catch_warnings():  # on paper first: a small file may ask for gigabytes
            warnings.simplefilter("ignore")  # torch's remark that nothing is copied
            filled()
        model = filled()
    except (UserError, TypeError) as error:  # arguments whose names no function can have
        raise UserError(f"{path}: {error}") from None
    except (RuntimeError, AttributeError) as error:
        first = str(error).strip().splitlines()[1:2]
        raise UserError(
            f"{path}: the weights are of another architecture than {checkpoint['model']} "
            f"({''.join(first).strip()[:120] or 'keys or shapes differ'})"
        ) from None
    if not all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point()):
        raise UserError(f"{path}: holds weights that are not finite numbers; take an earlier checkpoint")
    return model.eval(), checkpoint
