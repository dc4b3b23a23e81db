"""Small random checkpoints of every family in the hub's layout: the published config scaled down.

Files of two generations are written, which must load as the same model:

    hub       what was published: transformers 4's config keys (`rope_theta`, `rope_scaling`) and
              its tensor names (`language_model.model.layers.…`, `visual.…`)
    modules   what transformers 5 keeps in memory: `rope_parameters`, and
              `model.language_model.layers.…`
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.reference_vlm import model as reference
from tools.reference_vlm.pieces import as_pieces

# Each is a multiple of 256, so that every K-quant of llama.cpp fits.
HIDDEN, MLP, VISION, VISION_MLP = 256, 512, 256, 512
# Like the published 384 = 27 · 14 + 6, this side is not a multiple of the patch: 104 = 7 · 14 + 6.
SIGLIP_IMAGE = 104
INTERNVL_IMAGE = 112
GEMMA_IMAGE = 112  # 8 · 8 patches, which are pooled to 16 tokens
SMOLVLM_IMAGE = 112  # 8 · 8 patches, of which 16 tokens are made
PIXTRAL_IMAGE = 224  # the longest side: 16 patches, of which 8 tokens are made


@dataclass(frozen=True)
class Slot:
    """A value of a config that is known when a checkpoint is made: see `published_config`."""

    name: str


@dataclass(frozen=True)
class Tiny:
    """What one family's checkpoint consists of besides its weights."""

    tokens: tuple[str, ...]  # special tokens that Qwen2-VL's vocabulary lacks
    template: str  # of the chat
    config: dict  # config.json with slots
    preprocessor: dict  # preprocessor_config.json
    processor: dict | None = None  # processor_config.json
    tokenizer: dict | None = None  # extra_special_tokens of tokenizer_config.json
    tokenizer_config: dict | None = None  # what it has other than that of Qwen2-VL
    pre_tokenizer: dict | None = None  # of tokenizer.json; None: that of Qwen2-VL
    joined: tuple[str, ...] = ()  # pairs of characters that the vocabulary has as one token
    pieces: bool = False  # whether the tokenizer is one of characters, in the form of Gemma's
    end: str = "<|im_end|>"  # of a turn
    begin: str = "<|endoftext|>"  # of a text
    pad: str = "<|endoftext|>"
    names: tuple[tuple[str, str], ...] = ()  # prefixes (module, hub) of tensors; the first counts


# --- chat templates -------------------------------------------------------------------------------

_TURNS = (
    "{%% for m in messages %%}%s{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)
_PARTS = (
    "<|im_start|>{{ m['role'] }}\n"
    "{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}"
    "{%% for c in m['content'] %%}{%% if c['type'] == 'image' %%}%s"
    "{%% elif c['type'] == 'text' %%}{{ c['text'] }}"
    "{%% endif %%}{%% endfor %%}{%% endif %%}<|im_end|>\n"
)
# As published: a space after the role, images first, a newline before each text, and none after
# <|im_end|>.
_LLAVA_TURN = (
    "{{ '<|im_start|>' + m['role'] + ' ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + c['text'] }}{% endfor %}<|im_end|>"
)
# As published: no line break after the role, and no space between it and an image.
_SMOLVLM_TURNS = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}"
    "{% if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% elif c['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

# As published: the system's words go before the first turn of the user, and an answer is `model`.
_GEMMA_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}{% endfor %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

# As published, but for the default system message, which is shorter: a user's image goes before
# the text, and nothing opens an answer.
_MISTRAL_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'][0]['text'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'You answer briefly.' %}{% set turns = messages %}{% endif %}"
    "{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}"
    "{% for m in turns %}{% if m['role'] == 'user' %}{{ '[INST]' }}"
    "{% set blocks = m['content'] | sort(attribute='type') if m['content'] | length == 2"
    " else m['content'] %}"
    "{% for c in blocks %}{% if c['type'] == 'image' %}{{ '[IMG]' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{{ '[/INST]' }}"
    "{% else %}{{ m['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"
)

# --- configs --------------------------------------------------------------------------------------
# The keys are those of the published files, and the values of their order of magnitude.

