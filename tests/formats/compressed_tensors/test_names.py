"""What names in a compressed-tensors folder stand for: in the library, in vLLM, in our reader.

A grid is for the linears that its targets name, and what stays float is named in `ignore`.
"""

import re
from dataclasses import replace

import pytest
import torch

from tests.artifacts import GRIDS, config_of, mixed
from tools.reference_vlm.tiny_families import SPARSE
from vlmq_export.formats.compressed_tensors.layout import quantization_config, schemes
from vlmq_export.formats.compressed_tensors.read import TowerPart
from vlmq_export.formats.compressed_tensors.requirements import missing
from vlmq_export.formats.model_plan import model_plan
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.architecture import pretrained_config
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.quantizer.model.streamed import model_class

pytestmark = pytest.mark.skipif(
    bool(missing()) and "compressed-tensors" not in required_runtimes(),
    reason=f"{missing()} not installed and not declared present",
)

PLAIN = QuantConfig("rtn", 4, 64)
RECIPES = {
    "one grid": PLAIN,
    "a tower": replace(PLAIN, vision_bits=8),
    "a tower on the grid of the rest": QuantConfig("rtn", 4, 32, True, vision_bits=4),
    "a tower and a head": replace(PLAIN, vision_bits=8, head_bits=8),
}


@pytest.fixture(scope="module")
def planned(tiny):
    """get(family, recipe) → the plan of its tiny checkpoint."""
    return lambda arch, config: model_plan(Checkpoint(tiny(arch)), config, "m")


def widths(model, named) -> dict[str, int]:
    """Module → bits, for the modules that the library quantizes. named: pairs of name and class."""
    from compressed_tensors.utils import is_match, match_targets

    stated = quantization_config(model)
    groups = stated["config_groups"].values()
    bits = {t: group["weights"]["num_bits"] for group in groups for t in group["targets"]}
    return {
        name: bits[found[0]]
        for name, module in named
        if (found := match_targets(name, module, bits))
        and not is_match(name, module, stated["ignore"])
    }


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("arch", sorted({*FAMILIES} - {*SPARSE}))  # which the format refuses
def test_the_library_quantizes_what_the_plan_says_and_nothing_else(arch, recipe, planned, tiny):
    """In the module tree of transformers, and by the names that the file has."""
    model, family = planned(arch, RECIPES[recipe]), FAMILIES[arch]
    with torch.device("meta"):
        config = pretrained_config(config_of(tiny(arch)))
        modules = list(model_class(config)(config).named_modules())
    expected = {x.name: 8 if x.name.endswith("lm_head") else 4 for x in model.linears}
    expected |= {x.name: model.config.vision_bits for x in model.tower}
    assert bool(model.tower) == ("tower" in recipe)
    by_module = {family.module_name(name): bits for name, bits in expected.items()}
    assert widths(model, modules) == by_module
    by_hub = [(family.hub_name(name), module) for name, module in modules]
    assert widths(model, by_hub) == expected


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_all_that_stays_float_in_a_tower_is_ignored_by_name(arch, planned, tiny):
    """SGLang raises an error for a linear that is neither in a target nor ignored."""
    model, family = planned(arch, RECIPES["a tower"]), FAMILIES[arch]
    ignored = [p.removeprefix("re:") for p in quantization_config(model)["ignore"]]
    with torch.device("meta"):
        config = pretrained_config(config_of(tiny(arch)))
        modules = list(model_class(config)(config).named_modules())
    names = {
        family.hub_name(name): name
        for name, module in modules
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        and module.weight.ndim > 1
    }
    tower = {x.name for x in model.tower}
    for hub, name in names.items():
        if family.is_vision(hub):
            assert any(re.match(p, name) for p in ignored) == (hub not in tower), name


# The names of vLLM 0.33.0 (model_executor/models), whose linears take a scheme.
IN_VLLM = {
    "qwen2_vl": [
        "visual.blocks.1.attn.qkv",
        "visual.blocks.1.attn.proj",
        "visual.blocks.1.mlp.fc1",
        "visual.blocks.1.mlp.fc2",
        "visual.merger.mlp.0",
        "visual.merger.mlp.2",
    ],
    "qwen2_5_vl": ["visual.blocks.1.attn.qkv", "visual.blocks.1.mlp.gate_up_proj"],
    "qwen3_vl": [
        "visual.blocks.1.mlp.linear_fc2",
        "visual.merger.linear_fc1",
        "visual.deepstack_merger_list.0.linear_fc1",
    ],
}


