"""Levels L1 to L3 of an ONNX folder, in ONNX Runtime and onnxruntime-genai."""
