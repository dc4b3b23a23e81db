"""Which programs load which GPTQ folders, and that no page or note claims more."""

from dataclasses import replace
from pathlib import Path

import pytest

from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.runtimes import RUNTIMES
from vlmq_export.formats.in_transformers.runtimes import ALL_FAMILIES, one_of
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.planning.run_plan import plan_run
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.locate import open_source

PAGE = Path(__file__).parents[3] / "docs" / "gptq.md"
BY_NAME = {r.name.split()[0]: r for r in RUNTIMES}


@pytest.fixture(scope="module")
def model() -> ModelPlan:
    return open_source(None).plan(Recipe(format=["gptq"])).model


def of_family(model: ModelPlan, name: str) -> ModelPlan:
    """The same plan under another family's name, which is all that a runtime asks for."""
    config = model.architecture.config | {"model_type": name}
    return replace(
        model, architecture=replace(model.architecture, config=config, family=FAMILIES[name])
    )


def refused(model: ModelPlan, runtime: str, names: str = "hub", **grid) -> list[str]:
    quant = replace(QuantConfig(symmetric=True), **grid)
    planned = replace(model, config=quant)
    return BY_NAME[runtime].refuses(planned, FormatOptions(gptq_names=names))


def test_the_families_are_those_that_we_have():
    assert set(ALL_FAMILIES) == set(FAMILIES)
    assert all({*r.families, *r.unread} <= set(FAMILIES) for r in RUNTIMES)
    assert not any(set(r.families) & set(r.unread) for r in RUNTIMES)


# auto_gptq.py, gptq_utils.py and marlin_utils.py of vLLM 0.33.0.
@pytest.mark.parametrize(
    ("grid", "why"),
    [
        ({}, None),
        ({"bits": 8}, None),
        ({"group_size": -1, "act_order": "dynamic"}, None),
        ({"symmetric": False}, "zero-points (--sym)"),
        ({"bits": 3}, "3 bits (--bits 4 or 8)"),
        ({"group_size": 256}, "groups of 256 (--group-size 32, 64, 128 or -1)"),
        ({"act_order": "dynamic"}, "permuted groups (--act-order gar or static)"),
    ],
)
def test_vllm_loads_symmetric_grids_of_four_and_eight_bits(model, grid, why):
    assert refused(model, "vLLM", **grid) == ([why] if why else [])


def test_sglang_loads_qwen3_vl_alone_and_permuted_groups_too(model):
    assert "vision tower" in refused(model, "SGLang")[0]
    qwen3 = of_family(model, "qwen3_vl")
    assert refused(qwen3, "SGLang", act_order="dynamic") == []
    assert refused(qwen3, "SGLang", symmetric=False) == ["zero-points (--sym)"]


def test_gptqmodel_wants_the_names_of_modules(model):
    why = ["hub tensor names (--gptq-names module)"]
    assert refused(model, "GPTQModel.load") == why
    assert refused(model, "GPTQModel.load", "module") == []
    assert refused(of_family(model, "qwen3_vl"), "GPTQModel.load") == []
    lacking = of_family(model, "llava_onevision")
    assert "has no class" in refused(lacking, "GPTQModel.load", "module")[0]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_transformers_loads_whatever_is_written(model, bits):
    for symmetric in (False, True):
        grid = {"bits": bits, "symmetric": symmetric, "act_order": "dynamic"}
        assert refused(model, "transformers", **grid) == []


def test_the_default_file_is_not_claimed_for_vllm(model):
    notes = plan_run(model, Recipe(format=["gptq"])).formats["gptq"].notes
    assert notes[0] == "loads in transformers + gptqmodel, which the tests run"
    (vllm,) = [n for n in notes if "vLLM" in n]
    assert vllm.startswith("does not load in vLLM 0.33.0 (by its code; it was not run): zero-")


def test_the_notes_name_what_loads_unseen(model):
    quant = replace(model.config, symmetric=True)
    symmetric = replace(model, config=quant)
    notes = plan_run(symmetric, Recipe(format=["gptq"])).formats["gptq"].notes
    assert "loads in vLLM 0.33.0 (by its code; it was not run)" in notes


def test_the_page_has_every_row():
    text = PAGE.read_text("utf-8")
    for runtime in RUNTIMES:
        assert runtime.row in text


def test_values_in_words():
    assert one_of((4,)) == "4" and one_of((4, 8)) == "4 or 8"
    assert one_of((-1, 32, 64)) == "32, 64 or -1"
