"""Tensor names and shapes on both sides: what a GGUF file must hold, and which hub tensor each of its tensors is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlmq_export.formats.gguf.params import TextParams, VisionParams, text_params, vision_params

Shapes = dict[str, tuple[int, ...]]  # GGUF name → shape in torch's order

_BLOCK = {  # GGUF → hub, inside a decoder layer
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_VISION_BLOCK = {
    "ln1": "norm1", "ln2": "norm2", "attn_q": "attn.qkv", "attn_k": "attn.qkv", "attn_v": "attn.qkv", "attn_out": "attn.proj"
}  # fmt: skip
_VISION_MLP = {True: {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"},
               False: {"ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}}  # fmt: skip


def text_shapes(p: TextParams) -> Shapes:
    """Every tensor of the text file, in file order."""
    shapes: Shapes = {"token_embd.weight": (p.vocabulary, p.hidden)}
    kv = p.kv_heads * p.head_dim
    for i in range(p.layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (p.hidden,),
            f"blk.{i}.attn_q.weight": (p.hidden, p.hidden), f"blk.{i}.attn_q.bias": (p.hidden,),
            f"blk.{i}.attn_k.weight": (kv, p.hidden), f"blk.{i}.attn_k.bias": (kv,),
            f"blk.{i}.attn_v.weight": (kv, p.hidden), f"blk.{i}.attn_v.bias": (kv,),
            f"blk.{i}.attn_output.weight": (p.hidden, p.hidden), f"blk.{i}.ffn_norm.weight": (p.hidden,),
            f"blk.{i}.ffn_gate.weight": (p.feed_forward, p.hidden), f"blk.{i}.ffn_up.weight": (p.feed_forward, p.hidden),
            f"blk.{i}.ffn_down.weight": (p.hidden, p.feed_forward),
        }  # fmt: skip
    shapes["output_norm.weight"] = (p.hidden,)
    return shapes if p.tied else shapes | {"output.weight": (p.vocabulary, p.hidden)}


def vision_shapes(p: VisionParams) -> Shapes:
    """Every tensor of the mmproj, in file order."""
    patch = (p.hidden, 3, p.patch, p.patch)
    shapes: Shapes = {"v.patch_embd.weight": patch, "v.patch_embd.weight.1": patch}
    wide, narrow = (p.feed_forward, p.hidden), (p.hidden, p.feed_forward)
    linears = {
        "attn_q": (p.hidden,) * 2,
        "attn_k": (p.hidden,) * 2,
        "attn_v": (p.hidden,) * 2,
        "attn_out": (p.hidden,) * 2,
    }
    linears |= {k: narrow if k == "ffn_down" else wide for k in _VISION_MLP[p.gated]}
    for i in range(p.layers):
        for norm in ("ln1", "ln2"):
            shapes |= {f"v.blk.{i}.{norm}.{part}": (p.hidden,) for part in _norm_parts(p)}
        for name, shape in linears.items():
            shapes |= {f"v.blk.{i}.{name}.weight": shape, f"v.blk.{i}.{name}.bias": shape[:1]}
    shapes |= {f"v.post_ln.{part}": (p.hidden,) for part in _norm_parts(p)}
    merged = 4 * p.hidden  # 2 × 2 patches
    shapes |= {"mm.0.weight": (merged, merged), "mm.0.bias": (merged,)}
    return shapes | {"mm.2.weight": (p.projection, merged), "mm.2.bias": (p.projection,)}


def _norm_parts(p: VisionParams) -> tuple[str, ...]:
    return ("weight",) if p.gated else ("weight", "bias")  # RMS norms have no bias


def text_to_hub(config: dict) -> dict[str, str]:
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

    def hub(name: str) -> str:
        stem, part = name.rsplit(".", 1)
        if stem in top:
            return f"{top[stem]}.{part}"
        _, layer, module = stem.split(".")
        return f"model.layers.{layer}.{_BLOCK[module]}.{part}"

    return {name: hub(name) for name in text_shapes(text_params(config))}


def vision_to_hub(config: dict) -> dict[str, str]:
    """The three parts of a fused qkv, and the two time slices of the patch convolution, name the same hub tensor."""
    p = vision_params(config)
    block = _VISION_BLOCK | _VISION_MLP[p.gated]
    top = {"v.post_ln": "visual.merger.ln_q", "mm.0": "visual.merger.mlp.0", "mm.2": "visual.merger.mlp.2"}

    def hub(name: str) -> str:
        if name.startswith("v.patch_embd."):
            return "visual.patch_embed.proj.weight"
        stem, part = name.rsplit(".", 1)
        if stem in top:
            return f"{top[stem]}.{part}"
        _, _, layer, module = stem.split(".")
        return f"visual.blocks.{layer}.{block[module]}.{part}"

    return {name: hub(name) for name in vision_shapes(p)}


def to_hub(config: dict) -> dict[str, str]:
    """GGUF tensor name → hub tensor name, over both files."""
    return text_to_hub(config) | vision_to_hub(config)


def from_hub(config: dict) -> dict[str, tuple[str, ...]]:
    """Hub tensor name → the GGUF tensors that hold it."""
    inverse: dict[str, tuple[str, ...]] = {}
    for name, hub in to_hub(config).items():
        inverse[hub] = (*inverse.get(hub, ()), name)
    return inverse


def halved(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of the mmproj is stored in float16 there: linears are; patches, norms and biases are not."""
    return len(shape) == 2 and name.endswith(".weight")


def expected_mmproj(weights, config: dict, dtype: str = "f16") -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, float32 array) of every tensor of the mmproj, from `reference.Weights`: what a reader must find.

    Names are derived here from the hub's side, not from the writer's table. Raises FormatError for a tower that an
    mmproj cannot express.
    """
    vision_params(config)

    def stored(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        linear = array.ndim == 2
        return name, array.astype(np.float16).astype(np.float32) if dtype == "f16" and linear else array

    for hub in weights.names():
        if not hub.startswith("visual."):
            continue
        array, part = weights.array(hub), hub.rsplit(".", 1)[1]
        if hub.startswith("visual.patch_embed."):  # [out, 3, 2, patch, patch]
            yield "v.patch_embd.weight", array[:, :, 0]
            yield "v.patch_embd.weight.1", array[:, :, 1]
        elif hub.startswith("visual.merger."):
            yield stored({"ln_q": "v.post_ln.", "0": "mm.0.", "2": "mm.2."}[hub.split(".")[-2]] + part, array)
        else:
            layer, module = int(hub.split(".")[2]), hub.split(".", 3)[3].rsplit(".", 1)[0]
            if module == "attn.qkv":
                for third, letter in zip(np.split(array, 3), "qkv"):
                    yield stored(f"v.blk.{layer}.attn_{letter}.{part}", third)
                continue
            short = {
                "norm1": "ln1",
                "norm2": "ln2",
                "attn.proj": "attn_out",
                "mlp.fc1": "ffn_up",
                "mlp.fc2": "ffn_down",
            }
            name = short.get(module) or module.replace("mlp.", "ffn_").removesuffix("_proj")
            yield stored(f"v.blk.{layer}.{name}.{part}", array)
