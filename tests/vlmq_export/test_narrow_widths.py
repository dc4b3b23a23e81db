"""Models whose widths 128 does not divide: SmolVLM-256M has 576 columns, SmolVLM-500M 960."""

import pytest

from tools.reference_vlm.tiny_checkpoints import SMOLVLM_256M, SMOLVLM_500M, make_tiny
from vlmq_export.errors import UsageError
from vlmq_export.pipeline import dry_run, run
from vlmq_export.recipes.recipe import Recipe

# Narrower than a block of 256, and divided by no usual group size.
ODD = {"text_config": {"hidden_size": 240, "num_attention_heads": 15, "num_key_value_heads": 5}}


def narrow(shape: dict) -> dict:
    """The published decoder with the tiny vocabulary."""
    text = {k: v for k, v in shape["text_config"].items() if "vocab" not in k and "pixel" not in k}
    return {"text_config": text}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("narrow")
    return str(make_tiny(folder, "idefics3", shape=narrow(SMOLVLM_256M)))


def planned(model: str, *formats: str, **given):
    return dry_run(Recipe(model=model, format=list(formats or ("gptq", "onnx", "gguf")), **given))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_largest_group_that_fits_is_the_default(model, bits):
    plan = planned(model, bits=bits)
    assert plan.model.config.group_size == 64
    assert plan.refusals == []


def test_a_group_size_that_is_asked_for_is_kept_or_refused(model):
    assert planned(model, group_size=32).model.config.group_size == 32
    refusal = planned(model, group_size=128).refusals[0]
    assert "--group-size 128 does not divide 576 input columns" in refusal
    assert refusal.endswith("use 64 or -1")


def test_the_usual_group_where_it_fits(tiny):
    assert planned(str(tiny("idefics3"))).model.config.group_size == 128


def test_widths_that_no_group_divides_are_refused_with_what_is_left(tmp_path):
    model = str(make_tiny(tmp_path, "idefics3", shape=ODD | {"vocab_size": 512}))
    plan = planned(model, "gptq")
    assert "does not divide 240, 960 input columns" in plan.refusals[0]
    assert plan.refusals[0].endswith("use -1")
    with pytest.raises(UsageError, match="does not divide 240"):
        run(Recipe(model=model, format=["gptq"], out=tmp_path / "out"))


def test_a_mix_falls_back_as_llama_quantize_does(model):
    types = planned(model, "gguf").model.config.types
    layer = "model.text_model.layers.0."
    assert types[layer + "self_attn.q_proj"] == "Q5_0"  # for Q4_K
    assert types[layer + "self_attn.v_proj"] in ("Q5_0", "Q8_0")  # for Q4_K or Q6_K
    assert types[layer + "mlp.down_proj"] in ("Q4_K", "Q6_K")  # 1536 columns are six blocks
    assert types["model.text_model.embed_tokens"] == "Q5_0"
    assert types["lm_head"] == "Q8_0"


def test_a_budget_counts_the_types_that_fit(model):
    plan = planned(model, "gguf", target_bpw=5.6)
    assert plan.refusals == []
    assert plan.formats["gguf"].bits_per_weight <= 5.6
    assert not {"Q2_K", "Q3_K"} & {
        kind for name, kind in plan.model.config.types.items() if name.endswith("q_proj")
    }


@pytest.mark.parametrize("shape", [SMOLVLM_256M, SMOLVLM_500M], ids=["256M", "500M"])
def test_published_shapes_are_planned_without_a_flag(shape, tmp_path):
    """One layer of each, with the published vocabulary, tower and tiles of 512 pixels."""
    model = str(make_tiny(tmp_path, "smolvlm", layers=1, depth=1, shape=shape))
    plan = planned(model)
    assert plan.refusals == [] and plan.model.config.group_size == 64
    assert planned(model, "gguf").refusals == []
