"""Runs a compressed-tensors folder in transformers, as a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.in_transformers.proof.worker import Loaded, from_pretrained, main


def load(request: dict) -> Loaded:
    """The folder with its weights decoded.

    transformers decodes a folder of one grid while it loads. A folder of several is decoded by the
    library first, each linear by its own grid, into a folder of floats.
    """
    from transformers import CompressedTensorsConfig

    asked = request["loading"]
    with wide_scales(request["exact"]):
        if asked["one_grid"]:
            chosen = CompressedTensorsConfig(dequantize=True)
            model = from_pretrained(request, quantization_config=chosen)
        else:
            model = decoded(request)
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in asked["linears"]}
    kernel = f"compressed-tensors {version('compressed-tensors')}"
    return Loaded(model, linears, CompressedFolder.parts, kernel, lambda m: m.weight)


def decoded(request: dict) -> Any:
    """The model from a copy of the folder that the library decoded, which is gone afterwards.

    Raises what the library raises, and RuntimeError for tensors that find no place.
    """
    from compressed_tensors.entrypoints.convert import (
        CompressedTensorsDequantizer,
        convert_checkpoint,
    )

    dtype = getattr(torch, request["dtype"])
    with tempfile.TemporaryDirectory(dir=request["out"]) as copy:
        converter = CompressedTensorsDequantizer(request["folder"], dtype=dtype)
        convert_checkpoint(request["folder"], copy, converter)
        return from_pretrained(request | {"folder": copy})


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
