"""The ONNX file: torch's answers at any size, all that must be known in it, and nothing left where it could not be made."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from retina_seg.predict import Segmenter
from retina_seg.synthetic import draw_photo
from torch import nn

from retina_seg import cli, export
from retina_seg.images import read_label, write_picture
from retina_seg.model import build_model, save_model
from retina_seg.utils import UserError

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
README = Path(__file__).parents[1] / "README.md"


def lively(name: str) -> nn.Module:
    """A network whose normalisations all do something."""
    torch.manual_seed(1)
    model = build_model(name).eval()
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.weight.uniform_(0.5, 1.5), norm.bias.uniform_(-0.5, 0.5)
            norm.running_mean.uniform_(-0.2, 0.2), norm.running_var.uniform_(0.5, 1.5)
    return model


def call(*arguments) -> int:
    return cli.main(["export", *map(str, arguments)])


@pytest.mark.parametrize("name", ["attention_unet", "fast_attention_unet"])
def test_onnxruntime_answers_as_torch_at_any_size(name, tmp_path):
    model = lively(name)
    save_model(tmp_path / "weights.pth", model, name, {}, threshold=0.3)
    target = tmp_path / "new/vessels.onnx"
    assert export.export(tmp_path / "weights.pth", target) < 1e-4
    assert [path.name for path in target.parent.iterdir()] == ["vessels.onnx"]
    session = onnxruntime.InferenceSession(target)
    spread = []
    for count, height, width in ((1, 64, 64), (3, 72, 200), (1, 344, 96)):
        photos = torch.rand(count, 3, height, width)
        with torch.inference_mode():
            expected = torch.sigmoid(model(photos)).numpy()
        (found,) = session.run(["probability"], {"photo": photos.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-4)
        spread.append(np.ptp(expected))
    assert min(spread) > 0.01  # a constant would agree with itself
    notes = session.get_modelmeta().custom_metadata_map
    assert (notes["threshold"], notes["stride"], notes["channel_order"]) == ("0.3", str(model.stride), "BGR")
    assert (notes["frame"], notes["height"], notes["width"]) == ("squeeze", "512", "512")
    assert "not a medical device" in notes["notice"]


def readme_lines() -> str:
    blocks = [part.split("```")[0] for part in README.read_text(encoding="utf-8").split("```python\n")[1:]]
    return next(block for block in blocks if "onnxruntime" in block)


def test_the_readmes_ten_lines_do_without_torch_what_the_segmenter_does(tmp_path, capsys):
    assert call("--weights", "general", "--output", tmp_path / "vessels.onnx") == 0
    assert "differ from torch's by at most" in capsys.readouterr().out
    lines = readme_lines()
    assert len([line for line in lines.splitlines() if line]) == 10
    photo = draw_photo(77, 584, 565).photo
    write_picture(tmp_path / "eye.png", photo)  # what a camera compresses away is not the question here
    os.replace(tmp_path / "eye.png", tmp_path / "eye.jpg")  # OpenCV goes by the content
    code = f"{lines}\nimport sys\nassert 'torch' not in sys.modules and 'retina_seg' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    found = read_label(tmp_path / "vessels.png") > 127
    expected = Segmenter.load("general", device="cpu", precision="float32").vessels(photo)
    f1 = 2 * (found & expected).sum() / (found.sum() + expected.sum())
    print("F1", f1)
    assert expected.mean() > 0.02 and f1 > 0.95


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_remedy(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert call("--weights", "drive", "--output", tmp_path / "vessels.onnx") == 2
    shown = capsys.readouterr().err
    assert 'pip install "retina_seg[onnx]"' in shown and package in shown and shown.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    target = tmp_path / "vessels.onnx"
    target.write_bytes(b"the one before")
    monkeypatch.setattr(export, "_onnx_file", lambda *_: b"")
    monkeypatch.setattr(export, "_difference", lambda *_: 2e-4)
    with pytest.raises(UserError, match="not written.*0.0002"):
        export.export("drive", target)
    monkeypatch.setattr(export, "_difference", lambda *_: float("nan"))
    with pytest.raises(UserError, match="not written"):
        export.export("drive", target)
    assert target.read_bytes() == b"the one before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("weights", "output", "named"),
    [
        ("nobody", "a.onnx", "nobody"),
        ("noise.pth", "a.onnx", "noise.pth"),
        ("drive", "a.pth", "must end in .onnx"),
        ("drive", "folder.onnx", "a folder stands"),
        ("drive", "noise.pth/a.onnx", "noise.pth"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(weights, output, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.pth").write_bytes(b"\0" * 100)
    (tmp_path / "folder.onnx").mkdir()
    assert call("--weights", weights, "--output", output) == 2
    shown = capsys.readouterr().err
    assert named in shown and shown.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.onnx", "noise.pth"]
