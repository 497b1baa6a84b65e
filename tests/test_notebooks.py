"""The notebooks: each runs from top to bottom on its own, in small, and what is committed is fit to be read on the web."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ("data", "loss", "model", "train", "test")
TINY = {"size": 64, "epochs": 1, "batch_size": 2}


def read(name: str) -> nbformat.NotebookNode:
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameter_cells(notebook: nbformat.NotebookNode) -> list[int]:
    return [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


# ----------------------------------------------------------------------------------------------------------- executed


@pytest.fixture
def run_in_small(tmp_path: Path, tiny_set: Path):
    """Runs a notebook in `tmp_path` with its parameters replaced, as papermill does; gives it back with its outputs."""
    environment = {
        **os.environ,
        # nobody's own kernels and start-up files: python3 is the interpreter that runs this test
        "JUPYTER_PREFER_ENV_PATH": "1",
        "JUPYTER_DATA_DIR": str(tmp_path / "jupyter"),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "jupyter"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "OMP_NUM_THREADS": "1",  # tiny pictures: more threads would only get in each other's way
    }

    def run(name: str, **parameters) -> nbformat.NotebookNode:
        notebook = read(name)
        (place,) = parameter_cells(notebook)
        known = {line.split(" = ")[0] for line in notebook.cells[place].source.splitlines()}
        if "DATA" in known:  # whatever lies in Data1 here: the tests never read it, nor write into results/
            parameters = {"DATA": str(tmp_path / "no photos"), "SYNTHETIC": str(tiny_set), **parameters}
        assert set(parameters) <= known
        lines = [f"{key} = {value!r}" for key, value in parameters.items()]
        lines += ["import sys", f"assert sys.prefix == {sys.prefix!r}"]
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
        for cell in code_cells(notebook):
            cell.outputs, cell.execution_count = [], None
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        # in a process of its own: Jupyter's sockets and event loops close when they like, and here warnings are errors
        command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--inplace", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        notebook = nbformat.read(path, as_version=4)
        assert all(cell.execution_count for cell in code_cells(notebook))
        return notebook

    return run


def test_data_runs(run_in_small):
    notebook = run_in_small("data", SHOWN=2, CROP=64)
    assert len(pictures(notebook)) == 4


def test_loss_runs(run_in_small):
    notebook = run_in_small("loss", SIZE=64, SLIDE=5)
    assert len(pictures(notebook)) == 3


def test_model_trains_its_own_run_where_there_is_none(run_in_small, tmp_path):
    notebook = run_in_small("model", RUN=str(tmp_path / "run"), CHANGES=TINY)
    assert (tmp_path / "run" / "checkpoint.pth").is_file()
    assert len(pictures(notebook)) == 2


@pytest.mark.parametrize("preset", ["notebook", "fast"])
def test_train_writes_a_run_and_never_over_one(run_in_small, tmp_path, preset):
    taken = tmp_path / "run"
    taken.mkdir()
    (taken / "config.json").write_text("{}")
    changes = TINY if preset == "notebook" else {**TINY, "repeats": 1}
    beside = {"BESIDE_CHANGES": {**TINY, "repeats": 1, "validation": "test"}, "BESIDE_OUTPUT": str(tmp_path / "beside")}
    notebook = run_in_small("train", PRESET=preset, CHANGES=changes, OUTPUT=str(taken), **beside)
    written = {path.name for path in (tmp_path / "run-2").iterdir()}
    assert written == {"checkpoint.pth", "config.json", "curves.png", "history.csv", "last.pth"}
    recipe = json.loads((tmp_path / "run-2" / "config.json").read_text())["recipe"]
    assert (recipe["preset"], recipe["size"], recipe["epochs"]) == (preset, 64, 1)
    assert [path.name for path in taken.iterdir()] == ["config.json"]
    recipe = json.loads((tmp_path / "beside" / "config.json").read_text())["recipe"]
    assert recipe["preset"] == "quick"
    assert len(pictures(notebook)) == 2


def test_test_trains_where_there_is_no_run_and_scores_it(run_in_small, tmp_path):
    beside = {"BESIDE_CHANGES": {**TINY, "repeats": 1}, "RUN_BESIDE": str(tmp_path / "beside")}
    compared = {"COMPARISON": str(tmp_path / "comparison")}
    notebook = run_in_small("test", RUN=str(tmp_path / "run"), CHANGES=TINY, **beside, **compared)
    assert (tmp_path / "beside" / "metrics.json").is_file() and (tmp_path / "comparison" / "comparison.csv").is_file()
    value = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"frame", "fov"} <= set(value)
    assert len(value["images"]) == len(list((tmp_path / "run" / "images").glob("*_errors.png"))) == 2
    assert len(pictures(notebook)) == 7


def test_test_scores_the_run_that_is_there(run_in_small, tmp_path, tiny_run):
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoint.pth").write_bytes((tiny_run / "checkpoint.pth").read_bytes())
    run_in_small("test", RUN=str(run), BESIDE="notebook", RUN_BESIDE=str(run), COMPARISON=str(tmp_path / "comparison"))
    assert (run / "metrics.json").is_file()
    assert not (run / "history.csv").exists()  # nothing was trained


# ---------------------------------------------------------------------------------------------------------- as committed


@pytest.mark.parametrize("name", NAMES)
def test_is_thin(name):
    """Parameters, calls, pictures, prose: what computes lives in the package."""
    notebook = read(name)
    assert len(parameter_cells(notebook)) == 1
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 20, cell.source
        assert not [line for line in lines if line.lstrip().startswith(("def ", "class ", "while "))], cell.source
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(prose) >= len(code_cells(notebook)) * 0.7


@pytest.mark.parametrize("name", NAMES)
def test_is_committed_as_it_ran(name):
    """A reader on the web sees pictures; nothing in the file is of one machine or one moment."""
    notebook = read(name)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert pictures(notebook)
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 700_000
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = [output.get("text") or output["data"].get("text/plain", "") for output in outputs]
    told = json.dumps([text for text in shown if text])
    assert "Warning" not in told
    assert not re.findall(r"(?<![\w.])/[a-z]\w+/|[A-Z]:\\", told)  # where somebody's files lie says nothing to others
    assert "real photos" not in told  # photos of people are not ours to publish
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    prose = "\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)]+)\)", prose):
        assert (NOTEBOOKS / target).is_file(), target
