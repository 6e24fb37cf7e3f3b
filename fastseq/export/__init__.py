"""Trained models for other runtimes: ONNX, and packages of torch.export."""
