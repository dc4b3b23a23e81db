"""The second reference VLM, of LLaVA-OneVision's architecture: its config, files, inputs, and where its training starts.

A SigLIP tower (5 blocks, 192 wide, learned positions), an MLP projector and a Qwen2 decoder (8 layers, 256 wide, one
position axis). Every image is one tile of 112 × 112 pixels, whatever its shape, as vlmq_export gives this family's
images: 64 vision tokens and the newline.

The decoder starts as the first reference's with two layers inserted that do nothing yet; the tower's first 128 channels
start as the first reference's residual stream, and the other 64 hold the positions that it had as rotations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tools.reference_vlm import model as first

FOLDER = Path(__file__).parent / "llava_onevision"  # the trained checkpoint
SIDE, PATCH, IMAGE_TOKENS = 112, 14, 65  # pixels; 8 · 8 patches and the newline
RENAMED_TOKENS = {"<|image_pad|>": "<image>", "<|video_pad|>": "<video>"}
FIRST_WIDTH = 128  # of the first reference's vision tower
# The first reference's decoder layer that each layer starts as; negative: a copy of it that adds nothing yet.
DECODER_FROM = (0, 1, 2, -2, 3, 4, -4, 5)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "image_grid_pinpoints": [[SIDE, SIDE]],
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "LlavaOnevisionImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "LlavaOnevisionProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": SIDE, "width": SIDE},
}
PROCESSOR = {
    "image_token": "<image>",
    "num_image_tokens": IMAGE_TOKENS - 1,
    "processor_class": "LlavaOnevisionProcessor",
    "video_token": "<video>",
    "vision_feature_select_strategy": "full",
}


# --- config and files ------------------------------------------------------------------------------------------


def make_config(tokenizer):
    """The transformers config for a tokenizer that write_tokenizer wrote."""
    from transformers import LlavaOnevisionConfig

    layers = len(DECODER_FROM)
    text = {
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_window_layers": layers,
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "image_size": SIDE,
        "patch_size": PATCH,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PREPROCESSOR["image_grid_pinpoints"],
        tie_word_embeddings=True,
    )


def make_model(config):
    """A float32 model of `config` with transformers' own initialisation."""
    from transformers import LlavaOnevisionForConditionalGeneration

    return LlavaOnevisionForConditionalGeneration(config).float()


def write_tokenizer(out_dir: Path) -> None:
    """The first reference's tokenizer with its image and video tokens renamed, and LLaVA-OneVision's chat template."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (first.BUNDLED / name).read_text("utf-8")
        for old, new in RENAMED_TOKENS.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        (out_dir / name).write_text(text, "utf-8")
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    _write_json(out_dir / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def save_model(model, out_dir: Path) -> None:
    """Write `model` in bfloat16 as a folder in the hub's layout; every file appears whole or not at all."""
    out_dir.mkdir(parents=True, exist_ok=True)
    temporary = out_dir / ".incoming"
    shutil.rmtree(temporary, ignore_errors=True)
    half = type(model)(model.config)  # leaves the float32 weights of a running training alone
    half.load_state_dict(model.state_dict())
    half = half.to(torch.bfloat16)
    text = model.config.text_config
    half.generation_config.update(
        do_sample=False, bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.bos_token_id
    )
    half.save_pretrained(temporary)
    weights = load_file(temporary / "model.safetensors")
    published = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight for name, weight in weights.items()
    }
    save_file(published, temporary / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(temporary)
    _write_json(temporary / "preprocessor_config.json", PREPROCESSOR)
    _write_json(temporary / "processor_config.json", PROCESSOR)
    for path in sorted(temporary.iterdir()):
        path.chmod(0o644)  # safetensors writes 600
        path.replace(out_dir / path.name)
    temporary.rmdir()


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# --- inputs ----------------------------------------------------------------------------------------------------


def tile(image: Image.Image) -> np.ndarray:
    """The whole image squeezed into one tile: float32 [3, 112, 112] in -1..1, as LlavaOnevisionImageProcessor's base."""
    squeezed = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (np.asarray(squeezed, np.float32) / 127.5 - 1).transpose(2, 0, 1)


def prompt(question: str, image_tokens: int = 1, *, finished: bool = False) -> str:
    """The chat prompt as published for LLaVA-OneVision on Qwen2: a space after the role, no newline between turns.

    The template opens an answer to come with a newline, a `finished` one with a space and a newline.
    """
    opening = " \n" if finished else "\n"
    return f"<|im_start|>user {'<image>' * image_tokens}\n{question}<|im_end|><|im_start|>assistant{opening}"


def make_batch(tokenizer, rows: list[tuple[Image.Image, str, str | None]]) -> dict[str, torch.Tensor]:
    """Model inputs of (image, question, answer) rows, right-padded: B rows of at most L tokens.

    Returns input_ids, attention_mask and labels [B, L] (-100 except on the answer), pixel_values [B, 3, 112, 112],
    image_sizes [B, 2] and batch_num_images [1]: one sample of several images, which is how transformers takes an image
    as one tile. An answer of None leaves the prompt alone; every fourth answer stands as in a finished turn, so that
    training sees both ways of writing it.
    """
    sequences, labels = [], []
    for place, (_, question, answer) in enumerate(rows):
        finished = answer is not None and place % 4 == 3
        asked = tokenizer(prompt(question, IMAGE_TOKENS, finished=finished), add_special_tokens=False)["input_ids"]
        told = [] if answer is None else tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        sequences.append(asked + told)
        labels.append([-100] * len(asked) + told)
    length = max(map(len, sequences))
    return {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in sequences]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in sequences]),
        "labels": torch.tensor([row + [-100] * (length - len(row)) for row in labels]),
        "pixel_values": torch.from_numpy(np.stack([tile(image) for image, _, _ in rows])),
        "image_sizes": torch.tensor([[image.height, image.width] for image, _, _ in rows]),
        "batch_num_images": torch.tensor([max(2, len(rows))]),
    }


