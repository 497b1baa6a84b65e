"""A training in a process of its own, killed or out of disk at any moment, resumes and ends with the same weights.

The long form, 25 kills and 10 full disks: pytest -m full.
"""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
import torch
from test_train import same_weights, tiny, weights_of

from retina_seg.checkpoint import LAST, load_last
from retina_seg.config import TrainConfig
from retina_seg.train import fit

resource = pytest.importorskip("resource")  # POSIX only, as SIGKILL is
EPOCHS, STEPS_AN_EPOCH = 4, 12
STEPS = EPOCHS * STEPS_AN_EPOCH
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


def half_written(folder):
    return list(folder.glob(".*.partial*"))


@pytest.fixture(scope="module")
def config(tiny_set, tmp_path_factory):
    """The config.json of four epochs of 12 steps with dropout, EMA weights and validation: some seconds."""
    folder = tmp_path_factory.mktemp("config")
    arguments = {"width": 8, "deepest": 16, "fine": 4, "dropout": 0.2}
    changes = {"patches": 2 * STEPS_AN_EPOCH, "epochs": EPOCHS, "validation": "test", "keep": "best"}
    value = asdict(tiny(tiny_set, folder, model_arguments=arguments, **changes))
    (folder / "config.json").write_text(json.dumps({"config": value}))
    return folder / "config.json"


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of a run that was never stopped, by one thread as the processes. Read only."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    yield fit(replace(TrainConfig.from_json(config), output=str(folder)), progress=False).folder
    torch.set_num_threads(threads)


def kill_at(run, folder, moment, saved, rng):
    """Kills `run`, which starts after step `saved`, at a random time: in training, while it writes, while it validates."""
    if moment == "validation":
        epoch_end = STEPS_AN_EPOCH * rng.randint(saved // STEPS_AN_EPOCH + 1, EPOCHS)
        run.wait_for(lambda: run.step >= epoch_end)
        time.sleep(rng.uniform(0, 0.01))
    else:
        step = rng.randint(saved, max(saved, STEPS - STEPS_AN_EPOCH - 1))
        run.wait_for(lambda: (folder / "config.json").exists() and run.step >= step)
        if moment == "write":
            run.wait_for(lambda: half_written(folder))
        time.sleep(rng.uniform(0, 0.02) if moment == "any" else 0)
    run.process.kill()
    assert run.end() == -9, run.said


def check_what_is_saved(run, folder):
    """No file is torn, and no more than one epoch is lost. Returns the step that was saved."""
    saved = (load_last(folder) or {"state": {"step": 0}})["state"]["step"]
    assert saved % STEPS_AN_EPOCH == 0 and saved >= run.step - STEPS_AN_EPOCH
    return saved


def ends_equal(folder, whole):
    """The run, left alone, ends with the weights of the one that was never stopped."""
    fit(replace(TrainConfig.from_json(folder / "config.json"), output=str(folder)), resume=True, progress=False)
    assert same_weights(weights_of(folder), weights_of(whole)) and not half_written(folder)
    assert same_weights(load_last(folder)["model"], load_last(whole)["model"])


def killed_and_resumed(config, folder, moments, rng, whole):
    """A run that is killed at each of `moments`, and resumed each time."""
    arguments, saved = ("--config", config, "--output", folder), 0
    for moment in moments:
        with Training(*arguments) as run:
            kill_at(run, folder, moment, saved, rng)
        saved = check_what_is_saved(run, folder)
        print(f"killed ({moment}) at step {run.step}, saved {saved}, half-written {len(half_written(folder))}")
        arguments = ("--resume", folder)
    ends_equal(folder, whole)


def test_a_run_killed_three_times_ends_with_the_same_weights(config, tmp_path, whole):
    killed_and_resumed(config, tmp_path / "run", ("write", "any", "validation"), random.Random(0), whole)


@pytest.mark.full
@pytest.mark.parametrize("number", range(25))
def test_a_run_killed_at_a_random_moment_ends_with_the_same_weights(config, tmp_path, whole, number):
    moment = ("any", "any", "write", "any", "validation")[number % 5]
    killed_and_resumed(config, tmp_path / "run", [moment], random.Random(number), whole)


@pytest.mark.full
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
@pytest.mark.parametrize("number", range(10))
def test_a_run_out_of_disk_says_so_keeps_what_was_saved_and_goes_on_with_room(config, tmp_path, whole, number):
    rng, folder = random.Random(number), tmp_path / "run"
    step = rng.randint(STEPS_AN_EPOCH + 1, STEPS - STEPS_AN_EPOCH)
    with Training("--config", config, "--output", folder) as run:
        run.wait_for(lambda: run.step >= step)
        # a file that may not grow beyond some byte stands for a full disk
        room, hard = rng.randrange((folder / LAST).stat().st_size), resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (room, hard))
        assert run.end() == 2, run.said
    assert run.said.count("error: ") == 1 and re.search(r"(checkpoint|last)\.pth: cannot be written", run.said)
    print(f"full at step {run.step}, {room} bytes left, saved {check_what_is_saved(run, folder)}")
    ends_equal(folder, whole)
