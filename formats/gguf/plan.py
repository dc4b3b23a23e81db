"""What a GGUF export would be, from the settings and headers of the checkpoint's files alone.

The plan has the block types of the linears, the size of the files, the reasons to refuse the
export, and the costs that a user might not expect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec

from vlmq_export.errors import VlmqError
from vlmq_export.formats import NATIVE_MIX
from vlmq_export.formats.contract import FormatOptions, FormatPlan
from vlmq_export.formats.gguf.files.tokenizer import NOTES, Tokenizer, read_tokenizer
from vlmq_export.formats.gguf.size import part_bytes, tensor_bytes, vision_types
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.tables.params import (
    ImageParams,
    image_params,
    text_params,
    vision_params,
)
from vlmq_export.formats.gguf.types.exact import grid_home, planned_home, tower_home, why_homeless
from vlmq_export.formats.gguf.types.mix import MIXES, module_types
from vlmq_export.formats.gguf.types.order import torn
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.model_plan import (
    LinearSpec,
    ModelPlan,
    embedding_note,
    tower_note,
    widths_note,
)
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.architecture import Architecture


def plan(model: ModelPlan, options: FormatOptions) -> FormatPlan:
    """The plan of both files.

    If the export is refused, the bits per weight count only the linears that have a block type, and
    of the size some parts may be missing.
    """
    homes = _homes(model)
    kinds = homes | model.config.types
    inexpressible = _inexpressible(model.architecture)
    refusals = [*_refusals(model, options, homes), *inexpressible]
    bits, weights = _stored(model, homes)
    layout, parts, notes = None, {}, []
    if not inexpressible:
        layout = Layout.of(model.architecture, options.mmproj_class_row)
        refusals += _torn(model, layout)
        tokenizer, image, unreadable = _beside(model, layout)
        refusals += unreadable
        notes = token_notes(tokenizer) if tokenizer else []
        parts = part_bytes(model, layout, options, kinds, tokenizer, image)
    return FormatPlan(
        bits / weights if weights else 0.0,
        sum(parts.values()),
        list(dict.fromkeys(refusals)),
        [*plan_notes(model, kinds), *vision_notes(model, layout, options), *notes],
        parts,
    )


def _homes(model: ModelPlan) -> dict[str, str | None]:
    """Linear → the block type that it would have, or None where no type is exact."""
    config = model.config
    return {
        x.name: config.types.get(x.name) or planned_home(config.of(x.name), x.in_features)
        for x in model.linears
    }


def _torn(model: ModelPlan, layout: Layout) -> list[str]:
    """A line where groups do not survive the order in which the file has some columns."""
    size, types = model.config.group_size, model.config.types
    places = [place for place in layout.text.values() if place.heads]
    affine = [p for p in places if p.hub.removesuffix(".weight") not in types]
    return [
        torn(place.hub.removesuffix(".weight"), f"groups of {size} columns", place.run)
        for place in affine[:1]
        if size != -1 and place.run % size
    ]


def linear_bits(linear: LinearSpec, config: QuantConfig, options: FormatOptions) -> int | None:
    """Bits of a quantized linear in its block type, filled up to whole steps of 32 bytes.

    config: the recipe of this one linear.
    """
    if home := planned_home(config, linear.in_features):
        return 8 * tensor_bytes((linear.out_features, linear.in_features), home)
    return None


def _refusals(
    model: ModelPlan, options: FormatOptions, homes: Mapping[str, str | None]
) -> list[str]:
    """What the recipe asks for and GGUF cannot hold, one line each."""
    config = model.config
    refusals = [
        why_homeless(x.name, config.of(x.name), x.in_features)
        for x in model.linears
        if homes[x.name] is None
    ]
    refusals += [
        f"{name}: no block type of {config.gguf_type or 'llama.cpp'} divides its rows;"
        " leave --gguf-type, --target-bpw and --target-size out"
        for name, kind in config.types.items()
        if kind == "F16"
    ]
    refusals += _unknown(config)
    if model.tower and options.mmproj_dtype == "q8_0":
        refusals.append(
            f"--mmproj q8_0: --vision-bits {config.vision_bits} has the types of the tower already;"
            " use f16 or f32, which the other linears then have"
        )
    if config.act_order == "dynamic" and config.group_size != -1:
        refusals.append(
            "--act-order dynamic permutes the groups, and GGUF has no g_idx;"
            " use gar, static or off, or --group-size -1"
        )
    method = model.job.method
    if options.gguf_imatrix and model.architecture.family.sparse:
        refusals.append("--emit-imatrix is not there for experts; leave it out")
    if options.gguf_imatrix and not method.solves:
        refusals.append(
            f"--emit-imatrix: --method {config.method} leaves no energies of the model's own"
            " inputs; use another"
        )
    return refusals


def _unknown(config: QuantConfig) -> list[str]:
    """The types of the recipe that the installed gguf-py does not know, one line each.

    It can neither write nor read a file that contains such a type.
    """
    if not config.types or find_spec("gguf") is None:
        return []
    import gguf

    return [
        f"{kind}: gguf-py {version('gguf')} does not know this type, and cannot read a file that"
        " contains it; use TQ2_0 or Q2_K"
        for kind in sorted(set(config.types.values()))
        if not hasattr(gguf.GGMLQuantizationType, kind)
    ]


def _inexpressible(architecture: Architecture) -> list[str]:
    """What config.json asks for and llama.cpp cannot compute, at most one line for each file."""
    found = []
    for params in (text_params, vision_params):
        try:
            params(architecture)
        except VlmqError as e:
            found.append(str(e))
    return found


def _beside(
    model: ModelPlan, layout: Layout
) -> tuple[Tokenizer | None, ImageParams | None, list[str]]:
    """Tokenizer and image processor as the writer will read them.

    What it would miss in the files beside the weights is at most one line for each of the two.
    """
    tokenizer = image = None
    found = []
    try:
        Layout.of(model.architecture, folder=model.folder)  # raises where a token is missing
        tokenizer = read_tokenizer(model.folder, model.architecture, layout.text_params.vocabulary)
    except VlmqError as e:
        found.append(str(e))
    try:
        image = image_params(model.folder)
    except VlmqError as e:
        found.append(str(e))
    return tokenizer, image, found


def _tower_bytes(model: ModelPlan, layout: Layout, options: FormatOptions) -> int:
    """Bytes of all tensors of the mmproj."""
    types = vision_types(model, layout, options)
    return sum(tensor_bytes(place.shape, types[n]) for n, place in layout.vision.items())


def vision_notes(model: ModelPlan, layout: Layout | None, options: FormatOptions) -> list[str]:
    """What the log and the model card should say of a quantized vision tower."""
    if layout is None or not model.tower:
        return []
    sizes = [_tower_bytes(m, layout, options) for m in (model, replace(model, tower=[]))]
    kinds = Counter(tower_home(model.config, x.in_features) for x in model.tower)
    main = model.config.vision_type or next(iter(kinds))
    others = [
        f" ({count} of them {kind}, whose rows no block of {TYPES[main].block} divides)"
        for kind, count in kinds.items()
        if main and kind != main
    ]
    return tower_note(model, f"{main}{''.join(others)}", *sizes)


def token_notes(tokenizer: Tokenizer) -> list[str]:
    """Where llama.cpp makes other tokens of a text than transformers does."""
    return [NOTES[tokenizer.pre]] if tokenizer.pre in NOTES else []


def plan_notes(model: ModelPlan, homes: Mapping[str, str | None]) -> list[str]:
    """What the log and the model card should say.

    homes: linear → block type, as planned or as chosen from the integers.
    """
    config = model.config
    counts = Counter(home for home in homes.values() if home)
    mixed = widths_note(model, lambda x: _stored(replace(model, linears=[x]), homes)[0])
    notes = [*mixed, *_spread(counts), *_costs(model, homes, counts), *_embedding(model, homes)]
    if config.types:
        return [*notes, *_fallbacks(config)]
    usual = config.bits == 4 and not config.symmetric and not config.widths
    if usual and not _inexpressible(model.architecture):
        notes.append(_shared(model, homes))
    return [*notes, *_output_matrix(model)]


def _embedding(model: ModelPlan, homes: Mapping[str, str | None]) -> list[str]:
    """What a quantized embedding takes."""
    return embedding_note(model, lambda x: _stored(replace(model, linears=[x]), homes)[0] // 8)


def _spread(counts: Counter[str]) -> list[str]:
    """How many linears have which block type."""
    if not counts:
        return []
    spread = ", ".join(
        f"{n} linears {home} ({TYPES[home].bits_per_weight:g} bits per weight)"
        for home, n in counts.most_common()
    )
    return [f"GGUF block types: {spread}"]


def _costs(
    model: ModelPlan, homes: Mapping[str, str | None], counts: Counter[str]
) -> Iterator[str]:
    """Where a grid takes more bits than its codes suggest, or fewer than planned."""
    config = model.config
    if config.widths:  # what each takes is known when they are chosen
        return
    dear = {
        x.in_features
        for x in model.linears
        if (home := homes[x.name]) and TYPES[home].bits_per_weight > config.bits + 1
    }
    if config.bits < 4 and dear and not config.types:
        yield _dear(config, dear)
    if config.bits == 2 and not config.symmetric and "Q2_K" in counts and "TQ2_0" not in counts:
        yield (
            "2-bit linears whose zero-points are all 1 or 2 need only TQ2_0's 2.0625 bits per"
            " weight and are stored so"
        )
    if "Q5_0" in counts and config.bits == 4 and not config.types:
        yield (
            f"{counts['Q5_0']} linears have scales whose product with the zero-point is not exact"
            " in float16 and take Q5_0's 5.5 bits"
        )


def _shared(model: ModelPlan, homes: Mapping[str, str | None]) -> str:
    """What integers that all formats share cost, beside those made for llama.cpp alone."""
    here, native = _stored(model, homes), _stored(model, module_types(model, NATIVE_MIX))
    shared, own = (bits / max(weights, 1) for bits, weights in (here, native))
    return (
        f"integers that all formats share take {shared:.3g} bits per weight in GGUF; from the float"
        f" model, --format gguf alone and without --bits is solved on {NATIVE_MIX} and takes"
        f" {own:.3g}"
    )


def _stored(model: ModelPlan, kinds: Mapping[str, str | None]) -> tuple[int, int]:
    """The bits of all linears that have a block type, and the number of their weights."""
    bits = weights = 0
    for x in model.linears:
        if kind := kinds.get(x.name):
            bits += 8 * x.out_features * TYPES[kind].row_bytes(x.in_features)
            weights += x.out_features * x.in_features
    return bits, weights


def _output_matrix(model: ModelPlan) -> Iterator[str]:
    """What llama.cpp's rounding of activations costs at an output matrix that stays float."""
    matrix = "embed_tokens.weight" if model.architecture.tied else "lm_head.weight"
    for t in model.floats:
        if t.name.endswith(matrix) and t.dtype in ("BF16", "F16"):
            rounding = {"BF16": "bfloat16, 1.6e-3", "F16": "float16, 2e-4"}[t.dtype]
            yield (
                f"the output matrix stays {t.dtype}: llama.cpp rounds its input to {rounding}"
                " relative per product"
            )


