"""What a GPTQ folder holds: its tensors in order, its quantization_config, and what would be refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vlmq_export import __version__
from vlmq_export.errors import FormatError
from vlmq_export.formats.base import FormatOptions, FormatPlan, LinearSpec, ModelPlan, TensorSpec
from vlmq_export.quantizer.checkpoint import TensorInfo
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import family_of

BITS = (2, 3, 4, 8)  # 5 to 7 exist only in GPTQModel's own planar layout, which nothing else reads
GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # GPTQModel's list
VERSIONS = {"v1": "gptq", "v2": "gptq_v2"}  # our name → `checkpoint_format`
PACKED = ("qweight", "qzeros", "scales", "g_idx")
MARLIN_GROUPS = (-1, 32, 64, 128)  # vLLM's gptq_marlin
FUSED_CPU_GROUPS = (32, 64, 128, 256)  # the 4-bit kernel that GPTQModel picks on CPU
# GPTQModel takes asymmetric v1 only from a quantizer that lists itself with at least version 0.9: a tag of the format.
FORMAT_TAG = "gptqmodel:7.7.0"
GPTQMODEL_LOADS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")  # of our families, those in its MODEL_MAP


@dataclass(frozen=True)
class Entry:
    """One tensor of the folder. `part` is empty for a float tensor, which `source` then names as the hub does."""

    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling
    source: str  # hub name: of the module for a part of a quantized linear, of the tensor for a float one
    part: str = ""  # qweight | qzeros | scales | g_idx | bias

    @property
    def nbytes(self) -> int:
        return TensorInfo(self.name, self.shape, self.dtype, "").nbytes


def entries(
    linears: Iterable[LinearSpec], floats: Iterable[TensorSpec], config: QuantConfig, rename
) -> Iterator[Entry]:
    """Every tensor in file order: linears first, whose sizes keep each tensor aligned, then floats by item size."""
    for linear in linears:
        n, k = linear.out_features, linear.in_features
        groups = config.groups(k)
        shapes = {
            "qweight": ((k * config.bits // 32, n), "I32"),
            "qzeros": ((groups, n * config.bits // 32), "I32"),
            "scales": ((groups, n), "F16"),
            "g_idx": ((k,), "I32"),
        }
        if linear.bias:
            shapes["bias"] = ((n,), "F16")
        for part, (shape, dtype) in shapes.items():
            yield Entry(rename(f"{linear.name}.{part}"), shape, dtype, linear.name, part)
    plain = [Entry(rename(t.name), t.shape, t.dtype, t.name) for t in floats]
    yield from sorted(plain, key=lambda e: -TensorInfo("", (1,), e.dtype, "").nbytes)


def renamer(source_config: dict, options: FormatOptions):
    """Hub tensor name → name in the file."""
    return family_of(source_config).module_name if options.gptq_names == "module" else str


def quantization_config(config: QuantConfig, version: str, permuted: bool) -> dict:
    """The object in config.json and quantize_config.json. `permuted`: some g_idx is not monotone."""
    return {
        "quant_method": "gptq",
        "bits": config.bits,
        "group_size": config.group_size,
        "sym": config.symmetric,
        "desc_act": permuted,
        "checkpoint_format": VERSIONS[version],
        "lm_head": False,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"vlmq-export:{__version__}", FORMAT_TAG],
            "method": config.method,
            "damp_percent": config.damp,
            "static_groups": config.act_order == "static",
            "act_group_aware": config.act_order == "gar",
        },
    }


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """Size, bits per weight and refusals from shapes alone. Sizes leave out tokenizer and processor files."""
    refusals = list(_refusals(model, options))
    if refusals:
        return FormatPlan(0.0, 0, refusals)
    table = list(entries(model.linears, model.floats, model.config, renamer(model.source_config, options)))
    packed = sum(e.nbytes for e in table if e.part in PACKED)
    weights = sum(s.out_features * s.in_features for s in model.linears)
    return FormatPlan(8 * packed / weights, sum(e.nbytes for e in table), [], notes(model, options))


def _refusals(model: ModelPlan, options: FormatOptions) -> Iterator[str]:
    c = model.config
    if options.gptq_version not in VERSIONS:
        yield f"--gptq-version {options.gptq_version}: choose v1 or v2"
    if options.gptq_names not in ("hub", "module"):
        yield f"--gptq-names {options.gptq_names}: choose hub or module"
    if options.gptq_names == "module" and model.model_type not in GPTQMODEL_LOADS:
        yield f"--gptq-names module is for GPTQModel.load, which has no class for {model.model_type}; use --gptq-names hub"
    if c.bits not in BITS:
        yield f"--bits {c.bits}: GPTQ readers decode 2, 3, 4 or 8 bits; choose one of these"
    if c.group_size not in GROUP_SIZES:
        allowed = ", ".join(map(str, GROUP_SIZES))
        yield f"--group-size {c.group_size}: GPTQModel and transformers load only {allowed}; choose one of these"
    if c.head_bits:
        yield (
            f"--head-bits {c.head_bits}: transformers loads quantized linears of the decoder layers only (optimum 2.3); "
            "leave out --format gptq, or the option"
        )
    for axis in ("out_features", "in_features"):
        odd = [s for s in model.linears if getattr(s, axis) % 32]
        if odd:
            yield (
                f"{odd[0].name} has {axis} {getattr(odd[0], axis)}, which is no multiple of 32 and cannot be packed "
                f"({len(odd)} such linears); leave --format gptq out"
            )
    bad = [s for s in model.linears if c.group_size > 0 and s.in_features % c.group_size]
    if bad:
        yield (
            f"--group-size {c.group_size} does not divide in_features {bad[0].in_features} of {bad[0].name}; "
            "choose a divisor or -1"
        )


def notes(model: ModelPlan, options: FormatOptions) -> list[str]:
    """What the user should know of this file: who reads it how fast, and who cannot."""
    c, out = model.config, []
    slow = []
    if c.bits not in (4, 8):
        slow.append(f"{c.bits} bits")
    if not c.symmetric:
        slow.append("asymmetric")
    if c.group_size not in MARLIN_GROUPS:
        slow.append(f"group size {c.group_size}")
    shapes = [s for s in model.linears if s.in_features % 128 or s.out_features % 64]
    if shapes:
        slow.append(f"shape {shapes[0].out_features}×{shapes[0].in_features}")
    if slow:
        out.append(
            f"{', '.join(slow)}: vLLM runs this through gptq_gemm, not Marlin, which wants 4 or 8 bits, --sym and "
            "group size -1, 32, 64 or 128"
        )
    if c.act_order == "dynamic" and c.group_size != -1:
        out.append(
            "--act-order dynamic permutes g_idx (desc_act true): kernels gather activations, vLLM's cannot split it "
            "over GPUs in every kernel, and ORT-GenAI's importer gets it wrong when asymmetric; static or gar avoid it"
        )
    if c.bits == 4 and c.group_size not in FUSED_CPU_GROUPS:
        out.append(
            f"group size {c.group_size}: the 4-bit kernel that transformers may pick on CPU refuses it; load with "
            'quantization_config=GPTQConfig(bits=4, backend="gptq_torch")'
        )
    if options.gptq_version == "v2":
        out.append("checkpoint_format gptq_v2: read by GPTQModel, transformers and vLLM, not by AutoGPTQ or ORT-GenAI")
    if not c.symmetric and options.gptq_version == "v1":
        out.append(f"meta.quantizer lists {FORMAT_TAG} as a format tag: GPTQModel takes asymmetric v1 only with it")
    if model.model_type not in GPTQMODEL_LOADS:
        out.append(f"GPTQModel.load has no class for {model.model_type}: load with transformers or vLLM")
    elif options.gptq_names == "hub" and family_of(model.source_config).prefixes:
        out.append("hub tensor names: transformers and vLLM load them; GPTQModel.load needs --gptq-names module")
    return out


def check_uniform(records, config: QuantConfig) -> None:
    """transformers reads one grid for the whole file. Raises FormatError for a linear on another one."""
    for r in records:
        if (r.bits, r.group_size, r.symmetric) != (config.bits, config.group_size, config.symmetric):
            raise FormatError(
                f"{r.name}: its grid differs from the artifact's own; GPTQ files hold one grid, quantize again"
            )
