"""Model + calibration data → artifact. Imports torch, transformers, safetensors, numpy and Pillow only."""
