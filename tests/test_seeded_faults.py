"""Do the tests notice? Each fault breaks one line that matters in a copy of the package; its tests must then fail.

python -m pytest -m full tests/test_seeded_faults.py -rA      which test caught which fault
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# what is broken: the module, the line as it is, the line broken, the tests that must notice
FAULTS = {
    "a wrong sign in dice": ("loss", "return 1 - (2 * overlap", "return 1 + (2 * overlap", "loss"),
    "precision and recall swapped": (
        "metrics",
        '"recall": _ratio(c.tp, c.tp + c.fn)',
        '"recall": _ratio(c.tp, c.tp + c.fp)',
        "metrics",
    ),
    "the field of view ignored": (
        "metrics",
        "counts = count(mask, predicted, region)",
        "counts = count(mask, predicted)",
        "metrics",
    ),
    "no flip on the mask": (
        "transforms",
        "cv2.warpAffine(mask, matrix,",
        "cv2.warpAffine(mask, abs(matrix),",
        "transforms",
    ),
    "both eyes of a person on two sides": (
        "data",
        "if pair.subject not in held_out]",
        "if pair.name not in held_out]",
        "data",
    ),
    "the EMA weights never follow": ("optim", "mine.lerp_(theirs, share)", "pass", "optim"),
    "the EMA weights not kept": (
        "train",
        "self.kept = self.ema.model if self.ema else self.model",
        "self.kept = self.model",
        "train",
    ),
    "red and blue swapped": (
        "transforms",
        "image[:, :, ::-1].transpose(2, 0, 1))).float() / 255",
        "image.transpose(2, 0, 1))).float() / 255",
        "transforms",
    ),
    "validated in training mode": ("train", "    model.eval()\n    losses = []", "    losses = []", "train"),
    "the best epoch the one of highest loss": (
        "train",
        'row["validation_loss"] < state["best_loss"]',
        'not row["validation_loss"] < state["best_loss"]',
        "train",
    ),
    "the learning rate never falls": (
        "optim",
        "return 0.5 * (1 + math.cos(",
        "return 1.0 + 0 * (1 + math.cos(",
        "optim",
    ),
    "the optimizer forgotten on resuming": (
        "train",
        'self.optimizer.load_state_dict(value["optimizer"])',
        "pass",
        "checkpoint",
    ),
    "the random state forgotten on resuming": (
        "train",
        'torch.set_rng_state(value["random"]["cpu"])',
        "pass",
        "checkpoint",
    ),
    "the epoch's order forgotten on resuming": (
        "train",
        'set_epoch(self.sampler, config.seed, state["epoch"])',
        "pass",
        "checkpoint",
    ),
    "steps along the raw gradient": ("optim", "for number in range(iterations):", "for number in range(0):", "optim"),
    "two processes on the same images": (
        "distributed",
        "DistributedSampler(dataset, self.size, self.rank,",
        "DistributedSampler(dataset, self.size, 0,",
        "distributed",
    ),
    "checkpoints that may run code": (
        "state_dicts",
        'map_location="cpu", weights_only=True',
        'map_location="cpu", weights_only=False',
        "checkpoint",
    ),
    "the gate mutes instead of amplifying": (
        "model",
        "return torch.addcmul(value, value, self.attention(gate, skip))",
        "return value * self.attention(gate, skip)",
        "model",
    ),
    "tiles without their surroundings": (
        "inference/segmenter",
        "y, x = max(0, top - halo), max(0, left - halo)",
        "y, x = top, left",
        "segmenter",
    ),
    "a mirrored view not mirrored back": (
        "inference/segmenter",
        "np.rot90(logits[:, ::step], -quarters)",
        "np.rot90(logits, -quarters)",
        "segmenter",
    ),
    "fused operations never tried": (
        "inference/engine",
        "return fused if _same_on_noise(fused, network, model.stride, precision) else network",
        "return fused",
        "engine",
    ),
    "vessels outside of the field of view": ("inference/segmenter", "result[~fov] = outside or 0", "pass", "segmenter"),
    "masks cut anywhere above black": (
        "inference/protocol",
        "(array > 127 for array in masks)",
        "(array > 0 for array in masks)",
        "test",
    ),
    "half-written files under their final name": (
        "utils",
        'temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.partial{path.suffix}")',
        "temporary = path",
        "utils",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("what", FAULTS)
def test_a_broken_line_is_noticed(what, tmp_path):
    module, line, broken, tests = FAULTS[what]
    for folder in ("retina_seg", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tmp_path)
    source = tmp_path / "retina_seg" / f"{module}.py"
    text = source.read_text()
    assert text.count(line) == 1, f"{module}.py has changed: bring this fault up to date"
    source.write_text(text.replace(line, broken))
    command = [sys.executable, "-m", "pytest", f"tests/test_{tests}.py", "-x", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1, f"nobody noticed: {what}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    print(f"{what}: caught by {re.search(r'(?:FAILED|ERROR) tests/(.+?)(?: - |$)', done.stdout, re.M)[1]}")
