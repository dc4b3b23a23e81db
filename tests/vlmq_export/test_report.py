"""The model card says what of a model is quantized, and how."""

import json
import math

import pytest

from vlmq_export.formats.proof.checks import Check
from vlmq_export.proving.parity import Parity
from vlmq_export.quantizer.artifact.manifest import OUTER, VISION, ModuleRecord
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.report.page import contents, figure, layer_errors, table_rows


def record(name, layer=0, bits=4):
    return ModuleRecord(name, layer, bits, 128, False, 8, 128, False)


LINEAR = record("model.layers.0.mlp.up_proj")
HEAD, EMBEDDING = record("lm_head", 1, 8), record("model.embed_tokens", OUTER, 8)
TOWER = record("visual.blocks.0.mlp.up_proj", VISION, 8)


@pytest.mark.parametrize(
    ("records", "options", "says", "not_says"),
    [
        ([LINEAR], {}, "embeddings, last norm and output head keep", "So is"),
        ([LINEAR], {"method": "exact"}, "embeddings, norms and output head keep", "carry"),
        ([LINEAR, HEAD], {"head_bits": 8}, "So is the output head, to 8 bits.", "output head keep"),
        (
            [LINEAR, HEAD, EMBEDDING],
            {"gguf_type": "Q4_K_M"},
            "So is the output head, on its type. The embedding is rounded",
            "s and output head keep",
        ),
        (
            [LINEAR, EMBEDDING],
            {"gguf_type": "Q4_K_M"},
            "on the block types of llama.cpp, Q4_K_M",
            "So is",
        ),
        (
            [LINEAR],
            {"rotate": "folded"},
            "All other tensors but those of the vision tower are rotated",
            "keep the source",
        ),
        (
            [LINEAR, EMBEDDING],
            {"embedding_bits": 8},
            "The embedding is rounded to nearest to 8 bits.",
            "embeddings",
        ),
        (
            [LINEAR, TOWER],
            {"vision_bits": 8},
            "So are 1 linears of vision tower and projector, to 8 bits",
            "Vision tower, projector",
        ),
        ([LINEAR], {"method": "awq"}, "norms of its layers carry", "embeddings, norms"),
        (
            [LINEAR],
            {"method": "mbq"},
            "embeddings, last norm and output head keep",
            "embeddings, norms",
        ),
    ],
)
def test_the_card_says_what_the_artifact_holds(records, options, says, not_says):
    text = contents(records, Recipe(format=["gguf"], **options))
    assert text.startswith("1 linears of the language backbone are quantized by")
    assert says in text and not_says not in text


@pytest.mark.parametrize(
    ("value", "said"), [(math.nan, "not a number"), (math.inf, "infinite"), (-math.inf, "infinite")]
)
def test_a_figure_that_is_not_finite_is_a_row_in_words(tmp_path, value, said):
    row = Check.at_most("gptq", "L3", "logits", value, 1e-5, unit="rel", detail="float16")
    assert row.status == "failed" and figure(value) == said
    assert row.detail == f"the figure is {said}; float16"
    assert table_rows([row])[0][3] == f"{said} rel"
    Parity(False, [row], {}).write(tmp_path / "parity.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text = (tmp_path / "parity.json").read_text("utf-8")
    (kept,) = json.loads(text, parse_constant=refuse)["checks"]
    assert kept["value"] is None and said in kept["detail"]
    (again,) = Parity.read(tmp_path / "parity.json").checks
    assert (again.status, again.detail) == ("failed", row.detail)


def test_layers_whose_error_is_not_finite_have_a_bar():
    records = [LINEAR, HEAD, record("model.layers.0.mlp.down_proj")]
    for r, error in zip(records, (0.5, math.inf, None), strict=True):
        r.metrics["weight_error"] = error
    try:
        first, second = layer_errors(records)
        assert [x["width"] for x in first["linears"]] == [100, 100]
        assert figure(second["linears"][0]["error"]) == "infinite"
    finally:
        LINEAR.metrics.clear()
        HEAD.metrics.clear()