@pytest.mark.parametrize("arch", IN_VLLM)
def test_names_of_vllm_lead_to_the_same_grids(arch, planned):
    model = planned(arch, RECIPES["a tower"])
    by_grid = {
        grid.bits: [t.removeprefix("re:") for t in targets] for targets, grid in schemes(model)
    }
    ignored = [p.removeprefix("re:") for p in quantization_config(model)["ignore"]]

    def grids(name: str) -> list[int]:
        return [bits for bits, names in by_grid.items() if any(re.match(p, name) for p in names)]

    for name in IN_VLLM[arch]:
        assert grids(name) == [8] and not any(re.match(p, name) for p in ignored), name
    decoder = "language_model.model.layers.0.self_attn.qkv_proj"
    assert grids(decoder) == grids("model.layers.0.mlp.gate_up_proj") == [4]
    patches = "visual.patch_embed.proj"
    assert not grids(patches) and any(re.match(p, patches) for p in ignored)


def test_a_float_tower_is_ignored_by_its_name_in_every_program(planned):
    """They match by `re.match`: with `model.` or `language_model.` before the name, or neither."""

    def kept(name: str, arch: str, **changed) -> bool:
        stated = quantization_config(planned(arch, replace(PLAIN, **changed)))
        return any(re.match(p.removeprefix("re:"), name) for p in stated["ignore"])

    assert kept("visual.blocks.0.attn.qkv", "qwen2_5_vl")
    assert kept("model.visual.merger.linear_fc1", "qwen3_vl")
    assert kept("vision_tower.encoder.layers.0.self_attn.q_proj", "llava_onevision")
    assert kept("multi_modal_projector.linear_1", "internvl")
    assert kept("model.connector.modality_projection.proj", "idefics3")
    assert kept("language_model.lm_head", "qwen2_vl") and kept("lm_head", "qwen2_vl")
    assert not kept("lm_head", "qwen2_vl", head_bits=4)
    # vLLM looks for both linears that its `in_proj_ba` is fused of.
    linear = "model.language_model.layers.0.linear_attn"
    assert kept(f"{linear}.in_proj_a", "qwen3_5") and kept(f"{linear}.in_proj_b", "qwen3_5")
    assert not any(kept(f"{linear}.in_proj_{end}", "qwen3_5") for end in ("qkv", "z", "qkvz"))
    for arch in FAMILIES:
        assert not kept("language_model.model.layers.0.mlp.gate_up_proj", arch)


def test_the_decoder_is_named_where_there_are_several_grids(planned, tiny):
    """The library's decoder of whole folders takes `Linear` for every name."""
    one = schemes(planned("internvl", PLAIN))
    assert [targets for targets, _ in one] == [["Linear"]]
    source = tiny("internvl")
    config = replace(mixed(GRIDS["w4g32"], source), vision_bits=8, head_bits=8)
    several = [targets for targets, _ in schemes(planned("internvl", config))]
    assert len(several) == 4  # the linears of 8 bits are on the grid of tower and head
    assert not any("Linear" in targets for targets in several)


# --- our reader, which never runs an expression ---------------------------------------------------


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_the_reader_takes_each_expression_for_what_it_is(arch, planned):
    model = planned(arch, RECIPES["a tower"])
    stated = quantization_config(model)
    expressions = [*stated["config_groups"]["group_1"]["targets"], *stated["ignore"]]
    family = model.architecture.family
    hubs = {x.name for x in (*model.linears, *model.tower)}
    hubs |= {t.name.removesuffix(".weight") for t in model.floats}
    for expression in expressions:
        part = TowerPart.of(expression)
        assert (part is None) == (expression == "re:.*lm_head"), expression
        for hub in hubs if part else []:
            for name in (hub, family.module_name(hub)):
                assert part.holds(name) == bool(re.match(expression[3:], name)), (expression, name)


@pytest.mark.parametrize(
    "expression",
    [
        r"re:.*visual.*",
        r"re:.*visual\.(.*\.)?blocks\.(0|1|)\.attn\.qkv$",
        r"re:.*visual\.(.*\.)?(a+)+$",
        r"re:.*visual\.(.*\.)?blocks\.0\.attn\.qkv",
        r".*visual\.(.*\.)?blocks$",
        r"re:.*model\.layers\..*x",
        "Linear",
        "",
    ],
)
def test_another_expression_is_none_of_ours(expression):
    assert TowerPart.of(expression) is None


def test_a_part_of_a_tower_is_below_its_root():
    part = TowerPart.of(r"re:.*visual\.(.*\.)?merger\.mlp\.(0|2)$")
    assert part and part.holds("model.visual.merger.mlp.2") and part.holds("visual.merger.mlp.0")
    for other in ("visual.merger.mlp.1", "merger.mlp.0", "mlp.0", "0", "", "x.visualmerger.mlp.0"):
        assert not part.holds(other)
    whole = TowerPart.of(r"re:.*visual\..*")
    assert whole and whole.holds("model.visual.merger") and not whole.holds("model.layers.0")
