"""The ONNX file: torch's probabilities at any size, all that must be known in it, and no file where it cannot be made."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import shaken

from retina_seg.checkpoint import load_model, save_model
from retina_seg.images import read_mask, write_image
from retina_seg.inference import export
from retina_seg.inference.segmenter import Segmenter
from retina_seg.model import build_model
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.transforms import FovFrame, ResizeFrame
from retina_seg.utils import UserError

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
RESIZE = {"frame": "resize", "height": "512", "width": "480"}
FOV = {"frame": "fov", "fov_diameter": "720.0", "largest_diameter": "900.0", "margin": "16"}


@pytest.mark.parametrize(
    ("name", "frame", "expected"),
    [("attention_unet", ResizeFrame(512, 480), RESIZE), ("fast_attention_unet", FovFrame(720.0, 900.0), FOV)],
)
def test_onnxruntime_predicts_what_torch_predicts_at_any_size(name, frame, expected, tmp_path):
    torch.manual_seed(1)
    model = shaken(build_model(name))
    save_model(tmp_path / "weights.pth", model, name, {}, threshold=0.3, frame=frame.to_dict())
    target = tmp_path / "new/vessels.onnx"
    assert export.export(tmp_path / "weights.pth", target) < 1e-4
    assert list(target.parent.iterdir()) == [target]
    session = onnxruntime.InferenceSession(target)
    for count, height, width in ((1, 64, 64), (3, 72, 200), (1, 344, 96)):
        images = torch.rand(count, 3, height, width)
        probability = torch.sigmoid(model(images)).detach().numpy()
        (result,) = session.run(["probability"], {"image": images.numpy()})
        np.testing.assert_allclose(result, probability, atol=1e-4)
        assert np.ptp(probability) > 0.01  # a constant would agree with itself
    values = session.get_modelmeta().custom_metadata_map
    expected = {**expected, "threshold": "0.3", "stride": str(model.stride), "channel_order": "BGR"}
    assert values.items() >= expected.items() and "not a medical device" in values["notice"]


@pytest.mark.parametrize("style", [None, "b"])
def test_the_file_predicts_in_the_style_asked_for_and_names_all(style, styled, tmp_path):
    assert export.export(styled, tmp_path / "vessels.onnx", style) < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "vessels.onnx")
    values = session.get_modelmeta().custom_metadata_map
    assert (values["style"], values["styles"]) == (style or "balanced", "a, b, balanced")
    assert "mean 128 and standard deviation 32" in values["normalise"]
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        results = {name: torch.sigmoid(load_model(styled, name)[0](x)).numpy() for name in ("a", "b", "balanced")}
    (result,) = session.run(None, {"image": x.numpy()})
    near = [name for name, expected in results.items() if np.abs(result - expected).max() < 1e-4]
    assert near == [style or "balanced"]


WITHOUT_TORCH = """
import cv2, numpy, onnxruntime
network = onnxruntime.InferenceSession("vessels.onnx")
about = network.get_modelmeta().custom_metadata_map
image, stride = cv2.imread("eye.png"), int(about["stride"])  # BGR
lit = cv2.medianBlur(image, 5).max(axis=2) > 40  # the field of view
diameter = numpy.ptp(numpy.flatnonzero(lit.any(axis=0))) + 1
if "normalise" in about:
    image = 128 + (image - image[lit].mean(axis=0)) * 32 / image[lit].std(axis=0)
    image = image.round().clip(0, 255).astype("uint8") * lit[..., None]
least, largest = (float(about[name]) / diameter for name in ("fov_diameter", "largest_diameter"))
size = [stride * round(side * numpy.clip(least**0.5, least, largest) / stride) for side in image.shape[1::-1]]
scaled = cv2.resize(image, size, interpolation=cv2.INTER_AREA if size[0] < image.shape[1] else cv2.INTER_CUBIC)
probability = network.run(None, {"image": scaled.transpose(2, 0, 1)[None] / numpy.float32(255)})[0][0, 0]
probability = cv2.resize(probability, image.shape[1::-1])
cv2.imwrite("vessels.png", 255 * (probability > float(about["threshold"])).astype("uint8"))
"""


def test_the_metadata_suffice_to_do_without_torch_what_the_segmenter_does(tmp_path):
    export.export("general", tmp_path / "vessels.onnx")
    write_image(tmp_path / "eye.png", image := synthetic_image(77, 584, 565).image)
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, check=True, timeout=300)
    result = read_mask(tmp_path / "vessels.png") > 127
    expected = Segmenter.load("general", style="balanced", device="cpu", precision="float32").vessels(image)
    assert expected.mean() > 0.02 and 2 * (result & expected).sum() / (result.sum() + expected.sum()) > 0.95  # F1


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
