"""A model as files for other programs: PyTorch, ONNX, a model card."""
