"""Several processes, as torchrun starts them: two on this machine, over Gloo."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from retina_seg.distributed import ALONE, Group, share
from retina_seg.folder import OUTPUTS
from retina_seg.images import write_picture
from retina_seg.resume import LAST, load_last
from retina_seg.synthetic import draw_photo, write_set
from retina_seg.train import TrainConfig
from retina_seg.utils import write_json

PREDICT_KIND = ("--device", "cpu", "--precision", "float32")


def launch(program: list[str], processes: int) -> subprocess.Popen:
    several = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}") if processes > 1 else ()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    return subprocess.Popen(
        [sys.executable, *several, *program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that nothing of it outlives the test
    )


def start(*arguments, processes: int = 2) -> subprocess.Popen:
    return launch(["-m", "retina_seg", *map(str, arguments)], processes)


def end(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"did not end in {timeout} s:\n{err[-3000:]}")
    return process.returncode, out, err


def call(*arguments, processes: int = 2) -> tuple[int, str, str]:
    return end(start(*arguments, processes=processes))


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The recipe of a small training, as a function of its changes: a config.json."""
    folder = tmp_path_factory.mktemp("several")
    write_set(folder / "set", 4, 1, (64, 64), progress=False)

    def written(**changes):
        values = {"size": 32, "repeats": 2, "epochs": 2, "precision": "float32", "device": "cpu", "save_every": 2}
        config = TrainConfig.fast(data=str(folder / "set"), model_arguments={"dropout": 0.0}, **{**values, **changes})
        path = folder / f"{len(list(folder.iterdir()))}.json"
        write_json(path, {"recipe": vars(config)})
        return path

    return written


def weights(run) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoint.pth", weights_only=True)["state_dict"]


def table(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


# ---------------------------------------------------------------------------------------------------------------- in one


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_is_shared_out_whole_and_every_photo_counts_alike(count, size):
    batch = list(range(100, 100 + count))
    parts = [share(batch, Group(rank, size)) for rank in range(size)]
    assert [photo for part, weight in parts if weight for photo in part] == batch
    assert all(part for part, _ in parts)  # all take part in every step
    mean = sum(weight * np.mean(part) for part, weight in parts) / size
    assert mean == pytest.approx(np.mean(batch))


def test_a_process_alone_is_its_own_group():
    assert (ALONE.is_first, ALONE.highest(3), ALONE.gather("a"), ALONE.from_first(lambda: 5)) == (True, 3, ["a"], 5)
    model = torch.nn.Linear(1, 1)
    assert ALONE.parallel(model, torch.device("cpu")) is model
    ALONE.wait_for("what never comes")  # and does not wait


# --------------------------------------------------------------------------------------------------------------- training


GRADIENTS = """
import sys
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from retina_seg.distributed import join
from retina_seg.train import TrainConfig, _Batches

class Photos:  # three: the second batch has one only
    def __len__(self):
        return 3
    def __getitem__(self, index):
        drawn = torch.Generator().manual_seed(index)
        return torch.rand(3, 8, 8, generator=drawn), torch.rand(1, 8, 8, generator=drawn)

def gradients(group):  # in a function: the wrapped network is gone before the processes part
    group.meet(torch.device("cpu"))
    torch.manual_seed(group.rank)  # the first one's weights count
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    parallel = group.parallel(model, torch.device("cpu"))
    batches = _Batches(Photos(), TrainConfig(batch_size=2 // group.size, frame="fov"), 0, group=group)
    loss_fn = batches.weighted(binary_cross_entropy_with_logits)
    for photos, masks in batches.loader:  # gradients add up over the two batches
        loss_fn(parallel(photos), masks).backward()
    if group.is_first:
        torch.save([parameter.grad for parameter in model.parameters()], sys.argv[1])

with join() as group:
    gradients(group)
"""


def test_gradients_of_two_processes_are_those_of_one_with_twice_the_batch(tmp_path):
    """To rounding, where loss and network take each photo for itself; an incomplete batch too."""
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    for name, processes in (("one", 1), ("two", 2)):
        script = [str(tmp_path / "gradients.py"), str(tmp_path / name)]
        code, _, shown = end(launch(script, processes))
        assert code == 0, shown
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert all(gradient.abs().max() > 1e-3 for gradient in one)
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-7)


