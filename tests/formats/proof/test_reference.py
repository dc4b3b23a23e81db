"""The reference that the files of every format are compared with: weights, logits and answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from tests.artifacts import GRIDS, edit, rtn_artifact
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.proof.answers import ANSWER
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.proving.parity import check_formats
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.rows import read_rows


@pytest.fixture(scope="module", params=["w4g128", "w3-sym", "w4g128-dynamic"])
def artifact(request, tmp_path_factory):
    return rtn_artifact(tmp_path_factory.mktemp(request.param), GRIDS[request.param])


def test_it_decodes_as_the_artifact_does_by_other_code(artifact):
    weights = Weights(artifact.path)
    for q in artifact.linears():
        assert np.array_equal(weights.array(f"{q.name}.weight"), q.decode().numpy())


def test_some_rows_are_decoded_as_the_whole_matrix_is(artifact):
    weights = Weights(artifact.path)
    linear = "model.layers.0.mlp.down_proj.weight"
    for name in (linear, "model.embed_tokens.weight"):
        whole = weights.array(name)
        assert weights.shape(name) == whole.shape
        assert np.array_equal(weights.array(name, [5, 0, 5]), whole[[5, 0, 5]])
        assert np.array_equal(weights.array(name, range(3, 9)), whole[3:9])


def test_every_weight_of_the_model_is_counted_once(artifact):
    checkpoint = Checkpoint(REFERENCE_VLM)
    weights = Weights(artifact.path)
    assert sorted(weights.names()) == sorted(checkpoint.tensors)
    assert weights.count == sum(t.numel for t in checkpoint.tensors.values())


def test_a_small_model_is_given_one_thread_and_a_large_one_all(artifact, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert Reference(artifact.path, []).threads == 1
    monkeypatch.setattr("vlmq_export.formats.proof.reference._SMALL", 10)
    assert Reference(artifact.path, []).threads == 7


def test_floats_come_from_the_source_if_it_is_given(artifact, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(REFERENCE_VLM / "model.safetensors")
    tensors["visual.merger.ln_q.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    ours, theirs = Weights(artifact.path), Weights(artifact.path, tmp_path)
    changed = tensors["visual.merger.ln_q.weight"].float().numpy()
    assert np.array_equal(theirs.array("visual.merger.ln_q.weight"), changed)
    assert not np.array_equal(ours.array("visual.merger.ln_q.weight"), changed)
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert theirs.tensor(bias).dtype == torch.float16  # biases of quantized linears: the artifact's


def test_rows_of_the_same_id_keep_their_own_results(artifact):
    rows = read_rows(HELDOUT)[:2]
    reference = Reference(artifact.path, [replace(row, id="same") for row in rows])
    alone = Reference(artifact.path, rows)
    for ours, theirs in zip(reference.prompts, alone.prompts):
        assert np.array_equal(reference.logits(ours), alone.logits(theirs))


def test_an_answer_that_parts_at_a_tie_is_told_from_another_answer(artifact):
    """Two tokens are tied if a change of the logits as large as the gate can exchange their order.

    The gate is set a thousandth above and a thousandth below that change.
    """
    reference = Reference(artifact.path, read_rows(HELDOUT)[:1])
    (prompt,) = reference.prompts
    own = reference.answer(prompt)
    assert len(own) >= 2 and reference.judge(prompt, list(own), 0.0) == "same"
    logits = _step(reference, prompt, own[:1])
    margin = float(logits[own[1]] - logits.topk(2).values[1])
    second = int(logits.topk(2).indices[1])
    gate = margin / (2**0.5 * float(logits.norm()))
    answer = [own[0], second, *([7] * 5)]  # what follows does not matter
    assert reference.judge(prompt, answer, 1.001 * gate) == "tie"
    assert reference.judge(prompt, answer, 0.999 * gate) == "other"
    assert reference.judge(prompt, [], 1e-5) == "other"  # stopped at once
    worst = int(logits.argmin())
    assert reference.judge(prompt, [own[0], worst], 1e-3) == "other"


def _step(reference, prompt, answer: list[int]) -> torch.Tensor:
    """Logits after `answer`, by one forward pass without a cache."""
    inputs = prompt.model_inputs()
    added = torch.tensor([answer])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], added], 1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        inputs[name] = torch.cat([inputs[name], torch.full_like(added, value)], 1)
    with torch.no_grad():
        return reference.model(**inputs, use_cache=False).logits[0, -1].double()


def test_a_model_too_large_for_the_memory_is_compared_weight_by_weight_and_said_not_to_be_run(
    artifacts, tmp_path
):
    """What was not run does not count as passed, even if VLMQ_REQUIRE names the runtime."""
    artifact, folder = artifacts("w4g128"), tmp_path / "gptq"
    folder.mkdir()
    FORMATS["gptq"].write(artifact, folder, FormatOptions(name="m"))
    rows = read_rows(HELDOUT)[:2]
    assert Reference(artifact.path, rows, memory=10**12).too_large == ""
    assert Reference(artifact.path, rows).too_large == ""
    reference = Reference(artifact.path, rows, memory=10**7)
    assert "GB for whole models in float32" in reference.too_large
    settings = CheckSettings(images=2, questions=2)
    parity = check_formats({"gptq": folder}, reference, FormatOptions(name="m"), settings)
    assert not parity.verified and not parity.failures()
    ours = {c.status for c in parity.checks if c.level == "L1" and "our decoder" in c.name}
    assert ours == {"passed"}
    whole = [c for c in parity.checks if c.level in ("L2", "L3")]
    assert whole and all(c.status == "not run" and c.detail == reference.too_large for c in whole)
    assert "model" not in vars(reference)  # the cached property: it was never loaded


@pytest.mark.parametrize("arch", ["reference", "qwen2_vl", "qwen3_vl"])
def test_positions_are_known_without_weights(arch, artifacts, tiny):
    source = [] if arch == "reference" else [tiny(arch)]
    reference = Reference(artifacts("w4g128", *source).path, read_rows(HELDOUT)[:3])
    prompts = reference.prompts
    known = [reference.position_ids(prompt) for prompt in prompts]
    assert "model" not in vars(reference)
    vars(reference)["_empty"] = reference.model
    for prompt, positions in zip(prompts, known):
        np.testing.assert_array_equal(positions, reference.position_ids(prompt))


def test_a_model_that_writes_its_image_token_goes_on(tiny, tmp_path):
    """SmolVLM2's config.json switches the cache off. Each step would then see the images again."""
    made = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"], tiny("smolvlm"))
    reference = Reference(made.path, read_rows(HELDOUT)[:1])
    assert reference.model.config.use_cache is False
    token = reference.preprocessor.image_token_id
    reference.model.lm_head.register_forward_hook(
        lambda _module, _inputs, logits: torch.zeros_like(logits).index_fill(
            -1, torch.tensor(token), 1
        )
    )
    assert reference.answer(reference.prompts[0]) == [token] * ANSWER


@pytest.mark.parametrize("names", [None, ["Qwen2_5_VLModel"], ["AutoModel"]])
def test_the_reference_has_an_output_matrix_whichever_class_was_saved(tmp_path, names):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"])
    edit(artifact.source / "config.json", lambda config: config.update(architectures=names))
    model = Reference(artifact.path, []).model
    assert type(model) is transformers.Qwen2_5_VLForConditionalGeneration
