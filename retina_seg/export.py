"""A network as one ONNX file for programs without torch, written only where onnxruntime gives torch's answers.

Its input "photo" is (N, 3, H, W) float32 BGR in [0, 1], H and W multiples of the network's stride; its output
"probability" is (N, 1, H, W) float32 in [0, 1]. N, H and W are free. The way of a photo into the network's frame and back
is not in the file; what one must know to go it stands in the file's metadata (`about`).
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retina_seg import __version__
from retina_seg.folder import weights_id
from retina_seg.predict import Segmenter, find_checkpoint, photo_batch
from retina_seg.synthetic import draw_photo
from retina_seg.utils import UserError, create_dir, whole_file

OPSET = 18  # the exporter's own: every later runtime reads it
LARGEST_DIFFERENCE = 1e-4  # in probability; rounding makes a few millionths
CHECKED = ((1, 16, 24), (2, 31, 17), (1, 50, 62))  # photos, and their height and width in strides


def export(weights: str | Path, output: str | Path) -> float:
    """Write the network of `weights` to the ONNX file `output`, whole or not at all; a file of that name is replaced.

    Args:
        weights: weights that ship, a checkpoint file, or a run's folder.
        output: the file, its name ending in .onnx; its folder is made.

    Returns:
        The largest difference in probability between onnxruntime and torch, on drawn photos of the sizes `CHECKED`.

    Raises:
        UserError: weights that do not load or answer with no number, an output that cannot be written, packages that are
            missing, or a difference of `LARGEST_DIFFERENCE` or more.
    """
    checkpoint, output = find_checkpoint(weights), Path(output)
    segmenter = Segmenter.load(checkpoint, device="cpu", precision="float32")
    if output.suffix.lower() != ".onnx":  # so no photo or checkpoint is ever replaced by mistake
        raise UserError(f"--output {output}: must end in .onnx")
    if output.is_dir():
        raise UserError(f"{output}: a folder stands where the file is to be written; choose another name")
    create_dir(output.parent)
    with whole_file(output) as temporary:
        temporary.touch()  # a folder closed to us is found now, not after the work
        photos, answers = _examples(segmenter.model)
        content = _onnx_file(segmenter.model, about(segmenter, weights_id(checkpoint)))
        difference = _difference(content, photos, answers)
        if not difference < LARGEST_DIFFERENCE:
            raise UserError(
                f"{output}: not written, since onnxruntime answers otherwise than torch (a probability differs by "
                f'{difference:.2g}); pip install --upgrade "retina_seg[onnx]"'
            )
        temporary.write_bytes(content)
    return difference


def about(segmenter: Segmenter, weights: str) -> dict[str, str]:
    """All that a user without this package must know of the network, as ONNX keeps it: text by name.

    `weights` is `folder.weights_id` of the checkpoint. Of the frame "fov" there are "fov_diameter" and "largest_diameter"
    (pixels across the field of view, `predict.working_diameter`) and "margin" (pixels of black around it), of "squeeze"
    there are "height" and "width" (pixels).
    """
    if segmenter.frame["kind"] == "squeeze":
        frame = dict(zip(("height", "width"), segmenter.frame["size"], strict=True))
    else:
        least = segmenter.frame["fov_diameter"]
        largest = segmenter.frame.get("largest_diameter", least)
        frame = {"fov_diameter": least, "largest_diameter": largest, "margin": segmenter.margin}
    notes: dict[str, Any] = {
        "notice": "For learning and research; not a medical device.",
        "retina_seg_version": __version__,
        "network": type(segmenter.model).__name__,
        "weights_id": weights,
        "input": "photo: (N, 3, H, W) float32 in [0, 1], H and W multiples of the stride",
        "channel_order": "BGR",
        "output": "probability of vessel: (N, 1, H, W) float32 in [0, 1]",
        "stride": segmenter.model.stride,
        "frame": segmenter.frame["kind"],
        **frame,
        "threshold": segmenter.threshold,
    }
    return {name: str(value) for name, value in notes.items()}


def _examples(network: nn.Module) -> tuple[list[Tensor], list[np.ndarray]]:
    """Drawn photos (N, 3, H, W) float32 of the sizes `CHECKED`, and torch's probabilities (N, 1, H, W) float32 for them."""
    photos, answers = [], []
    for count, rows, columns in CHECKED:
        size = (rows * network.stride, columns * network.stride)
        drawn = [photo_batch(draw_photo(seed, *size).photo, torch.device("cpu")) for seed in range(count)]
        photos.append(torch.cat(drawn))
        with torch.inference_mode():
            answers.append(torch.sigmoid(network(photos[-1])).numpy())
    if not all(np.isfinite(answer).all() for answer in answers):
        raise UserError("the network answers with what is no number; choose other weights")
    return photos, answers


def _onnx_file(network: nn.Module, notes: dict[str, str]) -> bytes:
    """The content of the ONNX file of `network` and a sigmoid, with `notes` for its metadata."""
    try:
        import onnx
        import onnxruntime  # noqa: F401  (it answers below)
        import onnxscript  # noqa: F401  (torch's exporter asks for it)
    except ImportError as error:
        raise UserError(
            f'export needs onnx, onnxruntime and onnxscript ({error}); pip install "retina_seg[onnx]"'
        ) from None
    dim = torch.export.Dim
    stride = network.stride
    free = {0: dim("photos"), 2: stride * dim("rows"), 3: stride * dim("columns")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of one package on another's version
        # by torch.export: the older exporter, by tracing, is to be removed from torch
        program = torch.onnx.export(
            nn.Sequential(network.to(memory_format=torch.contiguous_format), nn.Sigmoid()).eval(),
            (torch.zeros(2, 3, 8 * stride, 6 * stride),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["photo"],
            output_names=["probability"],
            dynamic_shapes=(free,),
        )
    model = program.model_proto
    graph = model.graph
    # the exporter notes where each line of source lies on this machine
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, notes)
    return model.SerializeToString()


def _difference(content: bytes, photos: list[Tensor], answers: list[np.ndarray]) -> float:
    """The largest difference between onnxruntime's probabilities for `photos` and `answers`; NaN if one is no number."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = [session.run(["probability"], {"photo": photo.numpy()})[0] for photo in photos]
    return float(np.max([np.abs(ours - theirs).max() for ours, theirs in zip(answers, found, strict=True)]))