_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": Slot("<|endoftext|>"),
    "eos_token_id": Slot("<|im_end|>"),
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": Slot("layers"),
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": Slot("tied"),
    "use_cache": True,
    "vocab_size": Slot("vocabulary"),
}
_QWEN2 = {
    **_TEXT,
    "max_window_layers": Slot("layers"),
    "model_type": "qwen2",
    "use_sliding_window": False,
    "architectures": ["Qwen2ForCausalLM"],
    "rope_theta": 1000000.0,
}
_PINPOINTS = [[SIGLIP_IMAGE * i, SIGLIP_IMAGE * j] for i in range(1, 7) for j in range(1, 7)]

# The tower of LLaVA-OneVision and Gemma 3.
_SIGLIP = {
    "hidden_size": VISION,
    "intermediate_size": VISION_MLP,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 4,
    "num_hidden_layers": Slot("depth"),
    "patch_size": 14,
    "vision_use_head": False,
}
# llava-hf/llava-onevision-qwen2-0.5b-ov-hf
_LLAVA_ONEVISION = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "model_type": "llava_onevision",
    "tie_word_embeddings": Slot("tied"),
    "ignore_index": -100,
    "image_grid_pinpoints": _PINPOINTS,
    "image_token_index": Slot("<image>"),
    "projector_hidden_act": "gelu",
    "text_config": {**_QWEN2, "sliding_window": 32768, "torch_dtype": "bfloat16"},
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_image_newline_parameter": True,
    "video_token_index": Slot("<video>"),
    "vision_aspect_ratio": "anyres_max_9",
    "vision_config": {**_SIGLIP, "image_size": SIGLIP_IMAGE},
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}

# OpenGVLab/InternVL3-1B-hf. Its dynamic NTK does nothing within max_position_embeddings.
_INTERNVL = {
    "architectures": ["InternVLForConditionalGeneration"],
    "model_type": "internvl",
    "tie_word_embeddings": Slot("tied"),
    "downsample_ratio": 0.5,
    "image_seq_length": (INTERNVL_IMAGE // 28) ** 2,
    "image_token_id": Slot("<IMG_CONTEXT>"),
    "projector_hidden_act": "gelu",
    "text_config": {
        **_QWEN2,
        "sliding_window": None,
        "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
        "torch_dtype": "bfloat16",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.0.dev0",
    "vision_config": {
        "architectures": ["InternVisionModel"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": VISION,
        "image_size": [INTERNVL_IMAGE, INTERNVL_IMAGE],
        "initializer_range": 1e-10,
        "intermediate_size": VISION_MLP,
        "layer_norm_eps": 1e-06,
        "layer_scale_init_value": 0.1,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": Slot("depth"),
        "patch_size": [14, 14],
        "projection_dropout": 0.0,
        "torch_dtype": "bfloat16",
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}

# OpenGVLab/InternVL3_5-1B-HF: the same tower on Qwen3, whose heads together are wider than a token.
_INTERNVL3_5 = {
    **_INTERNVL,
    "text_config": {
        **_TEXT,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": Slot("layers"),
        "model_type": "qwen3",
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
    },
    "transformers_version": "4.55.0",
}

# google/gemma-3-4b-it, with what the files of 12B and 27B say of the decoder. Of each two layers
# one has a window here, of six in the published models; the window is shorter than a prompt.
_GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": Slot("<start_of_image>"),
    "eoi_token_index": Slot("<end_of_image>"),
    "eos_token_id": [Slot("<eos>"), Slot("<end_of_turn>")],
    "image_token_index": Slot("<image_soft_token>"),
    "initializer_range": 0.02,
    "mm_tokens_per_image": 16,
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": Slot("layers"),
        "num_key_value_heads": 2,
        "query_pre_attn_scalar": 128,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 24,
        "sliding_window_pattern": 2,
        "vocab_size": Slot("vocabulary"),
    },
    "tie_word_embeddings": Slot("tied"),
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {**_SIGLIP, "image_size": GEMMA_IMAGE},
}

# mistralai/Mistral-Small-3.1-24B-Instruct-2503. All heads together are not as wide as a token.
_MISTRAL3 = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": Slot("[IMG]"),
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 4,
        "num_hidden_layers": Slot("layers"),
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": Slot("vocabulary"),
    },
    "tie_word_embeddings": Slot("tied"),
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0,
        "head_dim": VISION // 4,
        "hidden_act": "silu",
        "hidden_size": VISION,
        "image_size": PIXTRAL_IMAGE,
        "initializer_range": 0.02,
        "intermediate_size": VISION_MLP,
        "model_type": "pixtral",
        "num_attention_heads": 4,
        "num_channels": 3,
        "num_hidden_layers": Slot("depth"),
        "patch_size": 14,
        "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
}

