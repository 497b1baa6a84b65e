"""The notebooks: each runs from top to bottom on its own, in small, and what is committed can be read on the web."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from retina_seg.model import attention_unet
from retina_seg.visualize import architecture

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ["data", "loss", "model", "train", "test", "own_images"]
every_notebook = pytest.mark.parametrize("name", NAMES)
TINY = {"size": 64, "epochs": 1, "batch_size": 2}
TINY_PATCHES = {**TINY, "patches": 2, "validation": "test"}


def read(path: Path) -> tuple[nbformat.NotebookNode, list[nbformat.NotebookNode], list[nbformat.NotebookNode]]:
    """The notebook at `path`, its code cells, and their outputs."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return notebook, cells, [output for cell in cells for output in cell.outputs]


def figures(outputs: list[nbformat.NotebookNode]) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.fixture
def run_in_small(tmp_path: Path, tiny_set: Path):
    """Runs a notebook in `tmp_path` with its parameters replaced, as papermill does; returns its number of figures."""
    own = {name: str(tmp_path / "jupyter") for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")}
    # nobody's own kernels and start-up files: python3 is the interpreter that runs this test
    environment = {**os.environ, **own, "JUPYTER_PREFER_ENV_PATH": "1", "OMP_NUM_THREADS": "1"}

    def run(name: str, **parameters) -> int:
        notebook, cells, _ = read(NOTEBOOKS / f"{name}.ipynb")
        (place,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
        known = {line.split(" = ")[0] for line in notebook.cells[place].source.splitlines()}
        if "DATA" in known:  # neither reads Data1 nor writes into results/
            parameters |= {"DATA": str(tmp_path / "no images"), "SYNTHETIC": str(tiny_set)}
        assert set(parameters) <= known
        for cell in cells:
            cell.outputs, cell.execution_count = [], None
        lines = ["import sys", f"assert sys.prefix == {sys.prefix!r}", *(f"{k} = {v!r}" for k, v in parameters.items())]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        # in a process of its own: Jupyter's sockets close when they like, and here warnings are errors
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return figures(read(path)[2])

    return run


def test_those_that_do_not_train_run(run_in_small, tmp_path, tiny_set):
    assert run_in_small("data", SHOWN=2, PATCH_SIZE=64) == 4
    assert run_in_small("loss", SIZE=64, SHIFT=5) == 3
    own = {"FOLDER": str(tiny_set / "train" / "image"), "OUTPUT": str(tmp_path / "out"), "WEIGHTS": "tiny"}
    assert run_in_small("own_images", **own) == 7 and len(list(tmp_path.glob("out/*_overlay.png"))) == 4


def test_train_writes_a_run_and_never_over_one(run_in_small, tmp_path):
    taken, other = tmp_path / "run", tmp_path / "other"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    outputs = {"OUTPUT": str(taken), "SECOND_OUTPUT": str(other), "LOOP_OUTPUT": str(tmp_path / "loop")}
    assert run_in_small("train", PRESET="notebook", CHANGES=TINY, SECOND_CHANGES=TINY_PATCHES, **outputs) == 2
    written = {path.name for path in (tmp_path / "run-2").iterdir()}
    assert written == {"checkpoint.pth", "config.json", "curves.png", "history.csv", "last.pth"}
    configs = [json.loads((folder / "config.json").read_text())["config"] for folder in (tmp_path / "run-2", other)]
    assert [(config["preset"], config["size"]) for config in configs] == [("notebook", 64), ("quick", 64)]
    assert [path.name for path in taken.iterdir()] == ["config.json"]
    assert (tmp_path / "loop" / "checkpoint.pth").is_file()


def test_model_and_test_use_the_newest_finished_run(run_in_small, tmp_path):
    """`model` trains where there is none; `test` scores that run, not one whose training has not ended."""
    first = {"RUN": str(tmp_path / "run"), "CHANGES": TINY}
    assert run_in_small("model", **first) == 4
    (tmp_path / "run").rename(tmp_path / "run-2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.pth").write_bytes((tmp_path / "run-2" / "checkpoint.pth").read_bytes())
    second = {"SECOND_RUN": str(tmp_path / "other"), "SECOND_CHANGES": TINY_PATCHES}
    assert run_in_small("test", COMPARISON=str(tmp_path / "both"), **first, **second) == 5
    assert not (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run-3").exists()
    assert (tmp_path / "other" / "metrics.json").is_file() and (tmp_path / "both" / "comparison.csv").is_file()
    value = json.loads((tmp_path / "run-2" / "metrics.json").read_text())
    assert len(value["images"]) == len(list((tmp_path / "run-2" / "images").glob("*_errors.png"))) == 2


def test_what_is_trained_is_what_is_tested():
    """`test` looks where `train` writes, and would train the same; `model` keeps its run elsewhere."""
    notebooks = [read(NOTEBOOKS / f"{name}.ipynb")[1] for name in ("model", "train", "test")]
    cells = [[cell for cell in notebook if cell.metadata] for notebook in notebooks]
    model, train, test = (dict(re.findall(r"^(\w+) = (.*?)(?:  #|$)", cell.source, re.M)) for (cell,) in cells)
    assert (test["RUN"], test["SECOND_RUN"]) == (train["OUTPUT"], train["SECOND_OUTPUT"])
    assert all(test[name] == train[name] for name in ("PRESET", "CHANGES", "SECOND", "SECOND_CHANGES"))
    assert model["RUN"] not in (test["RUN"], test["SECOND_RUN"])


def test_the_drawn_network_has_its_own_parts_channels_and_arrows():
    texts = [text.get_text() for text in architecture(attention_unet(), 32, 48).axes[0].texts]
    assert [text for text in texts if text][2:4] == ["e1.pool\n32\n24x16", "e2.conv\n64"]
    assert texts.count("") == 15  # an arrow each: 13 from part to part, 2 past others to the gates


@every_notebook
def test_is_thin(name):
    """Parameters, calls, figures, prose: what computes lives in the package. Links lead to notebooks."""
    notebook, cells, _ = read(NOTEBOOKS / f"{name}.ipynb")
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 25 and max(map(len, lines)) <= 100, cell.source
        assert not [line for line in lines if line.lstrip().startswith(("def ", "class ", "while "))], cell.source
        assert not re.search(r"fit\(.*progress", cell.source)  # no training in silence
    # JupyterLab opens links from the folder it was started in or below it alone: in notebooks/, no other file
    text = "\n".join(cell.source for cell in notebook.cells if cell not in cells)
    assert set(re.findall(r"\]\(([^)]+)\)", text)) <= {f"{name}.ipynb" for name in NAMES}


@every_notebook
def test_is_committed_as_it_ran(name):
    """A reader on the web sees figures, and nothing of one machine or one moment; progress bars are taken out by hand."""
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook, cells, outputs = read(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert figures(outputs) and path.stat().st_size < 700 * 1024
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    text = "\n".join(output.get("text") or output["data"].get("text/plain", "") for output in outputs)
    assert not re.search(r"Warning|%\||PosixPath|WindowsPath|(?<![\w.])/[a-z]\w+/|[A-Z]:\\", text)
    assert not re.search(r"\breal (test )?images", text)  # photos of people must not be published
    assert notebook.metadata.kernelspec.name == "python3" and set(notebook.metadata) == {"kernelspec", "language_info"}
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
