"""Small random checkpoints of every family in the hub's layout: the published config scaled down.

Files of two generations are written, which must load as the same model:

    hub       what was published: transformers 4's config keys (`rope_theta`, `rope_scaling`) and
              its tensor names (`language_model.model.layers.…`, `visual.…`)
    modules   what transformers 5 keeps in memory: `rope_parameters`, and
              `model.language_model.layers.…`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.reference_vlm import model as reference
from tools.reference_vlm.pieces import as_pieces
from tools.reference_vlm.tiny_configs import Slot
from tools.reference_vlm.tiny_families import FAMILIES, Tiny

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

# Tensors that the published files hold in float32.
_WIDE = (".A_log", "linear_attn.norm.weight")

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
        if _has_gain(name, names):
            value -= family.gain
        if ".experts." in name and generation == "hub":  # [experts, in, out], as published
            value = value.mT.contiguous()
        state[stored] = value.to(torch.float32 if name.endswith(_WIDE) else torch.bfloat16)
    for name in family.extra if generation == "hub" else ():
        state[f"{name}.weight"] = torch.zeros(2, 2, dtype=torch.bfloat16)
    save_file(state, out_dir / "model.safetensors", metadata={"format": "pt"})
    (out_dir / "model.safetensors").chmod(0o644)  # safetensors writes 600
    if generation == "modules":
        config.dtype = torch.bfloat16
        config.save_pretrained(out_dir)


def _has_gain(name: str, names: Mapping) -> bool:
    """Whether a parameter is that of a norm that multiplies by `Tiny.gain` + weight.

    A tower's norms have a bias beside the weight. The norm in a gated delta net has a plain weight.
    """
    bias = name.replace("weight", "bias")
    return "norm" in name and bias not in names and not name.endswith("linear_attn.norm.weight")


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
    if name.endswith("mlp.gate.weight"):  # a router that hardly ever hesitates, as a trained one
        return 0.2 * torch.randn(shape, generator=generator)
    if name.endswith(".A_log"):  # of the decay of a head: exp(−A·softplus(…))
        return torch.linspace(-2, 1, shape[0])
    if name.endswith("conv1d.weight"):  # most of a token itself, and some of those before it
        taps = 0.2 * torch.randn(shape, generator=generator)
        return taps + torch.eye(shape[-1])[-1]
    large = ("cls_token", "image_newline", "position_embedding", "pos_embed")
    if any(part in name for part in large):
        return 0.3 * torch.randn(shape, generator=generator)
    return reference.random_weight(name, shape, generator)


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