# mistralai/Ministral-3-3B-Instruct-2512-BF16. Queries grow with every 16th position, where it
# is every 16384th in the published models, so that a prompt gets there.
_MINISTRAL3 = {
    **{key: value for key, value in _MISTRAL3.items() if key != "torch_dtype"},
    "dtype": "bfloat16",
    "text_config": {
        **{key: value for key, value in _MISTRAL3["text_config"].items() if key != "rope_theta"},
        "max_position_embeddings": 256,
        "model_type": "ministral3",
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "tie_word_embeddings": Slot("tied"),
    },
    "transformers_version": "5.0.0.dev0",
    "vision_config": {
        **{key: value for key, value in _MISTRAL3["vision_config"].items() if key != "rope_theta"},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}

# Qwen/Qwen3-VL-2B-Instruct
_QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "tie_word_embeddings": Slot("tied"),
    "image_token_id": Slot("<|image_pad|>"),
    "text_config": {
        **_TEXT,
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": 64,
        "model_type": "qwen3_vl_text",
        "max_position_embeddings": 262144,
        "rope_theta": 5000000,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "default",
        },
    },
    "transformers_version": "4.57.0.dev0",
    "video_token_id": Slot("<|video_pad|>"),
    "vision_config": {
        "deepstack_visual_indexes": [0, Slot("last block")],
        "depth": Slot("depth"),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": VISION,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": VISION_MLP,
        "model_type": "qwen3_vl",
        "num_heads": 4,
        "num_position_embeddings": 144,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": Slot("<|vision_end|>"),
    "vision_start_token_id": Slot("<|vision_start|>"),
}


def _smolvlm(model_type: str, architecture: str) -> dict:
    """HuggingFaceTB/SmolVLM-256M-Instruct and SmolVLM2-500M-Video-Instruct.

    Both leave out most sizes of the vision tower, which are the defaults of its class.
    """
    left_out = ("attention_dropout", "hidden_act", "initializer_range")
    text = {k: v for k, v in _TEXT.items() if k not in (*left_out, "bos_token_id", "eos_token_id")}
    return {
        "architectures": [architecture],
        "image_token_id": Slot("<image>"),
        "model_type": model_type,
        "pad_token_id": 128002,
        "scale_factor": 2,
        "text_config": {
            **text,
            "architectures": ["VLlama3ForCausalLM"],
            "head_dim": 64,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "model_type": "llama",
            "neftune_noise_alpha": 0.0,
            "pad_token_id": Slot("<|im_end|>"),
            "pixel_shuffle_factor": 2,
            "qk_layer_norms": False,
            "rms_norm_eps": 1e-05,
            "rope_interleaved": False,
            "rope_theta": 100000,
            "torch_dtype": "bfloat16",
            "use_resampler": False,
        },
        "tie_word_embeddings": Slot("tied"),
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.1",
        "use_cache": False,
        "vision_config": {
            "hidden_size": VISION,
            "image_size": SMOLVLM_IMAGE,
            "intermediate_size": VISION_MLP,
            "max_image_size": {"longest_edge": SMOLVLM_IMAGE},
            "model_type": "smolvlm_vision" if model_type == "smolvlm" else model_type,
            "num_attention_heads": 4,
            "num_hidden_layers": Slot("depth"),
            "patch_size": 14,
            "size": {"longest_edge": 2 * SMOLVLM_IMAGE},
            "tie_word_embeddings": False,
            "use_base_siglip": False,
        },
        "vocab_size": Slot("vocabulary"),
    }


# --- families -------------------------------------------------------------------------------------

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_IMAGE_STEPS = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
}
_DECODER_NAMES = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
)

