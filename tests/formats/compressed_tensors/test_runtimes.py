"""Which programs load which compressed-tensors folders, and that no page or note claims more."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.formats.gptq.test_runtimes import model, of_family
from vlmq_export.formats.compressed_tensors.runtimes import RUNTIMES, vllm_loads
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.runtimes import notes
from vlmq_export.formats.model_plan import ModelPlan
from vlmq_export.planning.run_plan import plan_run
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.report.files import run_with

__all__ = ["model"]

PAGE = Path(__file__).parents[3] / "docs" / "compressed-tensors.md"
BY_NAME = {r.name.split()[0]: r for r in RUNTIMES}
NAME = "compressed-tensors"


def refused(model: ModelPlan, runtime: str, **grid) -> list[str]:
    planned = replace(model, config=replace(QuantConfig(), **grid))
    return BY_NAME[runtime].refuses(planned, FormatOptions())


# schemes/compressed_tensors_wNa16.py of both, and their tables for Marlin.
@pytest.mark.parametrize(
    ("runtime", "grid", "why"),
    [
        ("vLLM", {}, None),
        ("vLLM", {"symmetric": True, "group_size": -1}, None),
        ("vLLM", {"bits": 8}, None),
        ("vLLM", {"bits": 3}, None),
        ("vLLM", {"group_size": 16}, "groups of 16 (--group-size 32, 64, 128 or -1)"),
        ("SGLang", {}, None),
        ("SGLang", {"bits": 8, "symmetric": True}, None),
        ("SGLang", {"bits": 8}, "zero-points (--sym)"),
        ("SGLang", {"bits": 2}, "2 bits (--bits 4 or 8)"),
    ],
)
def test_what_the_servers_load(model, runtime, grid, why):
    assert refused(model, runtime, **grid) == ([why] if why else [])


def test_families_that_were_not_read_are_not_claimed(model):
    for runtime in BY_NAME.values():
        assert set(runtime.families) <= set(FAMILIES)
    smolvlm = of_family(model, "smolvlm")
    assert "was not read" in refused(smolvlm, "vLLM")[0]
    assert "no class" in refused(of_family(model, "internvl"), "SGLang")[0]
    assert not vllm_loads(smolvlm) and vllm_loads(model)


def test_the_notes_tell_what_is_not_known_from_what_does_not_load(model):
    said = list(notes(RUNTIMES, of_family(model, "mistral3"), FormatOptions()))
    assert "not known to load in vLLM 0.33.0: mistral3: its code was not read" in said
    assert "not known to load in SGLang 0.5.23: mistral3: its code was not read" in said
    said = list(notes(RUNTIMES, of_family(model, "internvl"), FormatOptions()))
    assert any(note.startswith("does not load in SGLang 0.5.23 (by its code") for note in said)


def test_the_notes_of_the_default_name_both_servers_and_the_call(model):
    notes = plan_run(model, Recipe(format=[NAME])).formats[NAME].notes
    assert notes[0] == "loads in transformers + compressed-tensors, which the tests run"
    assert "loads in vLLM 0.33.0 (by its code; it was not run)" in notes
    assert any("dequantize=True" in note for note in notes)
    symmetric = replace(model, config=replace(model.config, symmetric=True))
    notes = plan_run(symmetric, Recipe(format=[NAME], sym=True)).formats[NAME].notes
    assert not any("dequantize" in note for note in notes)


def test_a_file_that_vllm_does_not_load_is_not_said_to_be_served(tmp_path):
    assert run_with(NAME, tmp_path, below="out dir") == [f"vllm serve 'out dir/{NAME}'"]
    assert run_with(NAME, tmp_path) == [f"vllm serve ./{NAME}"]
    (line,) = run_with(NAME, tmp_path, by_vllm=False)
    assert "vllm" not in line and "transformers" in line


def test_the_page_has_every_row():
    text = PAGE.read_text("utf-8")
    for runtime in RUNTIMES:
        assert runtime.row in text
