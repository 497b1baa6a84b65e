"""The quality remarks: a fundus image is "yes", what is none or degraded never is."""

import functools
from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage

from retina_seg.fov import find_fov, fov_diameter
from retina_seg.images import read_image
from retina_seg.inference.segmenter import Segmenter
from retina_seg.quality import quality


def sample(name: str) -> np.ndarray:
    return read_image(next(Path(skimage.__file__).parent.glob(f"data/{name}.*")))


@functools.cache
def general() -> Segmenter:
    return Segmenter.load("general", device="cpu", precision="float32")


def grade(image: np.ndarray) -> tuple[str, str]:
    segmenter, fov = general(), find_fov(image)
    probability = segmenter(image, fov)
    return quality(image, fov, probability, probability > segmenter.threshold)


FUNDUS = cv2.resize(sample("retina"), (700, 700), interpolation=cv2.INTER_AREA)
CASES = {
    "fundus": (FUNDUS, "yes", ""),
    "black": (np.zeros((300, 300, 3), np.uint8), "no", "black"),
    "white": (np.full((300, 300, 3), 255, np.uint8), "no", "overexposed"),
    "noise": (np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8), "no", "few vessels"),
    "text": (sample("page"), "no", "no field of view"),
    "face": (sample("astronaut"), "doubtful", "no field of view"),
    "mask": (np.repeat(np.uint8(255) * (sample("retina")[..., 1:2] > 80), 3, axis=2), "no", "overexposed"),
    "blurred": (cv2.GaussianBlur(FUNDUS, (0, 0), 8 * fov_diameter(find_fov(FUNDUS)) / 540), "no", "blurred"),
    "small": (cv2.resize(FUNDUS, (200, 200), interpolation=cv2.INTER_AREA), "doubtful", "small"),
    "tiny": (cv2.resize(FUNDUS, (48, 48), interpolation=cv2.INTER_AREA), "no", "small"),
    "one pixel": (FUNDUS[:1, :1], "no", "black"),
    "dark": (FUNDUS // 12, "doubtful", "dark"),
    "overexposed": (np.clip(FUNDUS * 6.0, 0, 255).astype(np.uint8), "no", "overexposed"),
    "half": (FUNDUS * (np.arange(700) > 400)[:, None], "doubtful", "dark: 59%"),
}


@pytest.mark.parametrize("name", CASES)
def test_quality(name: str) -> None:
    image, known, remark = CASES[name]
    found = grade(np.ascontiguousarray(image))
    assert found[0] == known and remark in found[1], found


@pytest.mark.real
def test_public_images(real_data: Path) -> None:
    images = sorted(real_data.glob("DRIVE/test/images/*"))[::4] + sorted(real_data.glob("CHASE_DB1/*.jpg"))[::9]
    assert [grade(read_image(path))[0] for path in images] == ["yes"] * len(images)
