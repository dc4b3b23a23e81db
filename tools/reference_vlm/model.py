"""The first reference VLM: tokenizer, configs and inputs, and small checkpoints of random weights.

Two architectures share one decoder (256 wide, M-RoPE) and differ in the vision tower:

    qwen2_5_vl   windowed attention, gated MLP, RMSNorm
    qwen2_vl     full attention, plain MLP, LayerNorm

A third has the same tokens and patches, and a decoder of its own:

    qwen3_5      gated delta nets in three of four layers; Qwen3-VL's tower

Every in_features of the decoder is a multiple of 256, so that every K-quant of llama.cpp fits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

BUNDLED = Path(__file__).resolve().parents[2] / "vlmq_export" / "reference_vlm"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
SPECIAL_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Each architecture's processor class, as published preprocessor_config.json files name it.
PROCESSORS = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen3_5": "Qwen3VLProcessor",
}
# Pixels. A merged vision token covers 2 × 2 patches, so that image sides are multiples of 28.
PATCH = 14
IMAGE_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
IMAGE_STD = np.array([0.26862954, 0.26130258, 0.27577711])
IGNORED = -100  # the label of a token that has no part in the loss
# The text fields of the config.json that Qwen2-VL was published with.
_PUBLISHED_TEXT_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)

# --- tokenizer ------------------------------------------------------------------------------------


def load_tokenizer(folder: Path = BUNDLED):
    """The tokenizer of a checkpoint folder.

    The default is the bundled one, whose token ids are the rows of the bundled embedding.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def train_tokenizer(texts: Iterable[str], out_dir: Path, *, vocab_size: int = 376) -> None:
    """Train a byte-level BPE with Qwen2's pre-tokenizer on `texts`, and write its files.

    The config and the chat template are the bundled ones, since they name tokens and no ids.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    qwen2_split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(qwen2_split), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)

    out_dir.mkdir(parents=True, exist_ok=True)
    copy_tokenizer(BUNDLED, out_dir)
    tokenizer.save(str(out_dir / "tokenizer.json"))


def copy_tokenizer(source: Path, out_dir: Path) -> None:
    """Copy the tokenizer and chat template files byte for byte.

    A library that read and wrote them would change their form.
    """
    for name in TOKENIZER_FILES:
        if (source / name).resolve() != (out_dir / name).resolve():
            shutil.copyfile(source / name, out_dir / name)


# --- model ----------------------------------------------------------------------------------------


def make_config(
    arch: str,
    tokenizer,
    *,
    layers: int = 6,  # of the decoder
    depth: int = 4,  # vision blocks
    mlp_ratio: int = 3,  # width of the vision MLP over that of the tower
    tied: bool = True,  # whether the output matrix is the embedding
):
    """The transformers config of `arch`, with the ids of `tokenizer`.

    Raises ValueError for an architecture that PROCESSORS does not list.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig, Qwen3_5Config

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = _text_config(ids, vocabulary=len(tokenizer), layers=layers, tied=tied)
    vision: dict = {
        "depth": depth,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    shared = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tied,
    }
    if arch == "qwen2_5_vl":
        vision |= {"hidden_size": 128, "intermediate_size": 128 * mlp_ratio, "out_hidden_size": 256}
        vision |= {"window_size": 112, "fullatt_block_indexes": [1, depth - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)
    if arch == "qwen2_vl":
        vision |= {"embed_dim": 128, "hidden_size": 256, "mlp_ratio": mlp_ratio}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **shared)
    if arch == "qwen3_5":
        vision |= {"hidden_size": 128, "intermediate_size": 128 * mlp_ratio, "out_hidden_size": 256}
        vision |= {"num_position_embeddings": 64}
        return Qwen3_5Config(text_config=_recurrent(text), vision_config=vision, **shared)
    raise ValueError(f"unknown architecture {arch!r}: expected one of {', '.join(PROCESSORS)}")


def _text_config(ids: dict[str, int], *, vocabulary: int, layers: int, tied: bool) -> dict:
    """The decoder's part of the config; the embedding has a multiple of 64 rows."""
    return {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_window_layers": layers,
        "vocab_size": -(-vocabulary // 64) * 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [8, 12, 12],
        },
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "tie_word_embeddings": tied,
    }


