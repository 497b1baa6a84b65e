"""Several processes, as torchrun starts them: two on this machine, over Gloo. They run `job` of this file."""

import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import call, files, write
from test_train import same_weights, tiny, weights_of, without_curves  # noqa: F401
from torch import nn

from retina_seg.checkpoint import LAST, load_last
from retina_seg.config import TrainConfig
from retina_seg.distributed import World, process_group, set_epoch
from retina_seg.inference.batch import OUTPUTS, predict_images
from retina_seg.inference.segmenter import Segmenter
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.train import fit
from retina_seg.utils import UserError

SMALL = {"width": 4, "deepest": 8, "fine": 4, "dropout": 0.2}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))


def loss_of(model, rank):
    """The loss over the images of one process."""
    return model(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))).square().mean()


def predict(folder, output, world):
    segmenter = Segmenter.load("tiny", device="cpu", precision="float32")
    return predict_images(segmenter, [folder / "images"], folder / output, progress=False, world=world)


def job(folder):
    """Gradients, a training ("run"), the end of a killed one ("killed"), a prediction ("two")."""
    config = TrainConfig.from_json(folder / "config.json")
    with process_group() as world:
        model = network(seed=world.rank)  # the weights of rank 0 count
        parallel = world.parallel(model, world.device("cpu"))
        loss_of(parallel, world.rank).backward()
        torch.save([parameter.grad for parameter in model.parameters()], folder / f"{world.rank}.pth")
        fit(config, progress=False, world=world)
        fit(replace(config, output=str(folder / "killed")), resume=True, progress=False, world=world)
        predict(folder, "two", world)


def torchrun(*program) -> subprocess.Popen:
    """`program` in two processes of one thread each, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


def end(process) -> str:
    """All that was said; nothing of the process outlives this call."""
    try:
        return process.communicate(timeout=240)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tiny_set, tmp_path_factory):
    """What two processes wrote: a training ("killed") that one of them did not survive, then `job`. Read only."""
    folder = tmp_path_factory.mktemp("two")
    for number, name in enumerate(("0", "1", "2", "more/0")):
        write(folder / f"images/{name}.png", synthetic_image(number, 64, 72).image)
    (folder / "images/broken.png").write_bytes(b"no image")
    config = tiny(tiny_set, folder / "run", epochs=3, batch_size=1, device="cpu", model_arguments=SMALL)
    (folder / "config.json").write_text(json.dumps({"config": asdict(config)}))
    process = torchrun("-m", "retina_seg", "train", "--config", folder / "config.json", "--output", folder / "killed")
    while not (folder / "killed" / LAST).exists():  # it is under way
        assert process.poll() is None
        time.sleep(0.001)
    ranks = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    assert "Signal 9" in end(process) and process.returncode  # all have ended
    assert len(ranks) == 2 and load_last(folder / "killed")["state"]["epoch"] < 3
    said = end(process := torchrun(__file__, folder))
    assert process.returncode == 0, said
    return folder


def test_a_run_goes_on_after_a_process_was_killed_with_as_many_and_ends_the_same(folder, capsys):
    assert same_weights(weights_of(folder / "killed"), weights_of(folder / "run"))
    assert call("train", "--resume", folder / "killed") == 2
    assert "2 processes began this run, these are 1" in capsys.readouterr().err


def test_gradients_are_the_mean_of_both_processes(folder):
    model = network(seed=0)
    ((loss_of(model, 0) + loss_of(model, 1)) / 2).backward()
    expected = [parameter.grad for parameter in model.parameters()]
    for rank in (0, 1):
        gradients = torch.load(folder / f"{rank}.pth", weights_only=True)
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_two_processes_train_nearly_as_one_with_twice_the_batch(folder, tiny_set, tmp_path):
    """Each takes Dice and batch normalisation over its own patches, so the weights are others and the losses near."""
    one = fit(tiny(tiny_set, tmp_path, epochs=3, model_arguments=SMALL), progress=False)
    two = load_last(folder / "run")["state"]
    assert two["step"] == load_last(tmp_path)["state"]["step"] == 6
    losses = [[row["train_loss"] for row in history] for history in (one.history, two["history"])]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    assert {path.name for path in tmp_path.iterdir()} | {"curves.png"} == {p.name for p in (folder / "run").iterdir()}


def test_two_processes_write_the_maps_that_one_would(folder):
    rows = predict(folder, "one", World())
    assert [row["status"] == "ok" for row in rows].count(True) == 4 == len(rows) - 1
    written = [files(folder / kind) for kind in ("one", "two")]
    assert written[0].keys() == written[1].keys() and len(written[0]) == 4 * len(OUTPUTS) + 2
    for name in written[0]:
        one, two = (maps[name] for maps in written)
        if not name.endswith(".png"):  # the seconds differ
            read = json.loads if name.endswith(".json") else lambda text: csv.DictReader(text.decode().split("\n"))
            one, two = ([{**row, "seconds": ""} for row in read(text)] for text in (one, two))
        assert one == two, name


def test_two_processes_share_the_items_of_an_epoch_in_an_order_of_its_own():
    samplers = [World(rank, 2).sampler(range(8), seed=1, shared_state=False) for rank in (0, 1)]
    epochs = []
    for epoch in (0, 1, 0):
        for sampler in samplers:
            set_epoch(sampler, 1, epoch)
        epochs.append([list(sampler) for sampler in samplers])
        assert sorted(epochs[-1][0] + epochs[-1][1]) == list(range(8))
    assert epochs[0] == epochs[2] != epochs[1]


def test_a_process_alone_is_its_own_world(monkeypatch, capsys):
    with process_group() as world:
        assert world == World(0, 1, 0, 1) and world.is_main
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="not as torchrun does.*unset them"), process_group():
        pass
    assert call("check", "anywhere") == 2
    assert "several processes share train and predict only" in capsys.readouterr().err


if __name__ == "__main__":
    job(Path(sys.argv[1]))
