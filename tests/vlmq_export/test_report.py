"""The model card says what of a model is quantized, and how."""

import pytest

from vlmq_export.quantizer.artifact.manifest import OUTER, ModuleRecord
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.report.page import contents


def record(name, layer=0, bits=4):
    return ModuleRecord(name, layer, bits, 128, False, 8, 128, False)


LINEAR = record("model.layers.0.mlp.up_proj")
HEAD, EMBEDDING = record("lm_head", 1), record("model.embed_tokens", OUTER)


@pytest.mark.parametrize(
    ("records", "options", "says", "not_says"),
    [
        ([LINEAR], {}, "embeddings, norms and output head keep", "So is"),
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
