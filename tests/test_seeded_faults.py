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
FAULTS = []


def fault(what, module, line, broken, tests=None):
    """A line of a module as it is and broken; the tests of that module, or of another, must notice."""
    FAULTS.append(pytest.param(module, line, broken, tests or Path(module).name, id=what))


# fmt: off
fault("a wrong sign in dice", "loss", "return 1 - (2 * overlap", "return 1 + (2 * overlap")
fault("precision and recall swapped", "metrics", '"recall": _ratio(c.tp, c.tp + c.fn)', '"recall": _ratio(c.tp, c.tp + c.fp)')
fault("the field of view ignored", "metrics", "count(mask, predicted, region)", "count(mask, predicted)")
fault("no flip on the mask", "transforms", "cv2.remap(mask, map_x,", "cv2.remap(mask, size - map_x,")
fault("both eyes of a person on two sides", "data", "if pair.subject not in held_out]", "if pair.name not in held_out]")
fault("the EMA weights never follow", "optim", "mine.lerp_(theirs, share)", "pass")
fault("the EMA weights not kept", "train", "self.ema.model if self.ema else self.model", "self.model")
fault("red and blue swapped", "transforms", "image[:, :, ::-1].transpose(2, 0, 1)", "image.transpose(2, 0, 1)")
fault("validated in training mode", "train", "    model.eval()\n    losses = []", "    losses = []")
fault("the best epoch the one of highest loss", "train", '"] < state["best_loss"]', '"] > state["best_loss"]')
fault("the learning rate never falls", "optim", "return 0.5 * (1 + math.cos(", "return 1.0 + 0 * (1 + math.cos(")
fault("no optimizer on resuming", "train", 'self.optimizer.load_state_dict(value["optimizer"])', "pass", "checkpoint")
fault("no random state on resuming", "train", 'torch.set_rng_state(value["random"]["cpu"])', "pass", "checkpoint")
fault("no order on resuming", "train", 'set_epoch(self.sampler, config.seed, state["epoch"])', "pass", "checkpoint")
fault("steps along the raw gradient", "optim", "for number in range(iterations):", "for number in range(0):")
fault("two processes on the same images", "distributed", "(dataset, self.size, self.rank,", "(dataset, self.size, 0,")
fault("checkpoints that may run code", "checkpoint", "weights_only=True)", "weights_only=False)", "checkpoint")
fault("the gate mutes instead of amplifying", "model", "torch.addcmul(value, value, ", "value * (")
fault("tiles without a halo", "inference/segmenter", "y, x = max(0, top - halo), max(0, left - halo)", "y, x = top, left")
fault("a mirrored view not mirrored back", "inference/segmenter", "logits[:, ::step], -quarters", "logits, -quarters")
fault("an engine's result not compared", "inference/engine", "if not difference <= LIMITS[precision] * largest", "if False")
fault("vessels outside of the field of view", "inference/segmenter", "result[~fov] = outside or 0", "pass")
fault("masks cut anywhere above black", "inference/protocol", "(array > 127 for", "(array > 0 for", "test")
fault("half-written files", "utils", 'path.with_name(f".{uuid.uuid4().hex[:12]}.partial{path.suffix}")', "path")
# fmt: on


@pytest.mark.full
@pytest.mark.parametrize(("module", "line", "broken", "tests"), FAULTS)
def test_a_broken_line_is_noticed(module, line, broken, tests, tmp_path):
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
    assert done.returncode == 1, f"nobody noticed: {broken}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    print(f"{broken}: caught by {re.search(r'(?:FAILED|ERROR) tests/(.+?)(?: - |$)', done.stdout, re.M)[1]}")
