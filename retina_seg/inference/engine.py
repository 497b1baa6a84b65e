"""A network as it is fastest to use: the same function of an image, up to rounding, by one of two engines.

torch runs on every device. OpenVINO (the extra "openvino") runs the networks of this package on processors, and in 8 bits
where the range of their activations is known (`export.calibrate`).
"""

import copy
import importlib.util
import operator
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from retina_seg.checkpoint import weights_id
from retina_seg.config import ENGINES
from retina_seg.device import choose_precision, has_bfloat16_units, has_flag
from retina_seg.model import AttentionUNet, FastAttentionUNet, check_multiple
from retina_seg.utils import UserError, read_json

Ranges = dict[str, tuple[float, float]]  # name of a convolution -> least and greatest value of its input
CPU = torch.device("cpu")
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.int8: 0.3}  # of a difference, share of the largest logit


def is_own(model: nn.Module) -> bool:
    """Whether `model` is a network of this package."""
    return isinstance(model, (AttentionUNet, FastAttentionUNet))


def choose_engine(
    engine: str, precision: str, device: torch.device, model: nn.Module, ranges: Ranges | None
) -> tuple[str, torch.dtype]:
    """The engine, "torch" or "openvino", and precision that are asked for.

    "auto" is OpenVINO for networks of this package on a processor, where it is installed; int8 where OpenVINO is used,
    there are `ranges`, and the processor has AVX2 at least; float32 for networks that are not of this package.

    Raises `UserError`: there is no such engine or precision, or it cannot be had here.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: choose one of {', '.join(ENGINES)}")
    installed, able = importlib.util.find_spec("openvino") is not None, device.type == "cpu" and is_own(model)
    if engine == "openvino" and not able:
        raise UserError("--engine openvino: computes networks of this package on a processor; take --engine torch")
    if engine == "openvino" and not installed:
        raise UserError('--engine openvino: is not installed; pip install "retina_seg[openvino]"')
    engine = "openvino" if engine != "torch" and installed and able else "torch"
    int8 = engine == "openvino" and bool(ranges) and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    if precision == "int8" and not int8:
        how = "weights prepared by retina-seg export --precision int8, OpenVINO, and a processor with AVX2"
        raise UserError(f"--precision int8: needs {how}; take --precision auto")
    if int8 and precision in ("auto", "int8"):
        return engine, torch.int8
    return engine, choose_precision("float32" if precision == "auto" and not is_own(model) else precision, device)


def ranges_file(weights: Path) -> Path:
    """Where the ranges of the checkpoint file `weights` lie: beside it."""
    return weights.with_suffix(".int8.json")


def load_ranges(weights: Path) -> Ranges | None:
    """The ranges that `export.calibrate` wrote for the checkpoint file `weights`; None where it wrote none for these."""
    path = ranges_file(weights)
    value = read_json(path) if path.exists() else {}
    return value["ranges"] if value.get("weights_id") == weights_id(weights) else None


def image_batch(image: np.ndarray, device: torch.device) -> Tensor:
    """(H, W, 3) uint8 RGB -> (1, 3, H, W) float32 BGR in [0, 1], channels last, on `device`."""
    batch = torch.from_numpy(cv2.cvtColor(image, cv2.COLOR_RGB2BGR)).to(device)
    return batch.permute(2, 0, 1).unsqueeze(0).float() / 255  # a permuted image is in channels-last order already


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` to evaluate, every batch normalisation folded into the convolution before it: equal up to rounding."""
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        previous = None  # in these networks a normalisation is registered right after its convolution
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d) and previous is not None:
                setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child))
                setattr(module, name, nn.Identity())
            previous = (name, child) if isinstance(child, nn.Conv2d) else None
    return folded


