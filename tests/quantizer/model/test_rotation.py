"""Rotations folded into the weights: in every family the rotated model computes the same function.

What else is checked: what a rotation refuses, and artifacts of rotated models.
"""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tools.bench.scoring import load_model
from tools.reference_vlm import onevision
from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export import bundled
from vlmq_export.errors import CheckpointError, UsageError
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.pipeline import run
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import DECODER, FAMILIES
from vlmq_export.quantizer.model.rotation import (
    RotatedCheckpoint,
    Rotation,
    hadamard,
    rotate_inner,
    rotated,
)
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
EQUAL = 1e-9  # allowed relative error of the float64 logits of a rotated model
# The same where transformers computes some steps in float32, whatever it is given: a delta rule.
EQUAL_IN_PART = {"qwen3_5": 1e-5}
TURNED = [arch for arch in ARCHES if arch not in ("gemma3", "qwen3_vl_moe")]


@pytest.mark.parametrize("size", [1, 2, 3, 64, 96, 256, 896, 60])
def test_a_rotation_is_orthogonal_and_mixes(size):
    rotation = Rotation.of(size, 3, 0)
    q = rotation.apply(torch.eye(size, dtype=torch.float64))
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(q, Rotation.of(size, 3, 0).apply(torch.eye(size, dtype=torch.float64)))
    if size > 3:
        other = Rotation.of(size, 4, 0).apply(torch.eye(size, dtype=torch.float64))
        assert not torch.allclose(q, other)
        # An outlying channel is spread over at least 2^k channels, where 2^k divides the size.
        assert q.abs().max() <= (size & -size) ** -0.5 + 1e-12


def test_the_fast_product_is_the_matrix():
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    x = torch.randn(5, 16, dtype=torch.float64)
    assert torch.allclose(hadamard(x), x @ h / 4, atol=1e-14)


def test_blocks_are_rotated_each():
    rotation, x = Rotation.of(8, 0, 0), torch.randn(3, 24, dtype=torch.float64)
    apart = torch.cat([rotation.apply(part) for part in x.split(8, 1)], 1)
    assert torch.equal(rotation.blocks(x), apart)


