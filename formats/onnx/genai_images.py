"""The content of processor_config.json: image steps of onnxruntime-extensions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from vlmq_export.errors import FormatError
from vlmq_export.quantizer.samples.companions import ImageSettings

# Pillow's number of a filter → the name that onnxruntime-extensions has for it.
_FILTERS = {1: "LANCZOS", 2: "LINEAR", 3: "CUBIC"}


def patch_steps(image: ImageSettings) -> dict:
    """The patches of the model's own processor, in the same order.

    Raises FormatError for a processor without such patches.
    """
    unit = {"patch_size": image.patch, "merge_size": image.merge}
    resize = {
        "width": 540,
        "height": 360,
        "smart_resize": 1,
        "min_pixels": image.min_pixels,
        "max_pixels": image.max_pixels,
        **unit,
    }
    patches = {"temporal_patch_size": image.frames, **unit}
    for name, value in (resize | patches).items():
        if value is None:
            raise FormatError(
                f"the image processor has no {name}, which onnxruntime-genai needs;"
                " copy preprocessor_config.json from the original model"
            )
    steps = [
        _step("decode_image", "DecodeImage", {"color_space": "RGB"}),
        _step("convert_to_rgb", "ConvertRGB"),
        _step("resize", "Resize", resize),
        *_scaled(image, {"qwen2_5_vl": 1}),
        _step("patch_image", "PatchImage", patches),
    ]
    return {"processor": {"name": "qwen2_5_image_processor", "transforms": steps}}


def tile_steps(image: ImageSettings, side: int) -> dict:
    """An image as one tile, float32 [3, side, side].

    DecodeImage gives the channels in this order already, and ConvertRGB would turn it round. Raises
    FormatError for a filter that the runtime lacks.
    """
    if image.resample not in _FILTERS:
        raise FormatError(
            f"the image processor resizes by filter {image.resample} of Pillow's, which"
            f" onnxruntime-genai lacks; it has {', '.join(map(str, _FILTERS))}"
        )
    filter_ = _FILTERS[image.resample]
    resize = {"interpolation": filter_, "width": side, "height": side, "keep_aspect_ratio": 0}
    steps = [
        _step("decode_image", "DecodeImage", {"color_space": "RGB"}),
        _step("resize", "Resize", resize),
        *_scaled(image),
        _step("permute", "Permute3D", {"dims": [2, 0, 1]}),
    ]
    return {"processor": {"name": "tile_image_processor", "transforms": steps}}


def _scaled(image: ImageSettings, more: Mapping[str, int] = MappingProxyType({})) -> list[dict]:
    """Channels of 0 to 255 become (value · rescale − mean) / std. `more`: other attributes."""
    normalize = {"mean": list(image.mean), "std": list(image.std), **more}
    return [
        _step("rescale", "Rescale", {"rescale_factor": image.rescale}),
        _step("normalize", "Normalize", normalize),
    ]


def _step(name: str, kind: str, attributes: dict | None = None) -> dict:
    return {
        "operation": {"name": name, "type": kind} | ({"attrs": attributes} if attributes else {})
    }
