"""The ONNX file: torch's probabilities at any size, all that must be known in it, and no file where it cannot be made."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, save_varied, write

from retina_seg.fov import find_fov
from retina_seg.images import read_image, read_mask
from retina_seg.inference import engine, export
from retina_seg.inference.segmenter import Segmenter
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.transforms import FovFrame, ResizeFrame
from retina_seg.utils import UserError

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")


def segmented(path, image):
    """What the ONNX file at `path` gives for an RGB image: vessels and field of view as bool, the probability between."""
    session = onnxruntime.InferenceSession(path)
    vessels, probability, fov = session.run(None, {"image": np.ascontiguousarray(image[:, :, ::-1])})
    assert {*np.unique(vessels), *np.unique(fov)} <= {0, 255} and vessels.dtype == fov.dtype == np.uint8
    return vessels > 0, probability, fov > 0


@pytest.mark.parametrize(
    ("name", "frame", "shapes"),
    [
        ("attention_unet", ResizeFrame(64, 72), [(64, 72), (130, 97)]),
        ("fast_attention_unet", FovFrame(90.0), [(93, 94), (93, 200), (64, 64), (260, 180)]),
        ("fast_attention_unet", FovFrame(84.0, 168.0, normalise=True), [(88, 90), (136, 150), (64, 64), (400, 380)]),
    ],
)
def test_onnxruntime_predicts_what_the_segmenter_predicts_at_any_size(name, frame, shapes, tmp_path):
    save_varied(tmp_path / "weights.pth", name, frame)
    target = tmp_path / "new/vessels.onnx"
    assert export.export(tmp_path / "weights.pth", target) < 1e-4
    assert list(target.parent.iterdir()) == [target]
    segmenter = Segmenter.load(tmp_path / "weights.pth", device="cpu", precision="float32")
    same_scale = 0
    for number, shape in enumerate(shapes):
        image = synthetic_image(number, *shape).image
        vessels, probability, fov = segmented(target, image)
        expected, (top, left, bottom, right) = segmenter(image, fov), frame.place(fov).box
        same = frame.place(fov).size == (bottom - top, right - left)
        same_scale += same
        # interpolation differs by some grey levels
        np.testing.assert_allclose(probability, expected, atol=1e-4 if same else 0.3)
        assert np.abs(probability - expected).mean() < 0.02 and np.ptp(expected[fov]) > 0.2
        np.testing.assert_array_equal(vessels, probability > np.float32(0.3))
        found = find_fov(image)
        assert (found & fov).sum() > 0.95 * (found | fov).sum()
    assert 0 < same_scale < len(shapes)
    black = segmented(target, np.zeros((70, 50, 3), np.uint8))
    assert black[1].shape == (70, 50) and np.isfinite(black[1]).all()


@pytest.mark.parametrize("style", [None, "b"])
def test_the_file_predicts_in_the_style_asked_for_and_names_all(style, styled, tmp_path):
    assert export.export(styled, tmp_path / "vessels.onnx", style) < 1e-4
    values = onnxruntime.InferenceSession(tmp_path / "vessels.onnx").get_modelmeta().custom_metadata_map
    assert (values["style"], values["styles"]) == (style or "balanced", "a, b, balanced")
    assert "not a medical device" in values["notice"] and "normalise=True" in values["frame"]
    image = synthetic_image(2, 128, 128).image[32:96, 32:96]  # lit all over: at the frame's own scale
    _, probability, fov = segmented(tmp_path / "vessels.onnx", image)
    for name in ("a", "b", "balanced"):
        expected = Segmenter.load(styled, style=name, precision="float32")(image, fov)
        assert (np.abs(probability - expected).max() < 1e-4) == (name == (style or "balanced"))


def test_the_readmes_lines_segment_without_torch_as_the_segmenter_does(tmp_path):
    export.export("general", tmp_path / "vessels.onnx")
    image = synthetic_image(77, 584, 565).image
    write(tmp_path / "eye.jpg", image)
    listings = re.findall("```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    (listing,) = [listing for listing in listings if "onnxruntime" in listing]
    without_torch = 'import sys\nsys.modules["torch"] = None\n'
    subprocess.run([sys.executable, "-c", without_torch + listing], cwd=tmp_path, check=True, timeout=300)
    result = read_mask(tmp_path / "vessels.png") > 127
    expected = Segmenter.load("general", device="cpu", precision="float32").vessels(tmp_path / "eye.jpg")
    assert expected.mean() > 0.02 and 2 * (result & expected).sum() / (result.sum() + expected.sum()) > 0.97  # F1


def test_ranges_are_those_of_the_training_images_and_count_for_their_weights_only(tiny_set, tmp_path, monkeypatch):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    save_varied(tmp_path / "weights.pth", "fast_attention_unet", FovFrame(90.0))
    load = partial(Segmenter.load, tmp_path / "weights.pth", device="cpu")
    assert load().precision is not torch.int8
    path, count = export.calibrate(tmp_path / "weights.pth", tiny_set)
    assert (path, count) == (tmp_path / "weights.int8.json", 4)
    ranges = engine.load_ranges(tmp_path / "weights.pth")
    layers = [name for name, layer in load().model.named_modules() if isinstance(layer, torch.nn.Conv2d)]
    assert {*ranges} == {*layers[1:-2]}
    assert all(low <= 0 < high for low, high in ranges.values())
    segmenter, image = load(), read_image(next(tiny_set.glob("test/image/*")))
    assert segmenter.precision is torch.int8
    difference = np.abs(segmenter(image) - load(engine="torch", precision="float32")(image))
    assert 0 < difference.mean() < 0.02
    save_varied(tmp_path / "weights.pth", "fast_attention_unet", FovFrame(91.0))
    assert engine.load_ranges(tmp_path / "weights.pth") is None and load().precision is not torch.int8


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_remedy(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*pip install .*retina_seg\[onnx\]"):
        export.export("drive", tmp_path / "vessels.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("difference", [2e-4, float("nan")])
def test_a_file_with_another_prediction_is_not_written(difference, tmp_path, monkeypatch):
    target = tmp_path / "vessels.onnx"
    target.write_bytes(b"the one before")
    monkeypatch.setattr(export, "_onnx_file", lambda *_: b"")
    monkeypatch.setattr(export, "_difference", lambda *_: difference)
    with pytest.raises(UserError, match=f"not written.*{difference}"):
        export.export("drive", target)
    assert target.read_bytes() == b"the one before" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "options",
    [
        "",
        "--output a.onnx --data d",
        "--engine openvino --data d",
        "--engine openvino --precision int8 --output a.onnx",
    ],
)
def test_options_of_the_other_engine_are_refused(options, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert call("export", *options.split()) == 2 and "--engine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