class TorchNetwork:
    """`model` as it is now, by torch: (H, W, 3) uint8 RGB -> logits (1, styles, H, W) float32.

    Channels last, in `precision`; in the networks of this package batch normalisation is folded into convolutions.
    """

    def __init__(self, model: nn.Module, device: torch.device, precision: torch.dtype) -> None:
        network = fold_batch_norm(model) if is_own(model) else copy.deepcopy(model).eval()
        self.module: nn.Module = network.to(device, precision, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device, self.precision = device, precision

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        return self.module(image_batch(image, self.device).to(self.precision)).float().cpu().numpy()


class OpenvinoNetwork:
    """`model`, one of this package, as it is now, by OpenVINO: as `TorchNetwork`, for several threads at once.

    Args:
        precision: int8 rounds the convolutions in `ranges` to 8 bits; the others are in bfloat16 where there are units.
        threads: of the processor. A call takes as many as torch has in its thread, so that several may share them.
        usual: (height, width) that most images have; 8 bits are a tenth faster where they are known beforehand.

    Raises `UserError`: the network is changed in a way that is not translated, or OpenVINO computes something else.
    """

    def __init__(
        self, model: nn.Module, precision: torch.dtype, threads: int, ranges: Ranges | None = None, usual: tuple = ()
    ) -> None:
        bfloat16 = precision is torch.bfloat16 or (precision is torch.int8 and has_bfloat16_units(CPU))
        self.hint, self.threads = "bf16" if bfloat16 else "f32", threads  # OpenVINO's names
        self.graph = openvino_graph(fold_batch_norm(model), (ranges or {}) if precision is torch.int8 else {})
        # by the threads of a call, and whether its image has the usual size
        self.compiled, self.idle = dict[tuple[int, bool], Any](), dict[tuple[int, bool], list[Any]]()
        self.usual, self.lock, self.helper = usual, threading.Lock(), ThreadPoolExecutor(1)
        side = 4 * model.stride  # type: ignore[operator]
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
        expected = TorchNetwork(model, CPU, torch.float32)(noise)
        try:
            result = self(noise)
        except RuntimeError as error:  # an operation that it does not have on this processor
            raise UserError(f"--engine openvino: {str(error).splitlines()[-1]}; take --engine torch") from None
        with np.errstate(invalid="ignore"):
            difference, largest = np.abs(result - expected).max(), np.abs(expected).max()
        if not difference <= LIMITS[precision] * largest:  # nor where torch gives NaN, which a ReLU may hide
            raise UserError(f"--engine openvino: differs from torch by {difference:.2g}; take --engine torch")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        kind = torch.get_num_threads(), image.shape[:2] == self.usual
        if threading.current_thread() is threading.main_thread():
            # OpenVINO gives its caller a stack for signals and may free it: in the main thread Ctrl-C would crash
            return self.helper.submit(self._infer, image, kind).result()
        return self._infer(image, kind)

    def _infer(self, image: np.ndarray, kind: tuple[int, bool]) -> np.ndarray:
        idle = self.idle.setdefault(kind, [])
        request = idle.pop() if idle else self._new_request(*kind)
        logits = request.infer([cv2.cvtColor(image, cv2.COLOR_RGB2BGR)[None]])[0].copy()
        idle.append(request)
        return logits

    def _new_request(self, threads: int, usual: bool) -> Any:
        import openvino

        with self.lock:
            if (threads, usual) not in self.compiled:
                graph, streams = self.graph.clone(), max(1, self.threads // threads)  # calls side by side
                if usual:
                    graph.reshape([1, *self.usual, 3])
                how = {"INFERENCE_PRECISION_HINT": self.hint, "NUM_STREAMS": streams}
                # threads that are pinned to cores wait for other programs there
                how |= {"INFERENCE_NUM_THREADS": streams * threads, "ENABLE_CPU_PINNING": False}
                self.compiled[threads, usual] = openvino.compile_model(graph, "CPU", how)
        return self.compiled[threads, usual].create_infer_request()


def openvino_graph(model: nn.Module, ranges: Ranges) -> Any:
    """The OpenVINO model of a folded network: (1, H, W, 3) uint8 BGR -> logits (1, styles, H, W) float32.

    Input and weights of the convolutions in `ranges` are rounded to 8 bits, weights for each output channel by itself;
    weights to 7 bits on a processor without VNNI, which adds two products in 16 bits.

    Raises `UserError`: the network has a layer or operation that is not translated here.
    """
    import openvino
    from openvino import opset14 as ops

    layers = dict(model.named_modules())
    limits = {layers[name]: limit for name, limit in ranges.items()}
    vnni = has_flag("avx512_vnni", "avx_vnni", "amx_int8")

    def rounded(x: Any, low: Any, high: Any, levels: int) -> Any:
        return ops.fake_quantize(x, *map(np.float32, (low, high, low, high)), levels)

    def convolution(layer: Any, x: Any) -> Any:
        weight, padding = layer.weight.detach().numpy(), list(layer.padding)
        if layer in limits:
            largest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) * (1 if vnni else 2)
            x, weight = rounded(x, *limits[layer], 256), rounded(weight, -largest, largest, 255)
        y = ops.convolution(x, weight, list(layer.stride), padding, padding, list(layer.dilation))
        return y if layer.bias is None else ops.add(y, layer.bias.detach().view(1, -1, 1, 1).numpy())

    def upsample(layer: Any, x: Any) -> Any:
        how = {"coordinate_transformation_mode": "align_corners" if layer.align_corners else "half_pixel"}
        return ops.interpolate(x, np.full(2, 2, np.float32), "linear_onnx", "scales", axes=np.array([2, 3]), **how)

    translations: dict[Any, Callable] = {
        nn.Conv2d: convolution,
        nn.Upsample: upsample,
        nn.MaxPool2d: lambda _, x: ops.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0),
        nn.PixelUnshuffle: lambda _, x: ops.space_to_depth(x, "depth_first", 2),
        nn.PixelShuffle: lambda _, x: ops.depth_to_space(x, "depth_first", 2),
        nn.ReLU: lambda _, x: ops.relu(x),
        nn.Sigmoid: lambda _, x: ops.sigmoid(x),
        nn.Identity: lambda _, x: x,
        nn.Dropout2d: lambda _, x: x,
        "relu_": ops.relu,
        operator.add: ops.add,
        operator.mul: ops.multiply,
        torch.addcmul: lambda x, a, b: ops.add(x, ops.multiply(a, b)),
        torch.cat: lambda parts, dim: ops.concat(list(parts), dim),
        check_multiple: lambda *_: None,
        "output": lambda x: x,
    }
    image = ops.parameter([1, -1, -1, 3], np.uint8)
    start = ops.divide(ops.convert(ops.transpose(image, [0, 3, 1, 2]), np.float32), np.float32(255))
    values: dict[fx.Node, Any] = {}
    for node in fx.Tracer(autowrap_functions=(check_multiple,)).trace(model).nodes:
        layer = layers[node.target] if node.op == "call_module" else None
        kind: Any = node.target if layer is None else type(layer)
        if node.op == "placeholder":
            values[node] = start
        elif kind not in translations:
            raise UserError(f"--engine openvino: {kind} is not known here; take --engine torch")
        else:
            given = ([] if layer is None else [layer]) + list(fx.map_arg(node.args, values.get))
            values[node] = translations[kind](*given, **node.kwargs)
    return openvino.Model([values[node]], [image])
