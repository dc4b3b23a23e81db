"""Small random checkpoints of every family in the hub's layout: the published config.json scaled down.

Two generations of files are written. `hub` is what was published: transformers 4's config keys (`rope_theta`,
`rope_scaling`) and its tensor names (`language_model.model.layers.…`, `visual.…`). `modules` is what transformers 5
keeps in memory: `rope_parameters` and `model.language_model.layers.…`. Both must load, and be the same model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tools.reference_vlm import model as reference

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
HIDDEN, MLP, VISION, VISION_MLP = 256, 512, 256, 512  # each a multiple of 256: every k-quant of llama.cpp fits
SIGLIP_IMAGE = 104  # as 384 = 27·14 + 6 is not a multiple of the patch, nor is 104 = 7·14 + 6
INTERNVL_IMAGE = 112


@dataclass(frozen=True)
class Tiny:
    """What makes one family's checkpoint besides its config: tokens, template, processors, names of the tensors."""

    architecture: str
    tokens: tuple[str, ...]  # special tokens that Qwen2-VL's vocabulary lacks
    template: str
    preprocessor: dict
    processor: dict | None = None  # processor_config.json
    tokenizer: dict | None = None  # more keys of tokenizer_config.json
    names: tuple[tuple[str, str], ...] = ()  # (module, hub), first match wins


_TURNS = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
_PARTS = (
    "<|im_start|>{{ m['role'] }}\n{%% if m['content'] is string %%}{{ m['content'] }}{%% else %%}"
    "{%% for c in m['content'] %%}{%% if c['type'] == 'image' %%}%s{%% elif c['type'] == 'text' %%}{{ c['text'] }}"
    "{%% endif %%}{%% endfor %%}{%% endif %%}<|im_end|>\n"
)
# Published with a space after the role and the newline before each text, images first, no newline after <|im_end|>.
_LLAVA_TURN = (
    "{{ '<|im_start|>' + m['role'] + ' ' }}{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ '\n' + c['text'] }}{% endfor %}<|im_end|>"
)
_TOWER = (
    ("lm_head.", "language_model.lm_head."),
    ("model.language_model.", "language_model.model."),
    ("model.", ""),
)
_IMAGE_STEPS = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
    "rescale_factor": 0.00392156862745098,
}  # fmt: skip

