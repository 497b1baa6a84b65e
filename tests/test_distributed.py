"""Several processes, as torchrun starts them: two on this machine, over Gloo."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
from test_train import same_weights, tiny, weights_of, without_curves  # noqa: F401
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from retina_seg import cli
from retina_seg.checkpoint import LAST, load_last
from retina_seg.distributed import World, process_group
from retina_seg.images import write_image
from retina_seg.inference.batch import OUTPUTS, predict_images
from retina_seg.inference.segmenter import Segmenter
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.train import fit
from retina_seg.utils import UserError


def torchrun(*program) -> subprocess.Popen:
    """`program` in two processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *map(str, program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    pipe = subprocess.PIPE
    # a session of its own, so that nothing of it outlives the test
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def end(process: subprocess.Popen) -> tuple[int, str]:
    """The exit status, and all that was said."""
    try:
        out, err = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"did not end:\n{process.communicate()[1][-3000:]}")
    return process.returncode, out + err


def small_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))


def loss_of(network: nn.Module, rank: int) -> torch.Tensor:
    """The loss over the images of one process."""
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 1, 8, 8, generator=generator)
    return binary_cross_entropy_with_logits(network(x), y)


def segment(folder, output, world):
    """What `retina-seg predict` does with the folder's images."""
    segmenter = Segmenter.load("tiny", device="cpu", precision="float32")
    return predict_images(segmenter, [folder / "images"], folder / output, weights="tiny", progress=False, world=world)


TWO = """
import sys
from pathlib import Path
import torch
from retina_seg.config import TrainConfig
from retina_seg.distributed import process_group, set_epoch
from retina_seg.train import fit
from test_distributed import loss_of, segment, small_network

folder = Path(sys.argv[1])
with process_group() as world:
    network = small_network(seed=world.rank)  # those of rank 0 count
    parallel = world.parallel(network, world.device("cpu"))
    loss_of(parallel, world.rank).backward()
    del parallel
    sampler, orders = world.sampler(range(7), 42, shared_state=True), []
    for epoch in (0, 1):
        set_epoch(sampler, 42, epoch)
        orders.append(list(sampler))
    value = {"gradients": [parameter.grad for parameter in network.parameters()], "orders": orders}
    torch.save(value, folder / f"{world.rank}.pth")
    fit(TrainConfig.from_json(folder / "config.json"), progress=False, world=world)
    segment(folder, "two", world)
"""


@pytest.fixture(scope="module")
def folder(tiny_set, tmp_path_factory):
    """All that two processes of one job do: gradients, a training ("run"), a prediction ("two"). Read only."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "images/more").mkdir(parents=True)
    for number, name in enumerate(("0", "1", "2", "more/0")):
        write_image(folder / f"images/{name}.png", synthetic_image(number, 64, 72).image)
    (folder / "images/broken.png").write_bytes(b"no image")
    config = tiny(tiny_set, folder / "run", epochs=3, batch_size=1, device="cpu")
    (folder / "config.json").write_text(json.dumps({"config": asdict(config)}))
    (folder / "two.py").write_text(TWO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]))
        code, said = end(torchrun(folder / "two.py", folder))
    assert code == 0, said
    return folder


def test_gradients_are_the_mean_of_both_processes(folder):
    network = small_network(seed=0)
    ((loss_of(network, 0) + loss_of(network, 1)) / 2).backward()
    expected = [parameter.grad for parameter in network.parameters()]
    assert all(gradient.abs().max() > 1e-3 for gradient in expected)
    for rank in (0, 1):
        gradients = torch.load(folder / f"{rank}.pth", weights_only=True)["gradients"]
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)


def test_both_processes_share_the_items_of_an_epoch_in_another_order_each_time(folder):
    orders = [torch.load(folder / f"{rank}.pth", weights_only=True)["orders"] for rank in (0, 1)]
    for first, second in zip(*orders, strict=True):
        assert len(first) == len(second) == 4 and set(first + second) == set(range(7))  # one of seven twice
    assert orders[0][0] != orders[0][1]


def test_two_processes_train_nearly_as_one_with_twice_the_batch(folder, tiny_set, tmp_path):
    """Each takes Dice and batch normalisation over its own patches, so the weights are others and the losses near."""
    one = fit(tiny(tiny_set, tmp_path / "run", epochs=3), progress=False)
    assert json.loads((folder / "run/config.json").read_text())["processes"] == 2
    two = load_last(folder / "run")["state"]
    assert two["step"] == load_last(tmp_path / "run")["state"]["step"] == 6
    losses = [[row["train_loss"] for row in history] for history in (one.history, two["history"])]
    assert losses[1] == pytest.approx(losses[0], rel=0.1)
    names = [{path.name for path in run.iterdir()} for run in (tmp_path / "run", folder / "run")]
    assert names[0] | {"curves.png"} == names[1]


def test_two_processes_write_the_maps_that_one_would(folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = segment(folder, "one", World())
    torch.set_num_threads(threads)
    assert len(rows) == 5 and sum(row["status"] == "ok" for row in rows) == 4
    files = sorted(path.relative_to(folder / "one") for path in (folder / "one").rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(folder / "two") for path in (folder / "two").rglob("*") if path.is_file())
    assert len(files) == 4 * len(OUTPUTS) + 1
    for name in files:
        texts = [(folder / part / name).read_bytes() for part in ("one", "two")]
        if name.name == "summary.csv":  # the seconds differ
            tables = [list(csv.DictReader(text.decode().splitlines())) for text in texts]
            texts = [[{**row, "seconds": ""} for row in table] for table in tables]
        assert texts[0] == texts[1], name


def test_a_killed_process_ends_the_job_and_the_run_goes_on(folder, tmp_path, capsys):
    cut = tmp_path / "run"
    process = torchrun("-m", "retina_seg", "train", "--config", folder / "config.json", "--output", cut)
    began = time.monotonic()
    while not (cut / LAST).exists():  # it is under way
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.001)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    code, said = end(process)
    assert len(ranks) == 2 and code != 0 and "Signal 9" in said
    assert load_last(cut)["state"]["epoch"] < 3
    assert cli.main(["train", "--resume", str(cut)]) == 2
    assert "2 processes began this run, these are 1" in capsys.readouterr().err
    code, said = end(torchrun("-m", "retina_seg", "train", "--resume", cut))
    assert code == 0 and said.count("written to ") == 1, said
    assert same_weights(weights_of(cut), weights_of(folder / "run"))


def test_a_process_alone_is_its_own_world(monkeypatch, capsys):
    model, device = nn.Linear(1, 1), torch.device("cpu")
    with process_group() as world:
        assert world == World(0, 1, 0, 1) and world.is_main and world.parallel(model, device) is model
        world.barrier()  # and does not wait
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match="not as torchrun does.*unset them"), process_group():
        pass
    assert cli.main(["check", "anywhere"]) == 2
    assert "several processes share train and predict only" in capsys.readouterr().err
