"""Label styles: datasets differ in which vessels their masks hold, so a network may have one output channel for each."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from retina_seg.device import autocast

GROUPS = ("balanced", "fine", "bold")  # styles made of several datasets'
AUTO, AUTO_STYLES = "auto", ("fine", "balanced")  # chosen between by the image's size (`auto_style`)
FINE_BELOW = 800.0  # pixels: cameras left out of training had a higher F1 by "fine" below, by "balanced" above
PATCHES = 64  # that the styles are compared on


def of_style(logits: Tensor, style: Tensor | None = None) -> Tensor:
    """Each image's logits (N, 1, H, W) in its own style, of (N, styles, H, W); `style`: (N,) int64, None for one style."""
    return logits if style is None else logits[torch.arange(len(logits)), style].unsqueeze(1)


def auto_style(diameter: float) -> int:
    """Which of `AUTO_STYLES` an image is segmented in whose field of view has this diameter, pixels."""
    return int(diameter >= FINE_BELOW)


@torch.inference_mode()
def measure_styles(
    model: nn.Module, patches: Dataset, names: Sequence[str], device: torch.device, precision: torch.dtype
) -> dict[str, list[float]]:
    """Name of a style -> share of each dataset's logits.

    A dataset's own by its name. Of all alike: "balanced". Of the third of them that finds the most and the least
    vessels on the same patches: "fine" and "bold".

    Args:
        model: gives logits (N, styles, H, W); its mode is set to evaluation.
        patches: items that begin with an image (3, H, W) float32; the first 64 are used.
        names: of the datasets, in the order of the channels.
    """
    total = torch.zeros(len(names), device=device)
    model.eval()
    some = Subset(patches, range(min(PATCHES, len(patches))))  # type: ignore[arg-type]
    for images, *_ in DataLoader(some, batch_size=2):
        with autocast(device, precision):
            total += torch.sigmoid(model(images.to(device)).float()).sum((0, 2, 3))
    order, third = [names[i] for i in total.argsort(descending=True)], max(1, len(names) // 3)
    groups = dict(zip(GROUPS, (names, order[:third], order[-third:]), strict=True)) | {n: [n] for n in names}
    return {name: [(n in group) / len(group) for n in names] for name, group in groups.items()}
