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

# what is broken, the module, the line as it is, the line broken, the tests that must notice
FAULTS = [
    ("a wrong sign in dice", "loss", "return 1 - (2 * overlap", "return 1 + (2 * overlap", "loss"),
    (
        "precision and recall swapped",
        "metrics",
        "return _ratio(c.tp, c.tp + c.fn)",
        "return _ratio(c.tp, c.tp + c.fp)",
        "metrics",
    ),
    (
        "the field of view ignored",
        "metrics",
        "counts = count(label, predicted, region)",
        "counts = count(label, predicted, None)",
        "metrics",
    ),
    ("no flip on the mask", "data", "cv2.warpAffine(label, matrix,", "cv2.warpAffine(label, abs(matrix),", "data"),
    (
        "both eyes of a person on two sides",
        "data",
        "if pair.subject not in held_out]",
        "if pair.name not in held_out]",
        "data",
    ),
    ("the average never followed", "train", "mine.lerp_(theirs, share)", "pass", "train"),
    (
        "the average not kept",
        "train",
        "self.kept = self.average.model if self.average else self.model",
        "self.kept = self.model",
        "train",
    ),
    (
        "red and blue swapped",
        "data",
        "torch.from_numpy(np.ascontiguousarray(photo[:, :, ::-1].transpose(2, 0, 1)))",
        "torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))",
        "data",
    ),
    (
        "validated in training mode",
        "train",
        "    model.eval()\n    losses_seen, f1 = [], []",
        "    losses_seen, f1 = [], []",
        "train",
    ),
    (
        "the best epoch the one with the highest loss",
        "train",
        'row["validation_loss"] < state["best_loss"]',
        'not row["validation_loss"] < state["best_loss"]',
        "train",
    ),
    (
        "the learning rate never falls",
        "train",
        "return 0.5 * (1 + math.cos(",
        "return 1.0 + 0 * (1 + math.cos(",
        "train",
    ),
    (
        "the optimizer forgotten on resuming",
        "train",
        'self.optimizer.load_state_dict(value["optimizer"])',
        "pass",
        "resume",
    ),
    (
        "the random state forgotten on resuming",
        "train",
        'torch.set_rng_state(mine["now"])',
        "pass",
        "resume",
    ),
    (
        "steps along the raw gradient",
        "optim",
        "for number in range(iterations):",
        "for number in range(0):",
        "optim",
    ),
    (
        "two processes on the same photos",
        "distributed",
        "for rank in (group.rank, group.rank + 1))",
        "for rank in (0, 1))",
        "distributed",
    ),
    ("checkpoints that may run code", "resume", "weights_only=True", "weights_only=False", "resume"),
    (
        "the gate mutes instead of amplifying",
        "model",
        "return torch.addcmul(value, value, self.attention(gate, skip))",
        "return value * self.attention(gate, skip)",
        "model",
    ),
    (
        "tiles without their surroundings",
        "predict",
        "above, before = max(0, top - halo), max(0, left - halo)",
        "above, before = top, left",
        "predict",
    ),
    (
        "a flipped view not flipped back",
        "predict",
        "seen = seen[:, ::-1] if mirrored else seen",
        "seen = seen",
        "predict",
    ),
    (
        "joined operations never tried",
        "fused",
        "return fused if joined and _same_answers(fused, network, model.stride, precision) else network",
        "return fused",
        "fused",
    ),
    ("vessels outside of the field of view", "predict", "probability[~fov] = 0", "pass", "predict"),
    (
        "labels cut anywhere above black",
        "test",
        "true, predicted, masks = label > 127,",
        "true, predicted, masks = label > 0,",
        "test",
    ),
    (
        "half-written files under their final name",
        "utils",
        'temporary = path.with_name(f".{uuid.uuid4().hex[:12]}.partial{path.suffix}")',
        "temporary = path",
        "utils",
    ),
]


@pytest.mark.full
@pytest.mark.parametrize(("what", "module", "line", "broken", "tests"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_broken_line_is_noticed(what, module, line, broken, tests, tmp_path):
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


def test_the_faults_are_of_lines_that_are_there():
    for what, module, line, broken, _ in FAULTS:
        text = (ROOT / "retina_seg" / f"{module}.py").read_text()
        assert text.count(line) == 1 and line != broken, what
