"""A training in a process of its own, killed or out of disk at any moment, resumes and ends with the same weights.

The long form, 25 kills and 10 full disks: pytest -m full.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
from test_train import weights_of

from retina_seg.resume import LAST, load_last
from retina_seg.train import TrainConfig

resource = pytest.importorskip("resource")  # POSIX only, as SIGKILL is
SAVE_EVERY, STEPS_AN_EPOCH, STEPS = 4, 18, 54
LIMIT = 120  # seconds that a training of a few may take


class Training:
    """`retina-seg train` as a process; `step` is the last step that its progress bar reported."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "retina_seg", "train", *map(str, arguments)]
        environment = {**os.environ, "TQDM_MININTERVAL": "0", "OMP_NUM_THREADS": "1"}  # every step is reported
        self.step, self.said = 0, ""
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        while chunk := os.read(self.process.stderr.fileno(), 2**16):
            self.said += chunk.decode(errors="replace")
            steps = re.findall(rf"\| (\d+)/{STEPS} \[", self.said[-1000:])
            self.step = int(steps[-1]) if steps else self.step

    def wait_for(self, condition):
        """Returns when `condition()` holds, looking all the time."""
        end = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, f"ended before its moment came: {self.said}"
            assert time.monotonic() < end, f"nothing for {LIMIT} s: {self.said}"
            time.sleep(0.0005)

    def end(self):
        """Waits for the end; returns the exit status."""
        status = self.process.wait(LIMIT)
        self._reader.join(LIMIT)
        self.process.stderr.close()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if not self.process.stderr.closed:  # the test failed
            self.process.kill()
            self.end()


def digest(folder) -> str:
    """SHA-256 of the weights in the folder's checkpoint.pth, by name."""
    content = hashlib.sha256()
    for name, value in sorted(weights_of(folder).items()):
        content.update(name.encode() + value.contiguous().numpy().tobytes())
    return content.hexdigest()


def half_written(folder):
    return list(folder.glob(".*.partial*"))


@pytest.fixture(scope="module")
def config(tiny_set, tmp_path_factory):
    """The file of a recipe of three epochs of 18 steps with dropout, averaged weights and validation: some seconds."""
    recipe = TrainConfig.quick(
        data=str(tiny_set),
        model_arguments={"width": 8, "deepest": 16, "fine": 4},
        size=64,
        fov_diameter=None,
        repeats=9,
        batch_size=2,
        epochs=3,
        validation="test",
        keep="best",
        precision="float32",
        save_every=SAVE_EVERY,
    )
    path = tmp_path_factory.mktemp("recipe") / "config.json"
    path.write_text(json.dumps({"recipe": asdict(recipe)}))
    return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """(digest of the weights, seconds a step) of a run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with Training("--config", config, "--output", folder) as run:
        run.wait_for((folder / "config.json").exists)
        start = time.monotonic()
        run.wait_for(lambda: run.step == STEPS)
        seconds = time.monotonic() - start
        assert run.end() == 0, run.said
    return digest(folder), seconds / STEPS


def kill_at(run, folder, moment, saved, rng, seconds_a_step):
    """Kills `run`, which starts behind step `saved`, at a random time: in training, while it writes, while it validates."""
    if moment == "validation":
        epoch_end = STEPS_AN_EPOCH * rng.randint(saved // STEPS_AN_EPOCH + 1, STEPS // STEPS_AN_EPOCH)
        run.wait_for(lambda: run.step >= epoch_end)
        time.sleep(rng.uniform(0, 0.5 * seconds_a_step))
    else:
        step = rng.randint(saved, max(saved, STEPS - 2 * SAVE_EVERY))
        run.wait_for(lambda: (folder / "config.json").exists() and run.step >= step)
        if moment == "write":
            run.wait_for(lambda: half_written(folder))
        else:
            time.sleep(rng.uniform(0, seconds_a_step))
    run.process.kill()
    assert run.end() == -9, run.said


def check_what_is_saved(run, folder):
    """No file is torn, and no more than `save_every` steps are lost. Returns the step that was saved."""
    value, damaged = load_last(folder)
    saved = value["state"]["step"] if value else 0
    assert not damaged and saved >= run.step - SAVE_EVERY
    return saved


def ends_equal(arguments, folder, whole):
    """The run, left alone, ends with the weights of the one that was never stopped."""
    with Training(*arguments) as run:
        assert run.end() == 0, run.said
    assert digest(folder) == whole[0]


def killed_and_resumed(config, folder, moments, rng, whole):
    """A run that is killed at each of `moments`, and resumed each time."""
    arguments, saved = ("--config", config, "--output", folder), 0
    for moment in moments:
        with Training(*arguments) as run:
            kill_at(run, folder, moment, saved, rng, whole[1])
        torn = len(half_written(folder))
        saved = check_what_is_saved(run, folder)
        print(f"killed ({moment}) at step {run.step}, saved {saved}, half-written files {torn}")
        arguments = ("--resume", folder)
    ends_equal(arguments, folder, whole)
    assert not half_written(folder)


def test_a_run_killed_three_times_ends_with_the_same_weights(config, tmp_path, whole):
    killed_and_resumed(config, tmp_path / "run", ("write", "any", "validation"), random.Random(0), whole)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("number", range(25))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_weights(config, tmp_path, whole, number):
    moment = ("any", "any", "write", "any", "validation")[number % 5]
    killed_and_resumed(config, tmp_path / "run", [moment], random.Random(number), whole)


# ---------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own of 64 MB where one may be mounted, else a plain folder; and whether it is a disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0
    if not mounted and not hasattr(resource, "prlimit"):
        pytest.skip("needs the right to mount a small disk, or Linux")
    yield folder, mounted
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk, mounted, run, room):
    """Leaves `room` bytes on the disk until `run` ends; without a disk, its files may not grow beyond `room` bytes."""
    if not mounted:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (room, hard))
        return
    with open(disk / "filler", "wb", buffering=0) as filler:
        while run.process.poll() is None:  # also what the run itself sets free
            there = os.statvfs(disk)
            with contextlib.suppress(OSError):  # the run wrote in between
                filler.write(bytes(max(0, there.f_bavail * there.f_frsize - room)))
            time.sleep(0.001)


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_a_run_out_of_disk_says_so_keeps_what_was_saved_and_goes_on_with_room(config, small_disk, whole, number):
    (disk, mounted), rng = small_disk, random.Random(number)
    folder = disk / "run"
    step = STEPS_AN_EPOCH * rng.randrange(3) + rng.randint(5, 10)  # what is written next is last.pth
    with Training("--config", config, "--output", folder) as run:
        run.wait_for(lambda: run.step >= step)
        room = rng.randrange((folder / LAST).stat().st_size)
        fill(disk, mounted, run, room)
        assert run.end() == 2, run.said
    said = [line for line in run.said.splitlines() if line.strip() and not line.startswith("training:")]
    assert len(said) == 1 and said[0].startswith(f"retina-seg: error: {folder / LAST}: cannot be written"), run.said
    saved = check_what_is_saved(run, folder)
    print(f"{'disk' if mounted else 'limit'} full at step {run.step}, {room} bytes left, saved {saved}: {said[0]}")
    (disk / "filler").unlink(missing_ok=True)
    ends_equal(("--resume", folder), folder, whole)
