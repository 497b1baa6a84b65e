"""How a dataset is scored, and the one loop from its pairs to predictions: for test, threshold, degrade, training."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from retina_seg.data import Pair, load_with_fov
from retina_seg.device import map_threads, memory_kept
from retina_seg.inference.segmenter import Segmenter
from retina_seg.sets.layout import load_vessels
from retina_seg.utils import UserError


@dataclass(frozen=True)
class Protocol:
    """How images are scored. Scores are given over the frame and in the field of view, whatever `region` is."""

    size: tuple[int, int] | None  # (height, width) that image and mask are resized to; None: the image's own
    region: str  # "frame" or "fov" (field of view), outside which the prediction is 0: what thresholds are chosen on
    threshold: float | None  # the protocol's own; None: the checkpoint's


PROTOCOLS = {
    "notebook": Protocol((512, 512), "frame", threshold=0.5),  # aspect ratio not kept
    "native": Protocol(None, "fov", threshold=None),
}


def get_protocol(name: str) -> Protocol:
    """The protocol called `name`. Raises `UserError`: there is none."""
    if name not in PROTOCOLS:
        raise UserError(f"--protocol {name}: choose one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


@dataclass(frozen=True)
class Sample:
    """A pair at its protocol's size, with its prediction."""

    name: str
    image: np.ndarray  # (H, W, 3) uint8 RGB; as it was degraded
    mask: np.ndarray  # ground truth, (H, W) bool
    fov: np.ndarray  # field of view, (H, W) bool
    second_observer: np.ndarray | None  # (H, W) bool; None: the dataset has none
    probability: np.ndarray  # (H, W) float32 in [0, 1]
    seconds: float  # what the prediction took

    def pixels(self, region: str) -> tuple[np.ndarray, np.ndarray]:
        """Mask (n,) bool and probability (n,) float32 of the pixels in `region`, "frame" or "fov"."""
        inside = self.fov if region == "fov" else np.ones_like(self.fov)
        return self.mask[inside], self.probability[inside]


def predict_pairs(
    segmenter: Segmenter,
    pairs: Iterable[Pair],
    protocol: Protocol,
    then: Callable = lambda sample: sample,
    degrade: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> Iterator[Any]:
    """`then` of the `Sample` of every pair, in order, worked out several at a time in threads.

    `degrade`: changes an image (H, W, 3) uint8 RGB, given its field of view (H, W) bool too; maybe to another size.

    Raises `UserError`: a file that cannot be read, sizes that differ; as `Segmenter`.
    """

    def one(pair: Pair) -> Any:
        image, mask, fov = load_with_fov(pair)
        masks = [mask, fov.astype(np.uint8) * 255, *([load_vessels(pair.mask_2nd)[0]] if pair.mask_2nd else [])]
        if masks[-1].shape != mask.shape:
            raise UserError(f"{pair.mask_2nd}: differs in size from its image {pair.image}")
        # the network measures an image by its own search for the field of view; done here already where it finds the same
        known = fov if pair.fov is None and degrade is None and protocol.size in (None, mask.shape) else None
        image = image if degrade is None else degrade(image, fov)
        if protocol.size not in (None, mask.shape):
            image, *masks = (cv2.resize(array, protocol.size[::-1]) for array in (image, *masks))
        mask, fov, *second = (array > 127 for array in masks)
        start = time.perf_counter()
        try:
            probability = segmenter(image, known, everywhere=protocol.region == "frame")
        except UserError as error:
            raise UserError(f"{pair.image}: {error}") from None
        seconds = time.perf_counter() - start
        if probability.shape != mask.shape:
            how = cv2.INTER_AREA if probability.size > mask.size else cv2.INTER_LINEAR
            probability = cv2.resize(probability, mask.shape[::-1], interpolation=how)
        return then(Sample(pair.name, image, mask, fov, second[0] if second else None, probability, seconds))

    with memory_kept():
        yield from map_threads(one, pairs, segmenter.device)
