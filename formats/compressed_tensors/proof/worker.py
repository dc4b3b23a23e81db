"""Runs a compressed-tensors folder in transformers, as a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.in_transformers.proof.worker import Loaded, from_pretrained, main


def load(request: dict) -> Loaded:
    """The folder with its weights decoded.

    transformers decodes a folder of one grid while it loads. A folder of two is decoded by the
    library before the first call, which is asked for here.
    """
    from transformers import CompressedTensorsConfig

    asked, chosen = request["loading"], {}
    if asked["dequantize"]:
        chosen["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    with wide_scales(request["exact"]):
        model = from_pretrained(request, **chosen)
    if not asked["dequantize"]:
        model.hf_quantizer.compressor.decompress_model(model)
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in asked["linears"]}
    kernel = f"compressed-tensors {version('compressed-tensors')}"
    return Loaded(model, linears, CompressedFolder.parts, kernel, lambda m: m.weight)


@contextmanager
def wide_scales(wide: bool) -> Iterator[None]:
    """Let the library decode with scales in float32 while the context lasts.

    Otherwise it rounds each weight to the float16 of the scales, which is 2e-4 of a weight.
    """
    from compressed_tensors.compressors import BaseCompressor

    of_layout: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    own = of_layout.__dict__["decompress"]
    plain = of_layout.decompress

    def decompress(state: dict[str, Any], scheme: Any) -> dict[str, Any]:
        return plain(state | {"weight_scale": state["weight_scale"].float()}, scheme)

    if wide:
        of_layout.decompress = staticmethod(decompress)
    try:
        yield
    finally:
        of_layout.decompress = own


if __name__ == "__main__":
    main(load)