# --- where training starts -------------------------------------------------------------------------------------


@torch.no_grad()
def start_from(model, teacher) -> None:
    """Start `model` from the first reference VLM: its decoder whole, its tower as far as SigLIP's blocks can hold it."""
    _start_decoder(model.model.language_model, teacher.model.language_model)
    _start_tower(model.model.vision_tower, teacher.model.visual)


def _start_decoder(decoder, source) -> None:
    """The inserted layers' output projections are zero: at the start the decoder computes what the first's does."""
    decoder.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    decoder.norm.load_state_dict(source.norm.state_dict())
    for layer, place in zip(decoder.layers, DECODER_FROM):
        layer.load_state_dict(source.layers[abs(place)].state_dict())
        if place < 0:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def _start_tower(tower, source) -> None:
    """Patch embedding exact, attention copied without its rotations, MLPs (not gated here) fresh and small."""
    mean, std = (torch.from_numpy(values).float().view(3, 1, 1) for values in (first.IMAGE_MEAN, first.IMAGE_STD))
    kernel = source.patch_embed.proj.weight.sum(2)  # [128, 3, 14, 14]: both frames are the same image
    embeddings = tower.embeddings
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    embeddings.patch_embedding.weight[:FIRST_WIDTH] = kernel / (2 * std)
    embeddings.patch_embedding.bias[:FIRST_WIDTH] = (kernel * (0.5 - mean) / std).sum((1, 2, 3))
    across = SIDE // PATCH
    extra = embeddings.embed_dim - FIRST_WIDTH
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(across, 1, extra, generator=generator)
    right = torch.randn(1, across, extra, generator=generator)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[:, FIRST_WIDTH:] = 0.5 * (down + right).flatten(0, 1)

    share = (FIRST_WIDTH / embeddings.embed_dim) ** 0.5
    for block, origin in zip(tower.encoder.layers, source.blocks):
        block.layer_norm1.weight[:FIRST_WIDTH] = origin.norm1.weight * share
        block.layer_norm2.weight[:FIRST_WIDTH] = origin.norm2.weight * share
        attention = block.self_attn
        parts = zip(origin.attn.qkv.weight.chunk(3), origin.attn.qkv.bias.chunk(3))
        for linear, (weight, bias) in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts):
            linear.weight[:FIRST_WIDTH, FIRST_WIDTH:] *= 0.3
            linear.weight[FIRST_WIDTH:] *= 0.5
            linear.weight[:FIRST_WIDTH, :FIRST_WIDTH] = weight
            linear.bias[:FIRST_WIDTH] = bias
        attention.out_proj.weight[:, FIRST_WIDTH:] *= 0.3
        attention.out_proj.weight[FIRST_WIDTH:] *= 0.3
        attention.out_proj.weight[:FIRST_WIDTH, :FIRST_WIDTH] = origin.attn.proj.weight
        attention.out_proj.bias[:FIRST_WIDTH] = origin.attn.proj.bias
        block.mlp.fc2.weight.mul_(0.3)


# --- uneven channels -------------------------------------------------------------------------------------------


@torch.no_grad()
def spread_channels(model, spread: float, seed: int = 0) -> None:
    """Make the decoder's channels uneven without changing what it computes.

    Input channel i of q/k/v and of gate/up is divided by 2^n, n ~ round(N(0, spread)), and the norm gain before it
    multiplied; so are rows of up_proj against columns of down_proj, and rows of v_proj against columns of o_proj.
    Powers of two: no bfloat16 value is rounded, so the function is the same to the bit before activations round.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> torch.Tensor:
        return torch.exp2(torch.round(torch.randn(count, generator=generator) * spread))

    for layer in model.model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factor = draw(len(norm.weight))
            norm.weight.mul_(factor)
            for linear in readers:
                linear.weight.div_(factor)
        factor = draw(mlp.up_proj.out_features)
        mlp.up_proj.weight.mul_(factor[:, None])
        mlp.down_proj.weight.div_(factor)
        factor = draw(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(factor[:, None])
        attention.v_proj.bias.mul_(factor)
        # Each key-value head serves `groups` query heads in a row.
        groups = attention.o_proj.in_features // attention.v_proj.out_features
        shared = factor.view(-1, 1, attention.head_dim).expand(-1, groups, -1).flatten()
        attention.o_proj.weight.div_(shared)