# SmolVLM's words: a place for each tile of a grid, and the tokens around an image.
_SMOLVLM_WORDS = (
    "<global-img>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
)
_DIGITS_APART = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def _smolvlm_tiny(config: dict, processor: str, *, splitting: bool) -> Tiny:
    """SmolVLM, or SmolVLM2. `processor` is the start of the names of its processors."""
    return Tiny(
        tokens=_SMOLVLM_WORDS,
        template=_SMOLVLM_TURNS,
        config=config,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_image_splitting": splitting,
            "do_pad": True,
            "image_processor_type": f"{processor}ImageProcessor",
            "max_image_size": {"longest_edge": SMOLVLM_IMAGE},
            "processor_class": f"{processor}Processor",
            "resample": 1,
            "size": {"longest_edge": 2 * SMOLVLM_IMAGE},
        },
        processor={
            "image_seq_len": (SMOLVLM_IMAGE // 28) ** 2,
            "processor_class": f"{processor}Processor",
        },
        tokenizer={
            "end_of_utterance_token": "<end_of_utterance>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "image_token": "<image>",
        },
        pre_tokenizer=_DIGITS_APART,
        joined=("ĊĊ",),
        end="<end_of_utterance>",
    )


FAMILIES = {
    "idefics3": _smolvlm_tiny(
        _smolvlm("idefics3", "Idefics3ForConditionalGeneration"), "Idefics3", splitting=True
    ),
    "smolvlm": _smolvlm_tiny(
        _smolvlm("smolvlm", "SmolVLMForConditionalGeneration"), "SmolVLM", splitting=False
    ),
    "llava_onevision": Tiny(
        tokens=("<image>", "<video>"),
        template=_TURNS % _LLAVA_TURN,
        config=_LLAVA_ONEVISION,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_pad": True,
            "image_grid_pinpoints": _PINPOINTS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": SIGLIP_IMAGE, "width": SIGLIP_IMAGE},
        },
        processor={
            "image_token": "<image>",
            "num_image_tokens": (SIGLIP_IMAGE // 14) ** 2,
            "video_token": "<video>",
            "processor_class": "LlavaOnevisionProcessor",
            "vision_feature_select_strategy": "full",
        },
        names=(
            # transformers 5.6 took the level `vision_model` out.
            ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            *_DECODER_NAMES,
        ),
    ),
    "internvl": Tiny(
        tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        template=_TURNS % (_PARTS % "<IMG_CONTEXT>\n"),
        config=_INTERNVL,
        preprocessor={
            **_IMAGE_STEPS,
            **IMAGENET,
            "crop_to_patches": False,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 12,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "size": {"height": INTERNVL_IMAGE, "width": INTERNVL_IMAGE},
        },
        processor={
            "image_seq_length": (INTERNVL_IMAGE // 28) ** 2,
            "processor_class": "InternVLProcessor",
        },
        tokenizer={
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        names=_DECODER_NAMES,
    ),
    "gemma3": Tiny(
        tokens=(
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<end_of_image>",
            "<image_soft_token>",
        ),
        template=_GEMMA_TURNS,
        config=_GEMMA3,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_convert_rgb": None,
            "do_pan_and_scan": None,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 16,
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "size": {"height": GEMMA_IMAGE, "width": GEMMA_IMAGE},
        },
        processor={"image_seq_length": 16, "processor_class": "Gemma3Processor"},
        tokenizer={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        pieces=True,
        end="<end_of_turn>",
        begin="<bos>",
        pad="<pad>",
        names=(("model.vision_tower.", "vision_tower.vision_model."), *_DECODER_NAMES),
    ),
    "mistral3": Tiny(
        tokens=(
            *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            *("[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
        ),
        template=_MISTRAL_TURNS,
        config=_MISTRAL3,
        preprocessor={
            **_IMAGE_STEPS,
            **CLIP,
            "default_to_square": True,
            "image_processor_type": "PixtralImageProcessorFast",
            "patch_size": 14,
            "processor_class": "PixtralProcessor",
            "size": {"longest_edge": PIXTRAL_IMAGE},
        },
        processor={
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": 14,
            "processor_class": "PixtralProcessor",
            "spatial_merge_size": 2,
        },
        tokenizer_config={
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "tokenizer_class": "LlamaTokenizerFast",
            "unk_token": "<unk>",
        },
        end="</s>",
        begin="<s>",
        pad="<pad>",
        names=_DECODER_NAMES,
    ),
    "qwen3_vl": Tiny(
        tokens=(),
        template=_TURNS % (_PARTS % "<|vision_start|><|image_pad|><|vision_end|>"),
        config=_QWEN3_VL,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "merge_size": 2,
            "patch_size": 16,
            "processor_class": "Qwen3VLProcessor",
            "size": {"longest_edge": 65536, "shortest_edge": 8192},
            "temporal_patch_size": 2,
        },
    ),
}

FAMILIES["internvl3_5"] = replace(FAMILIES["internvl"], config=_INTERNVL3_5)
FAMILIES["ministral3"] = replace(FAMILIES["mistral3"], config=_MINISTRAL3)
ARCHES = ("qwen2_vl", "qwen2_5_vl", *FAMILIES)  # all that make_tiny makes
PIXTRAL = ("mistral3", "ministral3")  # those with a tower that neither ONNX nor GGUF has

# --- published sizes ------------------------------------------------------------------------------


def _smolvlm_sizes(hidden: int, mlp: int, heads: int) -> dict:
    """What `shape` of make_tiny is for a SmolVLM of these widths. Its layers are 64 columns a head.

    The tower is that of both sizes: SigLIP of 12 blocks, and 64 tokens for a tile of 512 pixels.
    """
    return {
        "scale_factor": 4,
        "text_config": {
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 3,
            "pixel_shuffle_factor": 4,
            "vocab_size": 49280,
        },
        "vision_config": {
            "hidden_size": 768,
            "image_size": 512,
            "intermediate_size": 3072,
            "max_image_size": {"longest_edge": 512},
            "num_attention_heads": 12,
            "patch_size": 16,
            "size": {"longest_edge": 2048},
        },
        "vocab_size": 49280,
    }


SMOLVLM_256M = _smolvlm_sizes(576, 1536, 9)  # 30 layers
SMOLVLM_500M = _smolvlm_sizes(960, 2560, 15)  # 32 layers

# --- writing --------------------------------------------------------------------------------------


def make_tiny(
    out_dir: Path | str,
    arch: str,
    seed: int = 0,
    *,
    layers: int = 2,  # of the decoder
    depth: int = 3,  # vision blocks
    tied: bool = False,  # whether the output matrix is the embedding
    generation: str = "hub",  # hub | modules, as the module's text says
    shape: dict | None = None,  # other values of config.json, such as SMOLVLM_256M
) -> Path:
    """Write a random checkpoint of a family. The same arguments give the same bytes.

    Qwen2-VL and Qwen2.5-VL have the hub's generation only, whatever is asked for.
    """
    out_dir = Path(out_dir)
    if arch not in FAMILIES:
        assert shape is None, f"{arch} has one shape"
        return reference.make_random_checkpoint(
            out_dir, arch, seed, layers=layers, depth=depth, tied=tied
        )
    family = FAMILIES[arch]
    out_dir.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(family, out_dir)
    config = published_config(arch, ids, layers=layers, depth=depth, tied=tied)
    for key, value in (shape or {}).items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    _write(out_dir / "config.json", config)
    _write_weights(family, out_dir, seed, generation)
    images = {k: v for k, v in config["vision_config"].items() if k in family.preprocessor}
    _write(out_dir / "preprocessor_config.json", family.preprocessor | images)
    if family.processor:
        _write(out_dir / "processor_config.json", family.processor)
    generating = {
        "bos_token_id": ids[family.begin],
        "do_sample": False,
        "eos_token_id": ids[family.end],
        "pad_token_id": ids[family.pad],
    }
    _write(out_dir / "generation_config.json", generating)
    return out_dir


def published_config(
    arch: str, ids: dict[str, int], *, layers: int, depth: int, tied: bool
) -> dict:
    """config.json of a family. A slot is a special token, which becomes its id, or one of these."""
    given = ids | {
        "layers": layers,
        "depth": depth,
        "last block": depth - 1,
        "tied": tied,
        "vocabulary": -(-(max(ids.values()) + 1) // 64) * 64,
    }

    def filled(value: Any) -> Any:
        if isinstance(value, Slot):
            return given[value.name]
        if isinstance(value, dict):
            return {key: filled(part) for key, part in value.items()}
        return [filled(part) for part in value] if isinstance(value, list) else value

    return filled(FAMILIES[arch].config)


def _write_weights(family: Tiny, out_dir: Path, seed: int, generation: str) -> None:
    """Write model.safetensors for the config in `out_dir`.

    The generation `modules` also has transformers write its own config in place of that one.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(out_dir)
    model = getattr(transformers, config.architectures[0])(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    names = dict(model.named_parameters())
    for name, weight in sorted(names.items()):
        stored = name if generation == "modules" else _renamed(name, family.names)
        value = _random_weight(name, weight.shape, generator)
        # Gemma's norms multiply by 1 + weight. SigLIP's norms have a bias beside the weight.
        if family.pieces and "norm" in name and name.replace("weight", "bias") not in names:
            value -= 1
        state[stored] = value.to(torch.bfloat16)
    save_file(state, out_dir / "model.safetensors", metadata={"format": "pt"})
    (out_dir / "model.safetensors").chmod(0o644)  # safetensors writes 600
    if generation == "modules":
        config.dtype = torch.bfloat16
        config.save_pretrained(out_dir)


def _write_tokenizer(family: Tiny, out_dir: Path) -> dict[str, int]:
    """Write the bundled tokenizer with the family's tokens after its own, and the template.

    Returns the ids of all special tokens.
    """
    reference.copy_tokenizer(reference.BUNDLED, out_dir)
    tokenizer = json.loads((out_dir / "tokenizer.json").read_text("utf-8"))
    if family.pieces:
        return _write_pieces(family, out_dir, as_pieces(tokenizer, family.tokens))
    added = tokenizer["added_tokens"]
    vocabulary = tokenizer["model"]["vocab"]
    for pair in family.joined:
        vocabulary[pair] = len(vocabulary)
        tokenizer["model"]["merges"].append(list(pair))
    tokenizer["pre_tokenizer"] = family.pre_tokenizer or tokenizer["pre_tokenizer"]
    for token in family.tokens:
        added.append({**added[-1], "content": token})
    for number, token in enumerate(added, start=len(vocabulary)):
        token["id"] = number
    config = json.loads((out_dir / "tokenizer_config.json").read_text("utf-8"))
    config["additional_special_tokens"] += family.tokens
    config["model_max_length"] = 32768
    config["extra_special_tokens"] = family.tokenizer or {}
    if family.pre_tokenizer:  # the class of Qwen2-VL's tokenizer brings its own
        config["tokenizer_class"] = "GPT2Tokenizer"
    config |= family.tokenizer_config or {}
    return _write_tokenizer_files(family, out_dir, tokenizer, config)


def _write_pieces(family: Tiny, out_dir: Path, tokenizer: dict) -> dict[str, int]:
    """Write a tokenizer in the form of Gemma's, with the config of the published one."""
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")},
        **(family.tokenizer or {}),
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": family.tokenizer or {},
        "model_max_length": 1000000000000000019884624838656,
        "processor_class": "Gemma3Processor",
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
    }
    return _write_tokenizer_files(family, out_dir, tokenizer, config)


def _write_tokenizer_files(
    family: Tiny, out_dir: Path, tokenizer: dict, config: dict
) -> dict[str, int]:
    """Write tokenizer, config and template. Returns the ids of all added tokens."""
    (out_dir / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    _write(out_dir / "tokenizer_config.json", config)
    (out_dir / "chat_template.jinja").write_text(family.template, "utf-8")
    _write(out_dir / "chat_template.json", {"chat_template": family.template})
    return {t["content"]: t["id"] for t in tokenizer["added_tokens"]}


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    """A tensor's hub name, from the name of its parameter."""
    for module, hub in names:
        if name.startswith(module):
            return hub + name.removeprefix(module)
    return name


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Random values for one tensor, as in model.py, and for what Qwen2-VL has not.

    A runtime that drops or swaps a bias, norm, scale, token or position gives other logits.
    """
    if ".lambda_" in name:  # InternVL's layer scale
        return 0.5 + 0.1 * torch.randn(shape, generator=generator)
    large = ("cls_token", "image_newline", "position_embedding", "pos_embed")
    if any(part in name for part in large):
        return 0.3 * torch.randn(shape, generator=generator)
    return reference.random_weight(name, shape, generator)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
