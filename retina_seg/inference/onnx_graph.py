"""The steps around a network as ONNX operations: an image into the network's frame, and its logits back to vessels.

They are those of `Segmenter`, but for the field of view: it is the lit part of the image, each row filled between its
ends. Functions that onnxscript translates hold no Python but its operators and constants.
"""

from __future__ import annotations

from typing import Any

from onnxscript import FLOAT, UINT8, opset18, script
from onnxscript.values import Opset

from retina_seg.inference.segmenter import MAX_LOGIT
from retina_seg.styles import FINE_BELOW
from retina_seg.transforms import LARGER_POWER, LOWEST_SPREAD, NORMAL_MEAN, NORMAL_SPREAD, SAME_SCALE, FovFrame, Frame

op: Any = opset18  # what its functions take is wider than their types say
LIT = 0.12  # share of the brightest grey level
IMAGE, MAPS = UINT8["H", "W", 3], [UINT8["H", "W"], FLOAT["H", "W"], UINT8["H", "W"]]  # type: ignore[misc]
NETWORK: Any = Opset("network", 1)  # of the operation that the network replaces
FLOAT32, UINT, INT, BOOL, DOUBLE = 1, 2, 7, 9, 11  # types, as ONNX numbers them


def graph_around(frame: Frame, stride: int, threshold: float) -> Any:
    """The model: image (H, W, 3) uint8 BGR -> vessels, probability, field of view.

    Vessels and field of view are (H, W) uint8, 0 or 255, the probability (H, W) float32 in [0, 1].

    One operation, of the domain of `NETWORK`, stands for the network: (1, 3, h, w) float32 BGR in [0, 1] -> logits
    (1, styles, h, w). Of two styles the first is for a field of view below `FINE_BELOW`.
    """
    boxed, border = isinstance(frame, FovFrame), frame.margin * stride
    least = float(getattr(frame, "fov_diameter", 1))
    largest = float(getattr(frame, "largest_diameter", None) or least)
    normal = bool(getattr(frame, "normalise", False))
    fixed = [getattr(frame, "height", 1), getattr(frame, "width", 1)]
    mode, antialias = ("cubic", 1) if boxed else ("linear", 0)
    lowest, greatest = -MAX_LOGIT, MAX_LOGIT
    corner, before = [border, border], [0, 0, border, border, 0, 0]

    @script(default_opset=op)
    def around(image: IMAGE):  # type: ignore
        shape = op.Shape(image, end=2)
        pixels = op.Cast(image, to=FLOAT32)
        sharp = op.ReduceMax(pixels, [2], keepdims=0)
        smooth = op.Squeeze(op.AveragePool(op.Unsqueeze(sharp, [0, 1]), kernel_shape=[5, 5], pads=[2, 2, 2, 2]), [0, 1])
        level = LIT * op.ReduceMax(smooth, keepdims=0)
        lit = op.Cast((smooth >= level) & (sharp >= level), to=UINT)
        rows, columns = op.ReduceMax(lit, [1], keepdims=0), op.ReduceMax(lit, [0], keepdims=0)
        across = op.Range(0, op.Gather(shape, 1), 1)
        between = (across >= op.ArgMax(lit, axis=1)) & (across <= op.ArgMax(lit, axis=1, select_last_index=1))
        fov = op.Unsqueeze(op.Cast(between & op.Cast(op.Unsqueeze(rows, [1]), to=BOOL), to=FLOAT32), [2])

        first = op.Concat(op.ArgMax(rows), op.ArgMax(columns), axis=0)
        last = op.Concat(op.ArgMax(rows, select_last_index=1), op.ArgMax(columns, select_last_index=1), axis=0)
        start = op.Where(boxed, first, 0)
        sides = op.Where(boxed, last + 1 - first, shape)
        diameter = op.Cast(op.ReduceMax(last + 1 - first, keepdims=0), to=FLOAT32)
        scale = op.Clip(least * op.Pow(diameter / least, LARGER_POWER), least, largest) / diameter
        scale = op.Where(op.Abs(scale - 1.0) <= SAME_SCALE, 1.0, scale)
        size = op.Max(op.Cast(op.Round(op.Cast(sides, to=FLOAT32) * scale), to=INT), 1)
        size = op.Where(boxed, size, fixed)

        area, exact = op.ReduceSum(op.Cast(fov, to=DOUBLE), keepdims=0), op.Cast(pixels * fov, to=DOUBLE)
        mean = op.ReduceSum(exact, [0, 1], keepdims=0) / area
        square = op.ReduceSum(exact * exact, [0, 1], keepdims=0) / area
        spread = op.Max(op.Sqrt(op.Max(square - mean * mean, 0.0)), LOWEST_SPREAD)
        levels = op.Cast(op.Round(NORMAL_MEAN + (exact - mean) * NORMAL_SPREAD / spread), to=FLOAT32)
        levels = op.Clip(levels, 0.0, 255.0) * fov
        chosen = op.Where(normal, levels, pixels)
        box = op.Unsqueeze(op.Transpose(op.Slice(chosen, start, start + sides, [0, 1]), perm=[2, 0, 1]), [0])
        to = op.Concat([1, 3], size, axis=0)
        resized = op.Resize(box, None, None, to, mode=mode, antialias=antialias, cubic_coeff_a=-0.75)
        inputs = op.Clip(op.Round(resized), 0.0, 255.0) / 255.0

        strides = op.Max((size + 2 * border + stride - 1) / stride, 2)
        after = strides * stride - size - border
        logits = NETWORK.Forward(op.Pad(inputs, op.Concat(before, after, axis=0)))

        style = op.Cast(diameter >= FINE_BELOW, to=INT) * (op.Shape(logits, start=1, end=2) - 1)
        ours = op.Slice(op.Gather(logits, style, axis=1), corner, size + border, [2, 3])
        there = op.Resize(op.Clip(ours, lowest, greatest), None, None, op.Concat([1, 1], sides, axis=0), mode="linear")
        beside = op.Concat(start, shape - start - sides, axis=0)
        probability = op.Pad(op.Sigmoid(op.Squeeze(there, [0, 1])), beside) * op.Squeeze(fov, [2])
        vessels = op.Cast(op.Cast(probability > threshold, to=INT) * 255, to=UINT)
        return vessels, probability, op.Squeeze(op.Cast(fov * 255.0, to=UINT), [2])

    return around.to_model_proto(output_types=MAPS)
