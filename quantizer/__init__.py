"""The quantizer: a model and calibration data in, an artifact out.

It imports torch, transformers, safetensors, numpy and Pillow only.
"""
