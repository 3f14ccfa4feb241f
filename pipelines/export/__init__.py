"""Export of a model as files for other programs: PyTorch, ONNX, MLflow, a model card."""