def test_two_processes_train_as_one_with_twice_the_batch_but_for_dice_and_norms(recipe, tmp_path):
    """Unlike windows: each process takes dice and BatchNorm over its own, so the weights are others and the losses near."""
    two, one = recipe(batch_size=1), recipe(batch_size=2)
    assert call("train", "--config", two, "--output", tmp_path / "two")[0] == 0
    assert call("train", "--config", one, "--output", tmp_path / "one", processes=1)[0] == 0
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert json.loads((tmp_path / "two/config.json").read_text())["processes"] == 2
    histories = [table(tmp_path / name / "history.csv") for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1]) == 2
    for first, second in zip(*histories, strict=True):
        assert float(second["train_loss"]) == pytest.approx(float(first["train_loss"]), rel=0.05)
    assert load_last(tmp_path / "one")[0]["state"]["step"] == load_last(tmp_path / "two")[0]["state"]["step"] == 8


def test_a_killed_process_ends_the_job_and_the_run_goes_on(recipe, tmp_path):
    config = recipe(epochs=6, batch_size=1)
    assert call("train", "--config", config, "--output", tmp_path / "whole")[0] == 0
    process = start("train", "--config", config, "--output", tmp_path / "cut")
    began = time.monotonic()
    while not (tmp_path / "cut" / LAST).exists():  # it is under way
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.02)
    found = subprocess.run(
        ["pgrep", "-f", f"retina_seg train --config {config} --output {tmp_path / 'cut'}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    ranks = sorted(int(pid) for pid in found if int(pid) != process.pid)
    assert len(ranks) == 2
    os.kill(ranks[-1], signal.SIGKILL)
    killed = time.monotonic()
    code, _, shown = end(process, 120)
    assert code != 0 and time.monotonic() - killed < 90
    assert "Signal 9" in shown or "SIGKILL" in shown or "exitcode" in shown
    assert load_last(tmp_path / "cut")[0] is not None
    assert call("train", "--resume", tmp_path / "cut", processes=1)[2].count("begun by 2 processes") == 1
    assert call("train", "--resume", tmp_path / "cut")[0] == 0
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())


def test_a_mistake_is_said_once(tmp_path):
    code, out, err = call("train", "--data", tmp_path / "nowhere", "--output", tmp_path / "run")
    assert code != 0 and (out + err).count("retina-seg: error:") == 1 and not (tmp_path / "run").exists()
    code, out, err = call("check", tmp_path)
    assert code != 0 and (out + err).count("several processes share train and predict only") == 1


# -------------------------------------------------------------------------------------------------------------- predicting


def test_two_processes_share_photos_out_and_write_what_one_would(tmp_path):
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    for number in range(5):
        write_picture(photos / f"{number}.png", draw_photo(number, 64, 72).photo)
    write_picture(photos / "more/0.png", draw_photo(9, 64, 72).photo)  # a name that is taken
    (photos / "broken.png").write_bytes(b"no picture")
    for name, processes in (("one", 1), ("two", 2)):
        code, out, err = call(
            "predict", photos, "--output", tmp_path / name, "--weights", "drive", *PREDICT_KIND, processes=processes
        )
        assert code == 1 and "6 segmented, 0 done before, 1 failed" in out, err
        assert err.count("broken.png: ") == 1
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert len(files) == 6 * len(OUTPUTS) + 1
    for name in files:
        if name != "summary.csv":  # its seconds differ
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    tables = [table(tmp_path / name / "summary.csv") for name in ("one", "two")]
    for row in [row for table in tables for row in table]:
        row.pop("seconds")
    assert tables[0] == tables[1]
    # broken off: one process has written its rows, the other only some pictures
    (tmp_path / "two/3_vessels.png").unlink()
    rows = list(csv.reader((tmp_path / "two/summary.csv").read_text().splitlines()))
    with open(tmp_path / "two/summary.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows[:3])
    with open(tmp_path / "two/.summary.1.csv", "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([*rows[3:], rows[1][:2]])  # the last line is cut short
    code, out, _ = call("predict", photos, "--output", tmp_path / "two", "--weights", "drive", *PREDICT_KIND)
    assert code == 1 and "1 segmented, 5 done before, 1 failed" in out
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