def _recurrent(text: dict) -> dict:
    """The decoder's part of Qwen3.5's config: values have twice as many heads as keys."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    own = {
        "head_dim": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 64,
        "rope_parameters": rope | {"mrope_interleaved": True, "mrope_section": [6, 5, 5]},
    }
    return {key: value for key, value in text.items() if key != "max_window_layers"} | own


def make_model(config):
    """A float32 model of `config` with transformers' own initialisation."""
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLForConditionalGeneration,
        Qwen3_5ForConditionalGeneration,
    )

    classes = {
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen3_5": Qwen3_5ForConditionalGeneration,
    }
    return classes[config.model_type](config).float()


def load_model(folder: Path):
    """The model of a checkpoint folder, whose bfloat16 weights then run in float32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()


def save_model(model, out_dir: Path, *, tokenizer_dir: Path = BUNDLED) -> None:
    """Write `model` in bfloat16 as a folder in the hub's layout.

    Every file appears whole or not at all.
    """
    temporary = incoming(out_dir)
    half = bfloat16_copy(model)
    pad = model.config.text_config.bos_token_id
    half.generation_config.update(do_sample=False, pad_token_id=pad)
    half.save_pretrained(temporary)
    copy_tokenizer(tokenizer_dir, temporary)
    preprocessor = json.loads((BUNDLED / "preprocessor_config.json").read_text())
    preprocessor["processor_class"] = PROCESSORS[model.config.model_type]
    (temporary / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2) + "\n")
    publish(temporary, out_dir)


def bfloat16_copy(model):
    """A copy of `model` in bfloat16; the float32 weights of a running training stay as they are."""
    half = type(model)(model.config)
    half.load_state_dict(model.state_dict())
    return half.to(torch.bfloat16)


def load_initial_weights(model, path: Path) -> tuple[int, int]:
    """Start `model` from the weights of a checkpoint of either architecture.

    A tensor is taken where its name and shape fit. The whole decoder always fits, and a part of the
    vision tower of the other architecture. Returns the tensors taken and the tensors in all.
    """
    wanted = dict(model.named_parameters())  # tied weights once
    taken = {}
    for name, value in load_file(path).items():
        if name.startswith("visual."):
            name = f"model.{name}"
        elif not name.startswith(("model.language_model.", "model.visual.", "lm_head.")):
            name = name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.visual.blocks.") and model.config.model_type == "qwen2_vl":
            name = name.replace("mlp.up_proj", "mlp.fc1").replace("mlp.down_proj", "mlp.fc2")
        if name in wanted and wanted[name].shape == value.shape:
            taken[name] = value.float()
    model.load_state_dict(taken, strict=False)
    return len(taken), len(wanted)


# --- inputs ---------------------------------------------------------------------------------------


def patches(image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
    """An image's normalised patches in Qwen2-VL's order, and its grid.

    The patches are float32 [rows · columns, 3 · 2 · 14 · 14], in the order (rows/2, columns/2, 2,
    2), which keeps the four patches of a merged token together. Both frames of the temporal patch
    are the same image. The grid is (1, rows, columns), counted in patches.
    """
    pixels = (np.asarray(image.convert("RGB"), np.float32) / 255 - IMAGE_MEAN) / IMAGE_STD
    rows, columns = pixels.shape[0] // PATCH, pixels.shape[1] // PATCH
    frames = np.stack([pixels.transpose(2, 0, 1)] * 2)  # [2, 3, height, width]
    tiles = frames.reshape(2, 3, rows // 2, 2, PATCH, columns // 2, 2, PATCH)
    tiles = tiles.transpose(2, 5, 3, 6, 1, 0, 4, 7)  # [rows/2, columns/2, 2, 2, 3, 2, 14, 14]
    return tiles.reshape(rows * columns, -1).astype(np.float32), (1, rows, columns)


def prompt(question: str, image_tokens: int) -> str:
    """The chat prompt as trained: one image, no system message, no newline after the image."""
    image = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>"
    return f"<|im_start|>user\n{image}{question}<|im_end|>\n<|im_start|>assistant\n"


def make_batch(
    tokenizer, rows: list[tuple[Image.Image, str, str | None]]
) -> dict[str, torch.Tensor]:
    """The model's inputs for rows of (image, question, answer); an answer of None ends the prompt.

    Returns the tensors of `padded`, mm_token_type_ids [B, L], which mark the image's tokens,
    pixel_values [patches, 1176] and image_grid_thw [B, 3].
    """
    prompts, answers, pixels, grids = [], [], [], []
    for image, question, answer in rows:
        values, grid = patches(image)
        prompts.append(prompt(question, grid[1] * grid[2] // 4))
        answers.append("" if answer is None else f"{answer}<|im_end|>\n")
        pixels.append(values)
        grids.append(grid)
    batch = padded(tokenizer, prompts, answers)
    image_token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return batch | {
        "mm_token_type_ids": (batch["input_ids"] == image_token).long(),
        "pixel_values": torch.from_numpy(np.concatenate(pixels)),
        "image_grid_thw": torch.tensor(grids),
    }


def padded(tokenizer, prompts: list[str], answers: list[str]) -> dict[str, torch.Tensor]:
    """Prompts and their answers as tokens, padded on the right: B rows of at most L tokens.

    Returns input_ids, attention_mask and labels, [B, L] each. Only the tokens of an answer have
    labels; "" is no answer.
    """

    def ids(texts: list[str]) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

    rows = list(zip(ids(prompts), ids(answers)))
    length = max(len(asked) + len(told) for asked, told in rows)

    def right_padded(sequences: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in sequences])

    sequences = [asked + told for asked, told in rows]
    labels = [[IGNORED] * len(asked) + told for asked, told in rows]
    return {
        "input_ids": right_padded(sequences, tokenizer.pad_token_id),
        "attention_mask": right_padded([[1] * len(row) for row in sequences], 0),
        "labels": right_padded(labels, IGNORED),
    }


# --- random checkpoints ---------------------------------------------------------------------------


def make_random_checkpoint(
    out_dir: Path | str,
    arch: str = "qwen2_vl",
    seed: int = 0,
    *,
    layers: int = 4,
    depth: int = 4,  # vision blocks; llama.cpp's table of names needs at least three
    tied: bool = True,
) -> Path:
    """Write a small checkpoint of random weights in the hub's layout.

    The same arguments give the same bytes. The model knows nothing, but no activation is
    degenerate: biases and norms are random too, so that a runtime that drops or swaps one gives
    other logits. `qwen2_vl` gets the flat config.json that Qwen2-VL was published with.
    """
    out_dir = Path(out_dir)
    config = make_config(arch, load_tokenizer(), layers=layers, depth=depth, mlp_ratio=4, tied=tied)
    model = make_model(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.copy_(random_weight(name, weight.shape, generator))
    save_model(model, out_dir)
    if arch == "qwen2_vl":
        _replace_text(out_dir / "config.json", json.dumps(flat_config(config), indent=2) + "\n")
    return out_dir


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random values for one tensor, float32, of a size that suits its part in the model."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name or ".ln_q." in name:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    if name.endswith("bias"):
        return (0.2 if "self_attn" in name or "qkv" in name else 0.05) * noise
    # A patch holds 1176 strongly correlated pixels. This factor keeps its embedding near 1.
    if "patch_embed" in name:
        return 0.02 * noise
    # Larger queries and keys make attention sharp. Otherwise every position would see the same
    # mean, and greedy decoding would repeat one token.
    return (0.1 if ".q_proj." in name or ".k_proj." in name else 0.05) * noise


def flat_config(config) -> dict:
    """Qwen2-VL's config.json as published in 2024: the decoder's fields at the top, old names."""
    text, vision = config.text_config, config.vision_config
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **{name: getattr(text, name) for name in _PUBLISHED_TEXT_FIELDS},
        "sliding_window": text.max_position_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": text.rope_parameters["mrope_section"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "vision_start_token_id": config.vision_start_token_id,
        "vision_end_token_id": config.vision_end_token_id,
        "vision_token_id": config.vision_end_token_id + 1,  # <|vision_pad|>, which follows it
        "vision_config": {
            "depth": vision.depth,
            "embed_dim": vision.embed_dim,
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "in_chans": vision.in_channels,
            "mlp_ratio": vision.mlp_ratio,
            "num_heads": vision.num_heads,
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "spatial_patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "model_type": "qwen2_vl",
        },
    }


# --- files ----------------------------------------------------------------------------------------


def incoming(out_dir: Path) -> Path:
    """Where to make the folder whose files `publish` moves into `out_dir`. Nothing is there yet."""
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary = out_dir / ".incoming"
    shutil.rmtree(temporary, ignore_errors=True)
    return temporary


def publish(temporary: Path, out_dir: Path) -> None:
    """Move the finished files of `temporary` into `out_dir`, and remove the empty folder."""
    for path in sorted(temporary.iterdir()):
        path.chmod(0o644)  # safetensors writes 600
        path.replace(out_dir / path.name)
    temporary.rmdir()


def replace_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file through a temporary name.

    Whoever reads `path` sees the old file or the new one, never a part.
    """
    temporary = path.with_name(path.name + ".tmp")
    whole = {name: value.contiguous() for name, value in tensors.items()}
    save_file(whole, temporary, metadata=metadata)
    temporary.replace(path)


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)