def float64_logits(folder, checkpoint, exact, samples):
    """Logits of transformers' own model with the tensors that `exact(name)` gives, for each sample.

    Everything is in float64, the norms of the decoder too.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    if checkpoint.config.get("tie_word_embeddings") is False:
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    state = {name: exact(name).double() for name in checkpoint.tensors}
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    added = FAMILIES[config.model_type].gain
    for norm in model.get_decoder().modules():
        if type(norm).__name__.endswith("RMSNorm"):
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            norm.forward = lambda x, gain=norm.weight + added, eps=eps: (
                gain * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            )
    if getattr(checkpoint, "online", False):
        rotate_inner(model.get_decoder().layers, DECODER, checkpoint.inner_rotation())
    model.eval()

    def logits(sample):
        inputs = sample.model_inputs().items()
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs}
        return model(**inputs, use_cache=False).logits

    with torch.no_grad():
        return [logits(sample) for sample in samples]


@pytest.mark.parametrize("online", [False, True], ids=["folded", "online"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("arch", TURNED)
def test_the_rotated_model_computes_the_same(arch, tied, online, tiny):
    folder = tiny(arch, tied=tied)
    samples = [Preprocessor(folder).sample(row) for row in read_rows(bundled.CALIBRATION)[:2]]
    plain, turned = Checkpoint(folder), RotatedCheckpoint(folder, 7, online=online)
    before = float64_logits(folder, plain, plain.tensor, samples)
    after = float64_logits(folder, turned, turned.exact, samples)
    for a, b in zip(before, after):
        assert float((a - b).norm() / a.norm()) < EQUAL_IN_PART.get(arch, EQUAL)
    moved = [n for n in plain.tensors if not torch.equal(plain.tensor(n).double(), turned.exact(n))]
    family = plain.architecture.family
    assert any(name.endswith("self_attn.v_proj.weight") for name in moved)
    assert any(family.is_vision(n) for n in moved)


@pytest.mark.parametrize("part", ["embed", "lm_head", "o_proj", "writer", "gain"])
def test_the_comparison_sees_a_part_that_was_forgotten(part, tiny):
    """Where one tensor of any kind is left as it was, the logits change."""
    arch = "llava_onevision"
    folder = tiny(arch, tied=False)
    samples = [Preprocessor(folder).sample(read_rows(bundled.CALIBRATION)[0])]
    plain, turned = Checkpoint(folder), RotatedCheckpoint(folder, 7)
    name = {
        "embed": "language_model.model.embed_tokens.weight",
        "lm_head": "language_model.lm_head.weight",
        "o_proj": "language_model.model.layers.1.self_attn.o_proj.weight",
        "writer": "image_newline",
        "gain": "language_model.model.layers.0.input_layernorm.weight",
    }[part]

    def forgetful(n):
        return plain.tensor(n) if n == name else turned.exact(n)

    (before,) = float64_logits(folder, plain, plain.tensor, samples)
    (after,) = float64_logits(folder, turned, forgetful, samples)
    assert float((before - after).norm() / before.norm()) > 1e-3


def test_an_outlying_channel_is_gone(tmp_path):
    """The second reference VLM has outlying channels by design. Rotated, none is left."""
    name = "language_model.model.layers.3.mlp.gate_proj.weight"

    def spread(weight):
        columns = weight.double().norm(dim=0)
        return float(columns.max() / columns.median())

    assert spread(Checkpoint(onevision.FOLDER).tensor(name)) > 10
    assert spread(RotatedCheckpoint(onevision.FOLDER, 0).tensor(name)) < 3


def test_a_norm_with_a_bias_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen2_5_vl", tied=False), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.input_layernorm.bias"] = torch.zeros(256)
    save_file(tensors, folder / "model.safetensors")
    says = r"layers\.1\.input_layernorm\.bias is a bias of a norm"
    with pytest.raises(CheckpointError, match=says):
        RotatedCheckpoint(folder, 0)


def test_norms_behind_linears_are_refused(tiny):
    """Their gains stand between a linear and the residual stream, where no weight can take them."""
    with pytest.raises(CheckpointError, match="decoders of gemma3 cannot be rotated"):
        RotatedCheckpoint(tiny("gemma3"), 0)


def test_values_beyond_float16_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny("qwen2_5_vl", tied=False), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = 1e6
    save_file(tensors, folder / "model.safetensors")
    turned = RotatedCheckpoint(folder, 0)
    says = r"embed_tokens\.weight exceeds float16's range when rotated"
    with pytest.raises(CheckpointError, match=says):
        turned.tensor("model.embed_tokens.weight")


def test_rows_of_the_embedding_are_rows_of_the_whole(tiny):
    turned = RotatedCheckpoint(tiny("qwen2_5_vl", tied=True), 0)
    whole = turned.tensor("model.embed_tokens.weight")
    assert torch.equal(turned.tensor("model.embed_tokens.weight", rows=[3, 9]), whole[[3, 9]])
    assert whole.dtype == torch.float16
    assert turned.info("lm_head.weight").shape == tuple(whole.shape)


def test_off_is_the_checkpoint_itself(tiny):
    plain = Checkpoint(tiny("qwen2_5_vl", tied=True))
    assert rotated(plain, "off", 0) is plain
    turned = rotated(plain, "folded", 0)
    assert rotated(turned, "folded", 0) is turned
    assert turned.fingerprint() == plain.fingerprint()


@pytest.mark.parametrize(
    ("method", "rotate"),
    [
        ("vlmq-paper", "folded"),
        pytest.param("vlmq-paper", "online", marks=pytest.mark.slow),
        pytest.param("awq", "folded", marks=pytest.mark.slow),
    ],
)
def test_a_rotated_artifact_at_eight_bits_is_the_model(method, rotate, tmp_path):
    """End to end and calibrated: a model of the artifact's tensors answers as the source does."""
    source = bundled.REFERENCE_VLM
    samples = [Preprocessor(source).sample(row) for row in read_rows(bundled.CALIBRATION)[:8]]
    config = QuantConfig(method, 8, 128, rotate=rotate)
    folder, checkpoint = tmp_path / "a", Checkpoint(source)
    quantize(checkpoint, samples, config, folder, name="m", calibration={}, device="cpu")
    artifact, weights = Artifact(folder), Weights(folder, source)
    assert artifact.config.rotate == rotate
    assert artifact.source_config["tie_word_embeddings"] is False
    assert "lm_head.weight" in artifact.float_names()

    def source_array(name):
        return checkpoint.tensor(name).float().numpy()

    kept, turned = "visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.2.weight"
    assert np.array_equal(weights.array(kept), source_array(kept))
    assert not np.allclose(weights.array(turned), source_array(turned), atol=1e-2)
    model = load_model(folder / "source", weights.items())
    if rotate == "online":
        rotation = RotatedCheckpoint(source, 0, online=True).inner_rotation()
        rotate_inner(model.get_decoder().layers, DECODER, rotation)
    plain = load_model(source, ((name, source_array(name)) for name in checkpoint.tensors))
    with torch.no_grad():
        for sample in samples[:2]:
            a, b = (m(**sample.model_inputs()).logits for m in (plain, model))
            assert float((a - b).norm() / a.norm()) < 0.02
    written = json.loads((folder / "source" / "config.json").read_text())
    assert written["text_config"]["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["gptq", "onnx", "gguf"])
def test_the_online_part_is_refused_by_every_format(name, tmp_path):
    recipe = Recipe(format=[name], method="rtn", rotate="online", out=tmp_path / "out")
    with pytest.raises(UsageError, match=rf"^{name}: --rotate online .* use folded$"):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_an_artifact_rotated_online_cannot_be_exported_either(tmp_path):
    config, folder = QuantConfig("rtn", 4, 128, rotate="online"), tmp_path / "a"
    source = Checkpoint(bundled.REFERENCE_VLM)
    quantize(source, [], config, folder, name="m", calibration={}, device="cpu")
    recipe = Recipe(model=str(folder), format=["gptq"], out=tmp_path / "out")
    with pytest.raises(UsageError, match=r"gptq: --rotate online"):
        run(recipe)
    with pytest.raises(UsageError, match=r"--rotate folded: the artifact has online already"):
        run(recipe.model_copy(update={"rotate": "folded"}))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TURNED)
def test_a_folded_rotation_is_proven_in_every_runtime_that_takes_the_family(arch, tiny, tmp_path):
    # DeepStack needs three layers. A tower of four has full attention in every second block, as
    # llama.cpp wants it.
    recipe = Recipe(
        model=str(tiny(arch, tied=True, layers=3, depth=4)),
        format=["gptq", "gguf", "onnx"],
        method="rtn",
        rotate="folded",
        out=tmp_path / "out",
    )
    result = run(recipe)
    assert result.parity is not None and result.parity.verified, result.parity.failures()
