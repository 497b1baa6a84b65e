"""The engines against the network itself, in every precision, from several threads, and where they cannot be used."""

import ctypes
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import noise
from conftest import shaken_network as network_of
from torch import nn

from retina_seg.inference import engine
from retina_seg.inference.export import activation_ranges
from retina_seg.inference.segmenter import Segmenter
from retina_seg.model import build_model
from retina_seg.transforms import ResizeFrame
from retina_seg.utils import UserError

CPU = torch.device("cpu")
MODELS = [
    ("attention_unet", {}),
    ("fast_attention_unet", {}),
    ("fast_attention_unet", {"fine": 0}),
    ("fast_attention_unet", {"styles": 2}),
]
IMAGE = noise(96, 64, 3)


@torch.inference_mode()
def logits_of(model, image=IMAGE):
    return model(engine.image_batch(image, CPU)).numpy()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "arguments"), MODELS)
def test_both_engines_give_the_networks_logits(name, arguments, precision):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    model = network_of(name, **arguments)
    limit = (1e-4 if precision == torch.float32 else 0.1) * np.abs(logits_of(model)).max()
    networks = (
        engine.TorchNetwork(model, CPU, precision),
        engine.OpenvinoNetwork(model, precision, 1, usual=IMAGE.shape[:2]),
    )
    assert not [layer for layer in networks[0].module.modules() if isinstance(layer, nn.BatchNorm2d)]
    for image in (IMAGE, noise(48, 104, 3), IMAGE):
        for network in networks:
            np.testing.assert_allclose(network(image), logits_of(model, image), rtol=0, atol=limit)


def test_openvino_computes_in_several_threads_at_once_and_gives_each_its_own_logits(monkeypatch):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # so that three calls are side by side
    network = engine.OpenvinoNetwork(network_of("fast_attention_unet"), torch.float32, 3)
    images = [noise(96, 64, 3, seed=seed) for seed in range(6)] * 4
    expected = [network(image) for image in images]
    with ThreadPoolExecutor(3) as pool:
        for result, logits in zip(pool.map(network, images), expected, strict=True):
            np.testing.assert_array_equal(result, logits)
    (compiled,) = network.compiled.values()
    assert compiled.get_property("NUM_STREAMS") == min(3, os.cpu_count()) and 1 <= len(network.idle[1, False]) <= 3


def ranges_of(model) -> engine.Ranges:
    """The ranges on `IMAGE`."""
    return activation_ranges(
        Segmenter(model, ResizeFrame(96, 64), device="cpu", engine="torch", precision="float32"), [IMAGE]
    )


@pytest.mark.parametrize("vnni", [True, False])
def test_in_8_bits_inputs_and_weights_are_those_rounded_weights_to_7_without_vnni(vnni, monkeypatch):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    monkeypatch.setattr(engine, "has_flag", lambda *_: vnni)
    monkeypatch.setattr(engine, "has_bfloat16_units", lambda _: False)
    model, name = network_of("fast_attention_unet"), "b1.0.conv1"
    low, high = (8 * limit for limit in ranges_of(model)[name])  # coarse steps, so that they show
    result = engine.OpenvinoNetwork(model, torch.int8, 1, {name: (low, high)})(IMAGE)
    rounded = engine.fold_batch_norm(model)
    layer = rounded.get_submodule(name)
    largest = layer.weight.detach().abs().amax((1, 2, 3), keepdim=True)
    step = largest / 127 * (1 if vnni else 2)
    layer.weight.data = (layer.weight / step).round() * step
    layer.register_forward_pre_hook(lambda _, x: torch.fake_quantize_per_tensor_affine(x[0], high / 255, 0, 0, 255))
    expected, exact = logits_of(rounded), logits_of(model)
    assert low == 0 and np.abs(result - expected).max() < 0.1 * np.abs(exact - expected).max() > 0


