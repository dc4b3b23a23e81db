"""What each option of a recipe may be. The values come from the tables that they name."""

from __future__ import annotations

from collections.abc import Mapping

from vlmq_export import formats
from vlmq_export.formats import contract
from vlmq_export.quantizer.config import ACT_ORDERS, LONG_IMAGES, ROTATIONS
from vlmq_export.quantizer.methods import METHODS

_RUN_BY = {
    "gptq": "safetensors for transformers and GPTQModel",
    "compressed-tensors": "safetensors for vLLM and SGLang",
    "onnx": "for ONNX Runtime and onnxruntime-genai",
    "gguf": "for llama.cpp",
}
# key of the recipe → value → a few words for the command's help
CHOICES: dict[str, Mapping[str, str]] = {
    "format": {name: _RUN_BY[name] for name in formats.NAMES},
    "method": {name: method.about for name, method in METHODS.items()},
    "act_order": ACT_ORDERS,
    "rotate": ROTATIONS,
    "long_images": LONG_IMAGES,
    "device": {"auto": "CUDA where there is one", "cpu": "the CPU", "cuda": "a CUDA device"},
    "gptq_version": contract.GPTQ_VERSIONS,
    "gptq_names": contract.GPTQ_NAMES,
    "onnx_graph": contract.ONNX_GRAPHS,
    "onnx_dtype": contract.ONNX_DTYPES,
    "onnx_provider": contract.ONNX_PROVIDERS,
    "mmproj": contract.MMPROJ_TYPES,
    "class_row": contract.CLASS_ROWS,
}
