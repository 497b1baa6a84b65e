"""A network for other programs as one ONNX file, and its preparation for 8 bits.

The file takes an image and gives its vessels: the image's way into the network's frame and back is in it (`onnx_graph`).
It is written only where onnxruntime predicts with it what torch predicts.
"""

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
from retina_seg.inference.engine import Ranges, ranges_file
from retina_seg.inference.segmenter import Segmenter
from retina_seg.model import DEFAULT_STRIDE
from retina_seg.sets.files import Data
from retina_seg.sets.synthetic import synthetic_image
from retina_seg.utils import UserError, atomic_write, output_folder, user_path, write_json

LARGEST_DIFFERENCE = 1e-4  # in probability; rounding makes a few millionths
MEASURED = 32  # images, for 8 bits
INSTALL = 'pip install --upgrade "retina_seg[onnx]"'


def export(weights: str | Path, output: str | Path, style: str | None = None) -> float:
    """Write a network to the ONNX file `output`, whole or not at all; a file of that name is replaced.

    `weights` are a pretrained name, a checkpoint file or a run's folder; `style` is as in `Segmenter.load`. Returns the
    largest difference in probability between onnxruntime and torch on a synthetic image.

    Raises `UserError`: weights that do not load, no such style, NaN, a file that is unwritable or not .onnx, missing
    packages, a difference that is too large.
    """
    checkpoint, output = find_weights(weights), user_path(output)
    segmenter = Segmenter.load(checkpoint, style=style, device="cpu", engine="torch", precision="float32")
    values = {  # what the file says of itself
        "notice": "For learning and research; not a medical device.",
        "retina_seg_version": __version__,
        "network": type(segmenter.model).__name__,
        "weights_id": weights_id(checkpoint),
        "input": "image: (H, W, 3) uint8 BGR, of any size",
        "output": "vessels, field of view: (H, W) uint8, 0 or 255; probability between: (H, W) float32 in [0, 1]",
        "frame": str(segmenter.frame),
        "threshold": str(segmenter.threshold),
    }
    if styles := load_checkpoint(checkpoint).get("styles"):
        values |= {"style": str(segmenter.style), "styles": ", ".join(styles)}
    if output.suffix.lower() != ".onnx":  # so that no image or checkpoint is replaced by mistake
        raise UserError(f"--output {output}: must end in .onnx")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; choose another name")
    with output_folder(output.parent), atomic_write(output) as temporary:
        temporary.touch()  # a folder that may not be written to is found before the work
        content = _onnx_file(segmenter, values)
        difference = _difference(content, segmenter)
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

    Left out are the first convolution and the last two, whose rounding would show most.
    """
    ranges: Ranges = {}

    def measure(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        low, high = inputs[0].aminmax()
        before = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(before[0], float(low)), max(before[1], float(high))

    layers: Any = segmenter.network
    convolutions = [(n, layer) for n, layer in layers.module.named_modules() if isinstance(layer, nn.Conv2d)]
    handles = [layer.register_forward_pre_hook(partial(measure, name)) for name, layer in convolutions[1:-2]]
    for image in images:
        segmenter(image)
    for handle in handles:
        handle.remove()
    return ranges


def _onnx_file(segmenter: Segmenter, values: dict[str, str]) -> bytes:
    """The content of the ONNX file, with `values` as its metadata."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  (for the check)
        import onnxscript  # noqa: F401  (for the exporter of torch)

        from retina_seg.inference.onnx_graph import NETWORK, graph_around
    except ImportError as error:
        raise UserError(f"export needs more packages ({error}); {INSTALL}") from None
    dim, stride = torch.export.Dim, getattr(segmenter.model, "stride", DEFAULT_STRIDE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one package on another's version
        program: Any = torch.onnx.export(
            segmenter.model.to(memory_format=torch.contiguous_format),
            (torch.zeros(1, 3, 8 * stride, 6 * stride),),
            dynamo=True,  # the exporter by tracing is to be removed from torch
            verbose=False,
            opset_version=18,  # the exporter's own: every later runtime reads it
            dynamic_shapes=({2: stride * dim("rows"), 3: stride * dim("columns")},),
        )
        around = graph_around(segmenter.frame, stride, segmenter.threshold)
    network = onnx.compose.add_prefix(program.model_proto, "network/").graph
    nodes = list(around.graph.node)
    place = next(i for i, node in enumerate(nodes) if node.domain == NETWORK.domain)
    renamed = {network.input[0].name: nodes[place].input[0], network.output[0].name: nodes[place].output[0]}
    for node in network.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
    del around.graph.node[:], around.opset_import[1:]
    around.graph.node.extend([*nodes[:place], *network.node, *nodes[place + 1 :]])
    around.graph.initializer.extend(network.initializer)
    for part in (*around.graph.node, *around.graph.initializer):
        part.ClearField("metadata_props")  # paths of source files on this machine
        part.ClearField("doc_string")
    onnx.helper.set_model_props(around, values)
    onnx.checker.check_model(around)
    return around.SerializeToString()


def _difference(content: bytes, segmenter: Segmenter) -> float:
    """The largest difference between onnxruntime's and torch's probabilities; NaN where onnxruntime's are.

    On the middle of a synthetic image, at the frame's own scale: elsewhere interpolation differs by some grey levels.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    sides = segmenter.frame.usual_size
    side = max(64, 2 * max(sides))  # so that the middle is lit, and thus the field of view
    top, left = ((side - length) // 2 for length in sides)
    image = synthetic_image(0, side, side).image[top : top + sides[0], left : left + sides[1]]
    _, probability, fov = session.run(None, {"image": image[:, :, ::-1].copy()})
    return float(np.abs(probability - segmenter(image, fov > 0)).max())