@pytest.mark.parametrize("fault", ["an operation that is not translated", "one that it lacks", "another result", "NaN"])
def test_where_openvino_cannot_compute_the_network_torch_does_unless_it_was_asked_for(fault, monkeypatch):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    model = network_of("fast_attention_unet")
    if fault == "NaN":
        nn.init.constant_(model.e1.conv1.weight, 3e38)  # finite, as `load_model` asks, but sums are not; a ReLU follows
    elif fault == "one that it lacks":
        import openvino

        monkeypatch.setattr(openvino, "compile_model", Mock(side_effect=RuntimeError("from core.cpp\nno MaxPool")))
    elif fault == "another result":
        monkeypatch.setitem(engine.LIMITS, torch.float32, 0.0)
    else:
        model.pool = nn.AvgPool2d(2)
    how = {"frame": ResizeFrame(64, 64), "device": "cpu", "precision": "float32"}
    with pytest.raises(UserError, match="--engine openvino: .*take --engine torch"):
        _ = Segmenter(model, engine="openvino", **how).network
    segmenter = Segmenter(model, **how)
    assert segmenter.engine == "openvino" and isinstance(segmenter.network, engine.TorchNetwork)
    assert segmenter.engine == "torch"
    if fault == "NaN":
        with pytest.raises(UserError, match="NaN"):
            segmenter(IMAGE, everywhere=True)


def test_the_engine_is_chosen_by_name_and_by_what_there_is(monkeypatch):
    own, other, gpu = network_of("attention_unet"), nn.Conv2d(3, 1, 1), torch.device("cuda")
    ranges, choose = {"e2.conv.conv.0": (0.0, 1.0)}, engine.choose_engine
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(engine, "choose_precision", lambda name, _: name)
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: "installed")
    assert choose("auto", "auto", CPU, own, None) == ("openvino", "auto")
    assert (
        choose("auto", "auto", CPU, own, ranges) == choose("auto", "int8", CPU, own, ranges) == ("openvino", torch.int8)
    )
    assert choose("auto", "bfloat16", CPU, own, ranges) == ("openvino", "bfloat16")
    assert choose("torch", "auto", CPU, own, ranges) == choose("auto", "auto", gpu, own, ranges) == ("torch", "auto")
    assert choose("auto", "auto", CPU, other, None) == ("torch", "float32")
    for refused in (("int", "auto", CPU, own, None), ("openvino", "auto", CPU, other, None)):
        with pytest.raises(
            UserError, match="--engine (int: choose one of|openvino: computes networks of this package)"
        ):
            choose(*refused)
    for name, given in (("torch", ranges), ("auto", None)):
        with pytest.raises(UserError, match="--precision int8: needs .*retina-seg export --precision int8"):
            choose(name, "int8", CPU, own, given)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert choose("auto", "auto", CPU, own, ranges) == ("openvino", "auto")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda _: None)
    assert choose("auto", "auto", CPU, own, ranges) == ("torch", "auto")
    with pytest.raises(UserError, match=r"not installed; pip install .retina_seg\[openvino\]"):
        choose("openvino", "auto", CPU, own, None)


def test_a_network_that_changed_is_not_computed_in_8_bits_by_its_old_ranges(monkeypatch):
    pytest.importorskip("openvino", reason="needs the extra openvino")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = network_of("fast_attention_unet")
    segmenter = Segmenter(model, ranges=ranges_of(model), device="cpu", frame=ResizeFrame(64, 64))
    before = segmenter(IMAGE, everywhere=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    segmenter(IMAGE)  # a sum of the weights by two threads is another one
    torch.set_num_threads(threads)
    assert segmenter.precision is torch.int8
    model.head.bias.data += 1
    assert not np.array_equal(segmenter(IMAGE, everywhere=True), before) and segmenter.precision is not torch.int8


@pytest.mark.parametrize("name", ["attention_unet", "fast_attention_unet"])
def test_folded_batch_norm_computes_the_same_and_leaves_the_model_alone(name):
    model = network_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, result = logits_of(model), logits_of(engine.fold_batch_norm(model.train()))
    assert model.training
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(sys.platform != "linux", reason="signals differ elsewhere")
def test_openvino_leaves_the_main_threads_stack_for_signals_alone():
    pytest.importorskip("openvino", reason="needs the extra openvino")

    def stack() -> bytes:
        ctypes.CDLL(None).sigaltstack(None, found := ctypes.create_string_buffer(64))
        return found.raw

    before = stack()  # where OpenVINO changes and frees it, Ctrl-C ends in a segmentation fault
    Segmenter(build_model("fast_attention_unet", width=8), engine="openvino")(np.zeros((32, 32, 3), np.uint8))
    assert stack() == before
