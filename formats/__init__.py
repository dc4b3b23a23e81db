"""Writes an artifact as the files of a runtime, and reads such files back.

Each format is a package. `contract.py` says what such a package offers, `model_plan.py` what it is
told of the model before any weight is read, and `proof/` what the proofs of all formats share.
"""

NAMES = ("gptq", "compressed-tensors", "onnx", "gguf")
NATIVE_MIX = "Q4_K_M"  # what GGUF alone is solved on by default: the mix of most files that exist