FAMILIES = {
    "llava_onevision": Tiny(
        "LlavaOnevisionForConditionalGeneration",
        tokens=("<image>", "<video>"),
        template=_TURNS % _LLAVA_TURN,
        preprocessor={
            **_IMAGE_STEPS,
            **HALF,
            "do_pad": True,
            "image_grid_pinpoints": [[SIGLIP_IMAGE * i, SIGLIP_IMAGE * j] for i in range(1, 7) for j in range(1, 7)],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": {"height": SIGLIP_IMAGE, "width": SIGLIP_IMAGE},
        },
        processor={
            "image_token": "<image>", "num_image_tokens": (SIGLIP_IMAGE // 14) ** 2, "video_token": "<video>",
            "processor_class": "LlavaOnevisionProcessor", "vision_feature_select_strategy": "full",
        },
        names=(("model.vision_tower.", "vision_tower.vision_model."), *_TOWER),
    ),
    "internvl": Tiny(
        "InternVLForConditionalGeneration",
        tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        template=_TURNS % (_PARTS % "<IMG_CONTEXT>\n"),
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
        processor={"image_seq_length": (INTERNVL_IMAGE // 28) ** 2, "processor_class": "InternVLProcessor"},
        tokenizer={
            "context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>",
            "video_token": "<video>",
        },
        names=_TOWER,
    ),
    "qwen3_vl": Tiny(
        "Qwen3VLForConditionalGeneration",
        tokens=(),
        template=_TURNS % (_PARTS % "<|vision_start|><|image_pad|><|vision_end|>"),
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
}  # fmt: skip


def make_tiny(
    out_dir: Path | str, arch: str, seed: int = 0, *, layers: int = 2, depth: int = 3, tied: bool = False,
    generation: str = "hub",
) -> Path:  # fmt: skip
    """Write a random checkpoint of `arch` with `layers` decoder layers and `depth` vision blocks; same arguments, same
    bytes. `generation`: `hub` or `modules` (see the module's text); Qwen2-VL and Qwen2.5-VL have the hub's only.
    """
    import transformers

    out_dir = Path(out_dir)
    if arch not in FAMILIES:
        return reference.make_random_checkpoint(out_dir, arch, seed, layers=layers, depth=depth, tied=tied)
    family = FAMILIES[arch]
    out_dir.mkdir(parents=True, exist_ok=True)
    ids = _write_tokenizer(family, out_dir)
    published = published_config(arch, ids, layers=layers, depth=depth, tied=tied)
    _write(out_dir / "config.json", published)
    config = transformers.AutoConfig.from_pretrained(out_dir)
    model = getattr(transformers, family.architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, weight in sorted(model.named_parameters()):
        hub = name if generation == "modules" else _renamed(name, family.names)
        state[hub] = _random_weight(name, weight.shape, generator).to(torch.bfloat16)
    save_file(state, out_dir / "model.safetensors", metadata={"format": "pt"})
    (out_dir / "model.safetensors").chmod(0o644)  # safetensors writes 600
    if generation == "modules":
        config.dtype = torch.bfloat16
        config.save_pretrained(out_dir)
    _write(out_dir / "preprocessor_config.json", family.preprocessor)
    if family.processor:
        _write(out_dir / "processor_config.json", family.processor)
    _write(
        out_dir / "generation_config.json",
        {"bos_token_id": ids["<|endoftext|>"], "do_sample": False, "eos_token_id": ids["<|im_end|>"],
         "pad_token_id": ids["<|endoftext|>"]},
    )  # fmt: skip
    return out_dir


def published_config(arch: str, ids: dict[str, int], *, layers: int, depth: int, tied: bool) -> dict:
    """config.json with the keys, and the order of magnitude of the values, of the published one."""
    text = {
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": MLP,
        "max_position_embeddings": 32768,
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": -(-(max(ids.values()) + 1) // 64) * 64,
    }
    qwen2 = {**text, "max_window_layers": layers, "model_type": "qwen2", "use_sliding_window": False}
    shared = {"architectures": [FAMILIES[arch].architecture], "model_type": arch, "tie_word_embeddings": tied}
    if arch == "llava_onevision":  # llava-hf/llava-onevision-qwen2-0.5b-ov-hf
        return {
            **shared,
            "ignore_index": -100,
            "image_grid_pinpoints": FAMILIES[arch].preprocessor["image_grid_pinpoints"],
            "image_token_index": ids["<image>"],
            "projector_hidden_act": "gelu",
            "text_config": {
                **qwen2, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0, "sliding_window": 32768,
                "torch_dtype": "bfloat16",
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.45.0.dev0",
            "use_image_newline_parameter": True,
            "video_token_index": ids["<video>"],
            "vision_aspect_ratio": "anyres_max_9",
            "vision_config": {
                "hidden_size": VISION, "image_size": SIGLIP_IMAGE, "intermediate_size": VISION_MLP,
                "model_type": "siglip_vision_model", "num_attention_heads": 4, "num_hidden_layers": depth,
                "patch_size": 14, "vision_use_head": False,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        }  # fmt: skip
    if arch == "internvl":  # OpenGVLab/InternVL3-1B-hf: dynamic NTK, which does nothing within max_position_embeddings
        return {
            **shared,
            "downsample_ratio": 0.5,
            "image_seq_length": (INTERNVL_IMAGE // 28) ** 2,
            "image_token_id": ids["<IMG_CONTEXT>"],
            "projector_hidden_act": "gelu",
            "text_config": {
                **qwen2, "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1000000.0, "sliding_window": None,
                "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}, "torch_dtype": "bfloat16",
            },
            "torch_dtype": "bfloat16",
            "transformers_version": "4.52.0.dev0",
            "vision_config": {
                "architectures": ["InternVisionModel"], "attention_bias": True, "attention_dropout": 0.0,
                "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "hidden_size": VISION,
                "image_size": [INTERNVL_IMAGE, INTERNVL_IMAGE], "initializer_range": 1e-10,
                "intermediate_size": VISION_MLP, "layer_norm_eps": 1e-06, "layer_scale_init_value": 0.1,
                "model_type": "internvl_vision", "norm_type": "layer_norm", "num_attention_heads": 4,
                "num_channels": 3, "num_hidden_layers": depth, "patch_size": [14, 14], "projection_dropout": 0.0,
                "torch_dtype": "bfloat16", "use_absolute_position_embeddings": True, "use_mask_token": False,
                "use_mean_pooling": True, "use_qk_norm": False,
            },
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        }  # fmt: skip
    return {  # Qwen/Qwen3-VL-2B-Instruct
        **shared,
        "image_token_id": ids["<|image_pad|>"],
        "text_config": {
            **text, "attention_bias": False, "dtype": "bfloat16", "head_dim": 64, "model_type": "qwen3_vl_text",
            "max_position_embeddings": 262144, "rope_theta": 5000000,
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"},
        },
        "transformers_version": "4.57.0.dev0",
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": {
            "deepstack_visual_indexes": [0, depth - 1], "depth": depth, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": VISION, "in_channels": 3, "initializer_range": 0.02, "intermediate_size": VISION_MLP,
            "model_type": "qwen3_vl", "num_heads": 4, "num_position_embeddings": 144, "out_hidden_size": HIDDEN,
            "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
    }  # fmt: skip


def _write_tokenizer(family: Tiny, out_dir: Path) -> dict[str, int]:
    """The bundled tokenizer with the family's tokens after its own, and the family's template. Ids of all specials."""
    reference.copy_tokenizer(reference.BUNDLED, out_dir)
    tokenizer = json.loads((out_dir / "tokenizer.json").read_text("utf-8"))
    added = tokenizer["added_tokens"]
    for token in family.tokens:
        added.append({**added[-1], "id": added[-1]["id"] + 1, "content": token})
    (out_dir / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    config = json.loads((out_dir / "tokenizer_config.json").read_text("utf-8"))
    config["additional_special_tokens"] += family.tokens
    config["model_max_length"] = 32768
    _write(out_dir / "tokenizer_config.json", config | {"extra_special_tokens": family.tokenizer or {}})
    (out_dir / "chat_template.jinja").write_text(family.template, "utf-8")
    _write(out_dir / "chat_template.json", {"chat_template": family.template})
    return {t["content"]: t["id"] for t in added}


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for module, hub in names:
        if name.startswith(module):
            return hub + name.removeprefix(module)
    return name


def _random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """As model.py's: a runtime that drops or swaps a bias, norm, scale, token or position gives other logits."""
    if ".lambda_" in name:  # InternVL's layer scale
        return 0.5 + 0.1 * torch.randn(shape, generator=generator)
    if any(part in name for part in ("cls_token", "image_newline", "position_embedding", "pos_embed")):
        return 0.3 * torch.randn(shape, generator=generator)
    return reference._random_weight(name, shape, generator)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