def _fallbacks(config: QuantConfig) -> list[str]:
    """The matrices that a K-quant does not fit, as llama-quantize would warn."""
    if not config.gguf_type:
        return []
    legacy = [
        name
        for name, kind in config.types.items()
        if TYPES[kind].block == 32 and TYPES[MIXES[config.gguf_type]].block == 256
    ]
    if not legacy:
        return []
    return [
        f"{len(legacy)} matrices have rows, or heads that llama.cpp puts in another order, that no"
        f" block of 256 divides, and take a type of 32-blocks, first {legacy[0]}"
    ]


def _dear(config: QuantConfig, columns: set[int]) -> str:
    """The cheaper choice for grids of 2 and 3 bits that are stored in a container of four.

    columns: in_features of these linears.
    """
    said = (
        f"{config.bits}-bit grids of --group-size {config.group_size} have no narrower exact GGUF"
        " type than 4.5 bits per weight"
    )
    if odd := sorted(k for k in columns if k % 256):
        named = ", ".join(str(k) for k in odd)
        return f"{said} in rows of {named} columns, whatever the group size"
    if config.bits == 2 and config.symmetric and config.group_size % 64 == 0:
        said += " (Q2_0 would take 2.25, but gguf-py 0.19 cannot read a file that contains it)"
    symmetric = config.symmetric or config.bits == 3
    cheaper = grid_home(config.bits, symmetric, 256, portable=True, ternary=config.symmetric)
    assert cheaper is not None, "2 and 3 bits have a type in groups of 256"
    flags = "--sym --group-size -1" if symmetric else "--group-size -1"
    cost = TYPES[cheaper].bits_per_weight
    return f"{said}; {flags} (or groups of 256) costs {cost:g} in {cheaper}"
