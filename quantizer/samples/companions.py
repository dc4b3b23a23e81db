"""The tokenizer and the image processor of a model folder, as transformers resolves them.

transformers puts both together from several files, and each release has rules of its own for which
of them counts. What it loads is what the reference computes with. Whoever writes a token or an
image setting into a file therefore asks here, and reads none of these files itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmq_export.errors import CheckpointError, MissingRuntime
from vlmq_export.quantizer.storage.untrusted import read_json, third_party

PREPROCESSOR = "preprocessor_config.json"  # where transformers 4 saved the image processor
PROCESSOR = "processor_config.json"  # where transformers 5 saves it, as `image_processor`


@contextmanager
def _importing() -> Iterator[None]:
    """Raises MissingRuntime where transformers cannot be imported."""
    with third_party(
        "transformers cannot be imported; where torchvision is named, install the build for your"
        " torch or remove it",
        MissingRuntime,
    ):
        yield


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a model folder.

    Raises CheckpointError for files that are missing or damaged. Without the vocabulary's file,
    transformers would make a tokenizer of the special tokens alone.

    SmolVLM's files name GPT2Tokenizer, which puts a pre-tokenizer of its own in the place of that
    of tokenizer.json. For `smolvlm`, transformers goes by the file instead, as every runtime does;
    here the same is done for SmolVLM's first generation. Where mistral-common is installed,
    transformers takes its tokenizer for Mistral's models, which makes no special token of a text.
    """
    with _importing():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    vocabulary = [("tokenizer.json",), ("vocab.json", "merges.txt")]
    if not any(all((folder / file).is_file() for file in files) for files in vocabulary):
        raise CheckpointError(
            f"{folder}: tokenizer.json is missing, and so are vocab.json and merges.txt;"
            " copy it from the original model"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(
            f"{folder}: tokenizer_config.json is missing; copy it from the original model"
        )
    with third_party(f"{folder}: transformers cannot read its tokenizer"):
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        kind = type(loaded).__name__
        by_file = kind == "GPT2Tokenizer" and _splits_by_itself(folder)
        if by_file or kind == "MistralCommonBackend":
            loaded = PreTrainedTokenizerFast.from_pretrained(folder)
        return loaded


def _splits_by_itself(folder: Path) -> bool:
    """Whether tokenizer.json has another pre-tokenizer than GPT-2."""
    file = folder / "tokenizer.json"
    pre = read_json(file).get("pre_tokenizer") if file.is_file() else None
    return isinstance(pre, dict) and pre.get("type") != "ByteLevel"


def chat_template(folder: Path, tokenizer: Any) -> str | None:
    """The template that turns a conversation into a prompt, or None where there is none.

    It is the tokenizer's own, or that of chat_template.json, where some models keep it. Of several
    templates it is the one named `default`.
    """
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    file = folder / "chat_template.json"
    if not own and file.is_file():
        own = read_json(file).get("chat_template")
    return own if isinstance(own, str) and own else None


def load_image_processor(folder: Path) -> Any:
    """transformers' image processor of a model folder, the one that decodes with Pillow.

    transformers' combined processors need torchvision for some families. This one does not. Raises
    CheckpointError for settings that are missing or that transformers cannot read.
    """
    with _importing():
        from transformers import AutoImageProcessor
    nested = folder / PROCESSOR
    if not (folder / PREPROCESSOR).is_file() and not (
        nested.is_file() and isinstance(read_json(nested).get("image_processor"), dict)
    ):
        raise CheckpointError(
            f"{folder}: {PREPROCESSOR} is missing, and {PROCESSOR} has no image_processor;"
            " copy it from the original model"
        )
    with third_party(f"{folder}: transformers cannot read its image processor"):
        return _with_pillow(AutoImageProcessor, folder)


def _with_pillow(auto: Any, folder: Path) -> Any:
    """The image processor that decodes with Pillow. `auto` is transformers' AutoImageProcessor.

    Without torchvision, some versions of transformers (5.17) export a stand-in under that name,
    which raises ImportError whatever it is asked. The module that defines the class has it all the
    same. Where that one finds no processor either (5.4), the first error names what is missing.
    """
    try:
        return auto.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except ImportError as missing:
        from transformers.models.auto.image_processing_auto import AutoImageProcessor as Own

        try:
            return Own.from_pretrained(folder, backend="pil", trust_remote_code=False)
        except ValueError:
            raise missing from None


@dataclass(frozen=True)
class ImageSettings:
    """What an image processor does to an image, with transformers' defaults filled in.

    A channel of 0 to 255 becomes `(value · rescale − mean) / std`.
    """

    mean: tuple[float, ...]  # of each channel
    std: tuple[float, ...]
    rescale: float
    # Of an image after resizing. None: the family gives every image one size.
    min_pixels: int | None = None
    max_pixels: int | None = None
    min_tiles: int | None = None  # into which a large image may be cut; None: it is not cut
    max_tiles: int | None = None
    patch: int | None = None  # side of a patch in pixels; None: the tower alone knows it
    merge: int | None = None  # patches along each side that become one token
    frames: int | None = None  # of a patch
    longest: int | None = None  # longer side of an image, where tiles of one size are cut from it
    resample: int | None = None  # the filter of a resize, by Pillow's number


def image_settings(folder: Path) -> ImageSettings:
    """The settings of the image processor of a model folder.

    Raises CheckpointError for settings that are missing, or of another kind than a processor has.
    """
    processor = load_image_processor(folder)
    with third_party(f"{folder}: the settings of its image processor cannot be used"):
        return _settings(processor)


def _settings(processor: Any) -> ImageSettings:
    """The settings of transformers' processor. Raises TypeError or ValueError for odd values."""
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, std = _channels(processor.image_mean), _channels(processor.image_std)
    if not all(s > 0 for s in std):
        raise ValueError(f"image_std is {list(std)}; three numbers above 0 are expected")
    low, high = pixel_limits(processor)

    def whole(name: str) -> int | None:
        value = getattr(processor, name, None)
        return None if value is None else int(value)

    return ImageSettings(
        mean,
        std,
        float(processor.rescale_factor) if processor.do_rescale else 1.0,
        low,
        high,
        whole("min_patches"),
        whole("max_patches"),
        whole("patch_size"),
        whole("merge_size"),
        whole("temporal_patch_size"),
        _longest(processor),
        whole("resample"),
    )


def _longest(processor: Any) -> int | None:
    """To how many pixels the processor makes the longer side of an image, before it cuts tiles.

    It is the side of a tile where it is told to cut none. None where it cannot cut so.
    """
    cuts = getattr(processor, "do_image_splitting", None)
    if cuts is None:
        return None
    return int((processor.size if cuts else processor.max_image_size)["longest_edge"])


def _channels(values: Sequence[float] | float) -> tuple[float, ...]:
    """A number for each of three channels, from three or from one that is meant for all."""
    if isinstance(values, (int, float)):
        return (float(values),) * 3
    found = tuple(float(v) for v in values)
    if len(found) != 3:
        raise ValueError(f"{list(values)} has not one number for each of three channels")
    return found


def pixel_limits(processor: Any) -> tuple[int | None, int | None]:
    """Smallest and largest area of an image in pixels that the processor leaves alone.

    None where it has no such limits, because every image gets one size.
    """
    size = dict(processor.size or {})
    low = size.get("shortest_edge") or getattr(processor, "min_pixels", None)
    high = size.get("longest_edge") or getattr(processor, "max_pixels", None)
    return (int(low), int(high)) if low and high else (None, None)
