"""Inference: one image (segmenter), many (batch), a dataset's pairs (protocol), a faster network (engine), ONNX (export)."""
