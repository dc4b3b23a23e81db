"""config.json of every family as published, scaled down, for small random checkpoints.

A `Slot` stands for a value that is known when a checkpoint is made (tiny_checkpoints.py).
"""

from __future__ import annotations

from dataclasses import dataclass

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
PINPOINTS = [[SIGLIP_IMAGE * i, SIGLIP_IMAGE * j] for i in range(1, 7) for j in range(1, 7)]

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
LLAVA_ONEVISION = {
    "architectures": ["LlavaOnevisionForConditionalGeneration"],
    "model_type": "llava_onevision",
    "tie_word_embeddings": Slot("tied"),
    "ignore_index": -100,
    "image_grid_pinpoints": PINPOINTS,
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
INTERNVL = {
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
INTERNVL3_5 = {
    **INTERNVL,
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
GEMMA3 = {
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
MISTRAL3 = {
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
MINISTRAL3 = {
    **{key: value for key, value in MISTRAL3.items() if key != "torch_dtype"},
    "dtype": "bfloat16",
    "text_config": {
        **{key: value for key, value in MISTRAL3["text_config"].items() if key != "rope_theta"},
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
        **{key: value for key, value in MISTRAL3["vision_config"].items() if key != "rope_theta"},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}

# Qwen/Qwen3-VL-2B-Instruct
QWEN3_VL = {
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

# Qwen/Qwen3-VL-30B-A3B-Instruct. An expert's MLP is as wide as the dense one of other families, so
# that the file's [experts, hidden, 2·inner] is no shape that transformers has.
QWEN3_VL_MOE = {
    **QWEN3_VL,
    "architectures": ["Qwen3VLMoeForConditionalGeneration"],
    "model_type": "qwen3_vl_moe",
    "text_config": {
        **QWEN3_VL["text_config"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "model_type": "qwen3_vl_moe_text",
        "moe_intermediate_size": MLP,
        "norm_topk_prob": True,
        "num_experts": 6,
        "num_experts_per_tok": 2,
    },
    "vision_config": {**QWEN3_VL["vision_config"], "model_type": "qwen3_vl_moe"},
}

# Qwen/Qwen3.5-4B, whose values have twice as many heads as its keys in a gated delta net. Every
# second layer attends here, of four in the published models.
QWEN3_5 = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": Slot("<|image_pad|>"),
    "model_type": "qwen3_5",
    "text_config": {
        **{key: value for key, value in _TEXT.items() if key != "bos_token_id"},
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "full_attention_interval": 2,
        "head_dim": 256,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    "tie_word_embeddings": Slot("tied"),
    "transformers_version": "4.57.0.dev0",
    "video_token_id": Slot("<|video_pad|>"),
    "vision_config": {**QWEN3_VL["vision_config"], "deepstack_visual_indexes": []}
    | {"model_type": "qwen3_5"},
    "vision_end_token_id": Slot("<|vision_end|>"),
    "vision_start_token_id": Slot("<|vision_start|>"),
}


def smolvlm_config(model_type: str, architecture: str) -> dict:
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
