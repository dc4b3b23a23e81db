"""What is not proven for experts is refused by name, before anything is read or solved."""

import json
import logging

import pytest

from tests.jobs import quantized
from tests.vlmq_export.test_cli import call
from vlmq_export import bundled
from vlmq_export.errors import CheckpointError, UsageError
from vlmq_export.quantizer.artifact.manifest import ModuleRecord
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.ranks import Ranks
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.report.page import contents
from vlmq_export.sources.locate import open_source

LEAVE = "is not there for experts, which qwen3_vl_moe has; leave it out"


def planned(source, formats=("gptq",), **options):
    recipe = Recipe(model=str(source), format=[*formats], bits=4, group_size=128, **options)
    return open_source(str(source)).plan(recipe)


def test_all_formats_but_compressed_tensors_are_planned(tiny):
    source = tiny("qwen3_vl_moe", layers=3)
    plan = planned(source, ("gptq", "compressed-tensors", "onnx", "gguf"))
    (why,) = plan.formats.pop("compressed-tensors").refusals
    assert "qwen3_vl_moe" in why and "leave out --format" in why
    assert [*plan.formats] == ["gptq", "onnx", "gguf"]
    assert not any(other.refusals for other in plan.formats.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"method": "awq"}, "--method awq"),
        ({"method": "mbq"}, "--method mbq"),
        ({"tune": 8}, "--tune"),
    ],
)
def test_recipes_that_are_not_proven_are_refused(tiny, options, named):
    assert planned(tiny("qwen3_vl_moe"), **options).refusals == [
        f"{named} {LEAVE}, or choose a dense model of the family"
    ]


def test_an_imatrix_is_refused(tiny):
    source = str(tiny("qwen3_vl_moe", layers=3))
    plan = planned(source, ("gguf",), emit_imatrix=True)
    assert plan.refusals == ["gguf: --emit-imatrix is not there for experts; leave it out"]


def test_all_experts_of_a_layer_have_the_type_of_their_tensor(tiny):
    """llama.cpp's rules see one tensor. Q4_K_M gives more bits to some layers' down_proj."""
    source = str(tiny("qwen3_vl_moe", layers=3))
    native = Recipe(model=source, format=["gguf"], gguf_type="Q3_K_M")
    found = open_source(source).plan(native)
    assert found.refusals == []
    types = found.model.config.types
    for layer in range(3):
        start = f"model.language_model.layers.{layer}.mlp.experts"
        kinds = [
            {types[f"{start}.{e}.{name}_proj"] for e in range(6)} for name in ("gate", "up", "down")
        ]
        assert [len(each) for each in kinds] == [1, 1, 1]


def test_gguf_alone_has_block_types(tiny):
    """The table has a line for all experts of a kind."""
    code, out, err = call(tiny("qwen3_vl_moe", layers=3), "--format", "gguf", "--dry-run")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines() if "experts" in line]
    assert [line[:2] for line in lines[:3]] == [
        ["experts.*.gate_proj", "18"],
        ["experts.*.up_proj", "18"],
        ["experts.*.down_proj", "18"],
    ]
    assert "Q4_1" not in out


def test_widths_by_cost_and_rotations_are_refused(tiny):
    source = str(tiny("qwen3_vl_moe"))
    by_cost = Recipe(model=source, format=["gptq"], target_bpw=3.5, gptq_names="module")
    with pytest.raises(UsageError, match=f"--target-bpw 3.5 {LEAVE}"):
        open_source(source).plan(by_cost)
    with pytest.raises(CheckpointError, match="decoders of qwen3_vl_moe cannot be rotated"):
        planned(source, rotate="folded")


def test_several_processes_are_refused(tiny, tmp_path):
    source = tiny("qwen3_vl_moe")
    with pytest.raises(UsageError, match="experts are solved in one process"):
        quantized(source, [], tmp_path / "a", QuantConfig(method="rtn"), ranks=Ranks(0, 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mlp_only_layers": [0]}, "mlp_only_layers or decoder_sparse_step"),
        ({"decoder_sparse_step": 2}, "mlp_only_layers or decoder_sparse_step"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok in config.json is 7, of 6 experts"),
        ({"moe_intermediate_size": 128}, "which way fused experts lie"),
        ({"num_experts": 10**9}, "num_experts in config.json is"),
    ],
)
def test_layers_that_cannot_be_read_are_refused(tiny, changes, said):
    config = json.loads((tiny("qwen3_vl_moe") / "config.json").read_text("utf-8"))
    config["text_config"] |= changes
    with pytest.raises(CheckpointError, match=said):
        Architecture.of(config)


def test_log_manifest_and_card_say_how_many_experts_few_tokens_came_to(tiny, tmp_path, caplog):
    source = tiny("qwen3_vl_moe")
    preprocessor = Preprocessor(source)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:2]]
    with caplog.at_level(logging.INFO):
        artifact = quantized(source, samples, tmp_path / "a", QuantConfig(method="gptq"))
    records: list[ModuleRecord] = artifact.manifest.modules
    routed = [r.metrics for r in records if r.name.endswith(".experts.3.down_proj")]
    assert [m["few"] for m in routed] == [256, 256]  # one record in each of two layers
    assert all(0 <= m["routed"] < 256 for m in routed)
    # Each token takes two of six experts, in each layer.
    counts = [r.metrics["routed"] for r in records if r.name.endswith(".gate_proj")]
    assert sum(counts) == 2 * 2 * sum(len(s.input_ids) for s in samples)
    assert "layers.1: 6 of 6 experts had fewer than 256 tokens, the least" in caplog.text
    assert "12 of 12 experts had fewer than 256 tokens; use more samples" in caplog.text
    said = contents(records, Recipe(model=str(source), format=["gptq"], method="gptq"))
    assert "Of 12 experts 12 had fewer than 256 calibration tokens" in said and "routers" in said
