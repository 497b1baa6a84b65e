"""A network as one ONNX file for programs without torch, written only where onnxruntime predicts what torch predicts.

Input "image": (N, 3, H, W) float32 BGR in [0, 1]; output "probability": (N, 1, H, W) float32 in [0, 1]. N is free, H and
W are multiples of the network's stride. The file's metadata says how an image enters the network's frame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retina_seg import __version__
from retina_seg.checkpoint import find_weights, load_checkpoint, weights_id
from retina_seg.data import list_pairs
from retina_seg.images import read_image
from retina_seg.inference.engine import Ranges, image_batch, ranges_file
from retina_seg.inference.segmenter import Segmenter
from retina_seg.model import DEFAULT_STRIDE
from retina_seg.sets.files import Data
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.styles import AUTO
from retina_seg.transforms import NORMAL_MEAN, NORMAL_SPREAD, ResizeFrame
from retina_seg.utils import UserError, atomic_write, output_folder, user_path, write_json

LARGEST_DIFFERENCE = 1e-4  # in probability; rounding makes a few millionths
MEASURED = 32  # images, for 8 bits
INSTALL = 'pip install --upgrade "retina_seg[onnx]"'
CHECKED_SIZES = ((1, 16, 24), (2, 31, 17), (1, 50, 62))  # images, their height and width in strides


def export(weights: str | Path, output: str | Path, style: str | None = None) -> float:
    """Write a network to the ONNX file `output`, whole or not at all; a file of that name is replaced.

    `weights` are a pretrained name, a checkpoint file or a run's folder; `style` is as in `Segmenter.load`, "balanced" in
    place of "auto". Returns the largest difference in probability between onnxruntime and torch, on synthetic images of
    `CHECKED_SIZES`. Raises `UserError`: weights that do not load, no such style, NaN, a file that is unwritable or not
    .onnx, missing packages, a difference that is too large.
    """
    checkpoint, output = find_weights(weights), user_path(output)
    notes = load_checkpoint(checkpoint)
    style = style or notes.get("style")
    style = "balanced" if style == AUTO else style  # a file has one style
    segmenter = Segmenter.load(checkpoint, style=style, device="cpu", precision="float32")
    values = metadata(segmenter, weights_id(checkpoint))
    if styles := notes.get("styles"):
        values |= {"style": str(style), "styles": ", ".join(styles)}
    if output.suffix.lower() != ".onnx":  # so that no image or checkpoint is replaced by mistake
        raise UserError(f"--output {output}: must end in .onnx")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; choose another name")
    with output_folder(output.parent), atomic_write(output) as temporary:
        temporary.touch()  # a folder that may not be written to is found before the work
        content = _onnx_file(segmenter.model, values)
        difference = _difference(content, segmenter.model)
        if not difference < LARGEST_DIFFERENCE:
            raise UserError(f"{output}: not written, as onnxruntime differs from torch by {difference:.2g}; {INSTALL}")
        temporary.write_bytes(content)
    return difference


def calibrate(weights: str | Path, data: Data) -> tuple[Path, int]:
    """Measure the ranges of a network's activations for 8 bits, and write them beside its checkpoint.

    `weights` as for `export`; `data` names datasets, as `data.list_pairs` takes them, of whose training images up to
    `MEASURED` are used. Returns the file and their number. Raises `UserError` as what it calls.
    """
    checkpoint = find_weights(weights)
    pairs = list_pairs(data, "train")
    pairs = pairs[:: math.ceil(len(pairs) / MEASURED)]
    segmenter = Segmenter.load(checkpoint, device="cpu", engine="torch", precision="float32")
    ranges = activation_ranges(segmenter, (read_image(pair.image) for pair in pairs))
    value = {"weights_id": weights_id(checkpoint), "images": [pair.name for pair in pairs], "ranges": ranges}
    write_json(ranges_file(checkpoint), value)
    return ranges_file(checkpoint), len(pairs)


def activation_ranges(segmenter: Segmenter, images: Iterable[np.ndarray]) -> Ranges:
    """The ranges of convolutions' inputs while `segmenter`, by torch, segments `images`: (H, W, 3) uint8 RGB.

    Left out, as they are the most sensitive to rounding, are the first convolution and the last three.
    """
    ranges: Ranges = {}

    def measure(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        low, high = inputs[0].aminmax()
        before = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(before[0], float(low)), max(before[1], float(high))

    layers: Any = segmenter.network
    convolutions = [(n, layer) for n, layer in layers.module.named_modules() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(partial(measure, name)) for name, layer in convolutions[1:-3]]
    for image in images:
        segmenter(image)
    for handle in handles:
        handle.remove()
    return ranges


def metadata(segmenter: Segmenter, weights: str) -> dict[str, str]:
    """What a program needs to use the network, text by name; sizes in pixels. `weights` is its `checkpoint.weights_id`."""
    frame = segmenter.frame
    stride: Any = getattr(segmenter.model, "stride", DEFAULT_STRIDE)
    if isinstance(frame, ResizeFrame):
        sizes: dict[str, object] = {"height": frame.height, "width": frame.width}
    else:  # "margin" is of black around the box of the field of view
        largest = frame.largest_diameter or frame.fov_diameter
        sizes = {"fov_diameter": frame.fov_diameter, "largest_diameter": largest, "margin": frame.margin * stride}
        if frame.normalise:
            to = f"mean {NORMAL_MEAN} and standard deviation {NORMAL_SPREAD} of 0 to 255"
            sizes["normalise"] = f"each channel to {to} over the field of view; 0 outside it"
    values = {
        "notice": "For learning and research; not a medical device.",
        "retina_seg_version": __version__,
        "network": type(segmenter.model).__name__,
        "weights_id": weights,
        "input": "image: (N, 3, H, W) float32 in [0, 1], H and W multiples of the stride",
        "channel_order": "BGR",
        "output": "probability of vessel: (N, 1, H, W) float32 in [0, 1]",
        "stride": stride,
        "frame": frame.to_dict()["kind"],
        **sizes,
        "threshold": segmenter.threshold,
    }
    return {name: str(value) for name, value in values.items()}


def _onnx_file(network: Any, values: dict[str, str]) -> bytes:
    """The content of the ONNX file of `network` and a sigmoid, with `values` as its metadata."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  (for the check)
        import onnxscript  # noqa: F401  (for torch's exporter)
    except ImportError as error:
        raise UserError(f"export needs more packages ({error}); {INSTALL}") from None
    dim, stride = torch.export.Dim, getattr(network, "stride", DEFAULT_STRIDE)
    free = {0: dim("images"), 2: stride * dim("rows"), 3: stride * dim("columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one package on another's version
        program: Any = torch.onnx.export(
            nn.Sequential(network.to(memory_format=torch.contiguous_format), nn.Sigmoid()).eval(),
            (torch.zeros(2, 3, 8 * stride, 6 * stride),),
            dynamo=True,  # the exporter by tracing is to be removed from torch
            verbose=False,
            opset_version=18,  # the exporter's own: every later runtime reads it
            input_names=["image"],
            output_names=["probability"],
            dynamic_shapes=(free,),
        )
    model, graph = program.model_proto, program.model_proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")  # paths of source files on this machine
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, values)
    return model.SerializeToString()


def _difference(content: bytes, network: Any) -> float:
    """The largest difference between onnxruntime's and torch's probabilities; NaN where onnxruntime's are."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    differences = []
    for count, rows, columns in CHECKED_SIZES:
        stride = getattr(network, "stride", DEFAULT_STRIDE)
        images = [synthetic_image(i, rows * stride, columns * stride).image for i in range(count)]
        batch = torch.cat([image_batch(image, torch.device("cpu")) for image in images])
        with torch.inference_mode():
            expected = torch.sigmoid(network(batch)).numpy()
        if not np.isfinite(expected).all():
            raise UserError("the network's output is NaN; choose other weights")
        differences.append(np.abs(session.run(None, {"image": batch.numpy()})[0] - expected).max())
    return float(np.max(differences))
