"""Dice loss and Dice + cross-entropy on logits (the original's `loss` notebook).

With p = sigmoid(logits) and targets t, both flattened over the whole batch, and s the smoothing term:

    dice      = 1 - (2 sum(p t) + s) / (sum(p) + sum(t) + s)                       in [0, 1)
    dice_bce  = dice + mean( -t log p - (1 - t) log(1 - p) )                       in [0, inf)

Deviation from the original: the cross-entropy is computed from the logits instead of from p. The value is the same;
it does not saturate (the original clamps log p at -100, with a zero gradient beyond) and autocast accepts it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retina_seg.utils import UserError


def dice_loss(logits: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """Dice loss over the whole batch: a scalar in [0, 1), float32.

    `logits` and `targets` are float tensors of one shape, targets in [0, 1]. `smooth` is
    added to both sides of the fraction, so that an empty mask is no division by zero.

    Raises `ValueError`: the shapes differ.

    >>> loss = dice_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> round(loss.item(), 6)  # 1 - (2*0.5 + 1) / (1 + 1 + 1)
    0.333333
    """
    if logits.shape != targets.shape:
        raise ValueError(f"logits {[*logits.shape]} and targets {[*targets.shape]} differ in shape")
    probability = torch.sigmoid(logits.float()).flatten()
    targets = targets.float().flatten()
    overlap = (probability * targets).sum()
    return 1 - (2 * overlap + smooth) / (probability.sum() + targets.sum() + smooth)


def dice_bce_loss(logits: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
    """`dice_loss` plus the mean binary cross-entropy, in [0, inf); called alike.

    >>> loss = dice_bce_loss(torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> round(loss.item(), 6)  # 1/3 + log 2
    1.02648
    """
    dice = dice_loss(logits, targets, smooth)
    return dice + F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def distillation_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean over styles of `dice_bce_loss` against the probabilities of a teacher (arXiv 1503.02531): a scalar from 0 on.

    Both are logits (N, styles, H, W). Raises `ValueError`: the shapes differ.
    """
    if logits.shape != teacher.shape:
        raise ValueError(f"logits {[*logits.shape]} and the teacher's {[*teacher.shape]} differ in shape")
    styles = zip(logits.unbind(1), torch.sigmoid(teacher.float()).unbind(1), strict=True)
    return torch.stack([dice_bce_loss(ours, targets) for ours, targets in styles]).mean()


class DiceLoss(nn.Module):
    """`dice_loss` as a module, called as the original's: `loss(logits, targets, smooth=1)`."""

    def forward(self, inputs: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
        return dice_loss(inputs, targets, smooth)


class DiceBCELoss(nn.Module):
    """`dice_bce_loss` as a module, called as the original's: `loss(logits, targets, smooth=1)`."""

    def forward(self, inputs: Tensor, targets: Tensor, smooth: float = 1.0) -> Tensor:
        return dice_bce_loss(inputs, targets, smooth)


# what TrainConfig.loss may be; every entry is a function of (logits, masks) that gives a scalar
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dice_bce": dice_bce_loss, "dice": dice_loss}


def register_loss(name: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make `loss`, of (logits, masks) both (N, 1, H, W), usable by `name` in `TrainConfig.loss` and the command.

    Raises `UserError`: the name is one of this package's.
    """
    if name in LOSSES and LOSSES[name].__module__ == __name__:
        raise UserError(f"{name}: is a loss of this package; register yours under another name")
    LOSSES[name] = loss
