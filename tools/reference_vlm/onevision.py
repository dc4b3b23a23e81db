"""The second reference VLM, LLaVA-OneVision: its config, files, inputs, and how training starts.

A SigLIP tower (5 blocks, 192 wide, learned positions), an MLP projector and a Qwen2 decoder
(8 layers, 256 wide, one position axis). Every image is one tile of 112 × 112 pixels, whatever its
shape, as vlmq_export gives this family its images: 64 vision tokens and the newline.

The decoder starts as the first reference's, with two layers inserted that do nothing yet. The
tower's first 128 channels start as the first reference's residual stream. The other 64 hold the
positions, which the first reference's tower has as rotations.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tools.reference_vlm import model as first

FOLDER = Path(__file__).parent / "llava_onevision"  # the trained checkpoint
SIDE, PATCH = 112, 14  # pixels
IMAGE_TOKENS = 65  # 8 · 8 patches and the newline
RENAMED_TOKENS = {"<|image_pad|>": "<image>", "<|video_pad|>": "<video>"}
FIRST_WIDTH = 128  # width of the first reference's vision tower
# The first reference's decoder layer that each layer starts as. Negative: a copy that adds nothing
# to the residual stream yet.
DECODER_FROM = (0, 1, 2, -2, 3, 4, -4, 5)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + c['text'] }}"
    "{% endfor %}"
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


# --- config and files -----------------------------------------------------------------------------


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
    """Write the first reference's tokenizer for LLaVA-OneVision.

    The image and video tokens have other names, and the chat template is the published one.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (first.BUNDLED / name).read_text("utf-8")
        for old, new in RENAMED_TOKENS.items():
            text = text.replace(f'"{old}"', f'"{new}"')
        (out_dir / name).write_text(text, "utf-8")
    (out_dir / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
    _write_json(out_dir / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def save_model(model, out_dir: Path) -> None:
    """Write `model` in bfloat16 as a folder in the hub's layout.

    Every file appears whole or not at all.
    """
    temporary = first.incoming(out_dir)
    half = first.bfloat16_copy(model)
    text = model.config.text_config
    half.generation_config.update(
        do_sample=False,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.bos_token_id,
    )
    half.save_pretrained(temporary)
    weights = load_file(temporary / "model.safetensors")
    module, hub = "vision_tower.", "vision_tower.vision_model."
    published = {name.replace(module, hub): weight for name, weight in weights.items()}
    save_file(published, temporary / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(temporary)
    _write_json(temporary / "preprocessor_config.json", PREPROCESSOR)
    _write_json(temporary / "processor_config.json", PROCESSOR)
    first.publish(temporary, out_dir)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# --- inputs ---------------------------------------------------------------------------------------


def tile(image: Image.Image) -> np.ndarray:
    """The whole image squeezed into one tile: float32 [3, 112, 112], from -1 to 1.

    This is the base tile of transformers' LlavaOnevisionImageProcessor.
    """
    squeezed = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return (np.asarray(squeezed, np.float32) / 127.5 - 1).transpose(2, 0, 1)


def prompt(question: str, image_tokens: int = 1, *, finished: bool = False) -> str:
    """The chat prompt as published for LLaVA-OneVision on Qwen2.

    It has a space after the role and no newline between turns. The template opens an answer that is
    to come with a newline, and a `finished` one with a space and a newline.
    """
    asked = f"<|im_start|>user {'<image>' * image_tokens}\n{question}<|im_end|>"
    return f"{asked}<|im_start|>assistant{' ' if finished else ''}\n"


def make_batch(
    tokenizer, rows: list[tuple[Image.Image, str, str | None]]
) -> dict[str, torch.Tensor]:
    """The model's inputs for rows of (image, question, answer); an answer of None ends the prompt.

    Returns the tensors of `first.padded`, pixel_values [B, 3, 112, 112], image_sizes [B, 2] and
    batch_num_images [1]. The batch is given as one sample of several images, because transformers
    then takes an image as one tile. Every fourth answer stands as in a finished turn, so that
    training sees both ways of writing it.
    """
    prompts, answers = [], []
    for place, (_, question, answer) in enumerate(rows):
        finished = answer is not None and place % 4 == 3
        prompts.append(prompt(question, IMAGE_TOKENS, finished=finished))
        answers.append("" if answer is None else f"{answer}<|im_end|>")
    return first.padded(tokenizer, prompts, answers) | {
        "pixel_values": torch.from_numpy(np.stack([tile(image) for image, _, _ in rows])),
        "image_sizes": torch.tensor([[image.height, image.width] for image, _, _ in rows]),
        "batch_num_images": torch.tensor([max(2, len(rows))]),
    }


# --- where training starts ------------------------------------------------------------------------


@torch.no_grad()
def start_from(model, teacher) -> None:
    """Start `model` from the first reference VLM.

    The decoder is taken whole, and the tower as far as SigLIP's blocks can hold it.
    """
    _start_decoder(model.model.language_model, teacher.model.language_model)
    _start_tower(model.model.vision_tower, teacher.model.visual)


def _start_decoder(decoder, source) -> None:
    """Copy the decoder, with layers inserted as DECODER_FROM says.

    The inserted layers' output projections are zero, so that the decoder computes what the first
    reference's does.
    """
    decoder.embed_tokens.load_state_dict(source.embed_tokens.state_dict())
    decoder.norm.load_state_dict(source.norm.state_dict())
    for layer, place in zip(decoder.layers, DECODER_FROM):
        layer.load_state_dict(source.layers[abs(place)].state_dict())
        if place < 0:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def _start_tower(tower, source) -> None:
    """Copy the patch embedding exactly, and of the blocks what SigLIP's can hold.

    Attention is copied without its rotations. The MLPs, which are not gated here, start small.
    """
    _start_embeddings(tower.embeddings, source)
    # LayerNorm divides by the spread over all channels, RMSNorm by that over the first alone.
    share = (FIRST_WIDTH / tower.embeddings.embed_dim) ** 0.5
    for block, origin in zip(tower.encoder.layers, source.blocks):
        block.layer_norm1.weight[:FIRST_WIDTH] = origin.norm1.weight * share
        block.layer_norm2.weight[:FIRST_WIDTH] = origin.norm2.weight * share
        _start_attention(block.self_attn, origin.attn)
        block.mlp.fc2.weight.mul_(0.3)


def _start_embeddings(embeddings, source) -> None:
    """The first reference's patches in the first channels, and random positions in the others.

    SigLIP's pixels are p' = 2·p − 1 and the first reference's are (p − mean) / std, so that its
    kernel K gives K / (2·std) here, and the bias Σ K·(0.5 − mean) / std.
    """
    normalised = (first.IMAGE_MEAN, first.IMAGE_STD)
    mean, std = (torch.from_numpy(values).float().view(3, 1, 1) for values in normalised)
    # Both frames are the same image, so that their kernels add up to one, [128, 3, 14, 14].
    kernel = source.patch_embed.proj.weight.sum(2)
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


def _start_attention(attention, source) -> None:
    """The first reference's matrices in the first channels; those of the others start small."""
    parts = zip(source.qkv.weight.chunk(3), source.qkv.bias.chunk(3))
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    for linear, (weight, bias) in zip(linears, parts):
        linear.weight[:FIRST_WIDTH, FIRST_WIDTH:] *= 0.3
        linear.weight[FIRST_WIDTH:] *= 0.5
        linear.weight[:FIRST_WIDTH, :FIRST_WIDTH] = weight
        linear.bias[:FIRST_WIDTH] = bias
    attention.out_proj.weight[:, FIRST_WIDTH:] *= 0.3
    attention.out_proj.weight[FIRST_WIDTH:] *= 0.3
    attention.out_proj.weight[:FIRST_WIDTH, :FIRST_WIDTH] = source.proj.weight
    attention.out_proj.bias[:FIRST_WIDTH] = source.proj.bias


# --- uneven channels ------------------------------------------------------------------------------


@torch.no_grad()
def spread_channels(model, spread: float, seed: int = 0) -> None:
    """Make the decoder's channels uneven without changing what it computes.

    Three pairs are scaled against each other by 2^n, with n ~ round(N(0, spread)) per channel: the
    gain of a norm and the input columns of q/k/v or gate/up behind it, the rows of up_proj and the
    columns of down_proj, and the rows of v_proj and the columns of o_proj. A power of two rounds no
    bfloat16 value, so that only the activations' own rounding can tell the two models apart.
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
        # Each key-value head serves `groups` consecutive query heads.
        groups = attention.o_proj.in_features // attention.v_proj.out_features
        shared = factor.view(-1, 1, attention.head_dim).expand(-1, groups, -1).flatten()
        attention.o_proj.weight.div_(shared)
