"""Each family through the whole quantizer.

A tiny model of it is quantized with both streams, decoded by the reference and written as GPTQ.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export import bundled
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.in_transformers.proof.rows import own_decoder
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.experts import separate
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

CONFIG = QuantConfig(method="vlmq-paper", bits=3, group_size=64)


def quantized(source, out) -> Artifact:
    preprocessor = Preprocessor(source)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:6]]
    told = {"rows": len(samples)}
    quantize(Checkpoint(source), samples, CONFIG, out, name="m", calibration=told, device="cpu")
    return Artifact(out)


@pytest.fixture(scope="module", params=sorted(ARCHES))
def made(request, tiny, tmp_path_factory) -> tuple[Artifact, Checkpoint, Reference]:
    source = tiny(request.param)
    artifact = quantized(source, tmp_path_factory.mktemp(request.param) / "artifact")
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:2], source)
    return artifact, Checkpoint(source), reference


def test_every_linear_of_the_decoder_and_nothing_else_is_quantized(made):
    artifact, checkpoint, _ = made
    assert artifact.linear_names() == checkpoint.architecture.linears
    for q in artifact.linears():
        weight = checkpoint.tensor(f"{q.name}.weight").float()
        # What 3 bits make of Gaussian weights.
        assert float((q.decode() - weight).norm() / weight.norm()) < 0.35
        assert not artifact.records[q.name].metrics["fallback"]
    taken = {f"{q.name}.{part}" for q in artifact.linears() for part in ("weight", "bias")}
    assert set(artifact.float_names()) == set(checkpoint.tensors) - taken


def test_solving_beats_rounding_on_what_the_layer_sees(made):
    """The relative errors are those of solved linears, also where DeepStack changed the inputs."""
    artifact, _, _ = made
    errors = [r.metrics["relative_error"] for r in artifact.manifest.modules]
    assert all(0 < e < 1 for e in errors)
    assert float(np.mean(errors)) < 0.3


@torch.no_grad()
def test_the_reference_is_the_model_with_decoded_weights(made):
    artifact, checkpoint, reference = made
    model = load_model(checkpoint, torch.device("cpu"))
    family = checkpoint.architecture.family
    separate(model)
    for q in artifact.linears():
        module = model.get_submodule(family.module_name(q.name))
        module.weight.copy_(q.decode())
        if q.bias is not None:
            module.bias.copy_(q.bias)
    for prompt in reference.prompts:
        logits = model(**prompt.model_inputs(), use_cache=False).logits[0]
        # The model also computes logits for the padding rows of the embedding.
        assert np.array_equal(reference.logits(prompt), logits[:, : reference.vocabulary].numpy())
        first = int(logits[-1].argmax())
        assert reference.answer(prompt)[:1] == ([] if first in reference.stop_ids else [first])


@torch.no_grad()
def test_features_and_positions_are_those_of_the_models_own_pass(made):
    """The parts that the reference gives to ONNX Runtime and llama.cpp are the model's own.

    Put together by hand, they give the model's logits.
    """
    _, checkpoint, reference = made
    prompt = reference.prompts[0]
    model = reference.model
    embeds = model.get_input_embeddings()(prompt.input_ids[None]).clone()
    embeds[0, prompt.vision] = torch.from_numpy(reference.vision_features(prompt))
    kwargs = {}
    if added := checkpoint.architecture.family.added:
        features = [torch.from_numpy(f) for f in reference.added_features(prompt)]
        assert len(features) == 2
        assert features[0].shape == (int(prompt.vision.sum()), embeds.shape[-1])
        kwargs = dict(zip(added, (prompt.vision[None], features), strict=True))
    else:
        assert reference.added_features(prompt) == []
    positions = torch.from_numpy(reference.position_ids(prompt))
    decoder = model.get_decoder()
    if prompt.marks:  # the model makes masks of it, and its decoder takes masks alone
        kwargs, decoder = {prompt.marks: prompt.vision[None].long()}, model.model
    hidden = decoder(inputs_embeds=embeds, position_ids=positions, use_cache=False, **kwargs)
    logits = model.lm_head(hidden.last_hidden_state)[0, :, : reference.vocabulary].numpy()
    want = reference.logits(prompt)
    assert np.linalg.norm(logits - want) / np.linalg.norm(want) < 1e-6


def test_gptq_holds_every_weight(made, tmp_path):
    artifact, checkpoint, reference = made
    lacking = checkpoint.model_type in ("llava_onevision", "idefics3")
    for names in ("hub", "module"):
        if lacking and names == "module":
            with pytest.raises(FormatError, match=f"no class for {checkpoint.model_type}"):
                FORMATS["gptq"].write(artifact, tmp_path, FormatOptions(gptq_names=names))
            continue
        folder = tmp_path / names
        folder.mkdir()
        notes = FORMATS["gptq"].write(artifact, folder, FormatOptions(gptq_names=names))
        needs = "has no class" if lacking else "--gptq-names module"
        told = any("not load in GPTQModel.load: " in note and needs in note for note in notes)
        # Of names, in both places.
        one_kind = checkpoint.model_type in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "smolvlm")
        assert told == (names == "hub" and not one_kind)
        row = own_decoder(GptqFolder(folder), reference)
        assert row.status == "passed", row
        assert row.compared == reference.weights.count, row


def test_a_changed_norm_is_caught(made, tmp_path):
    """The last bit of one gain of the norm behind or before the last linears of a layer."""
    artifact, checkpoint, reference = made
    FORMATS["gptq"].write(artifact, tmp_path, FormatOptions())
    *_, last = checkpoint.architecture.blocks(1)
    name = f"{checkpoint.architecture.family.layers}1.{last.post or last.norm}.weight"
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(torch.int16)[7] ^= 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    row = own_decoder(GptqFolder(tmp_path), reference)
    assert row.status == "failed" and name in row.worst, row


@pytest.mark.parametrize("arch", ["llava_onevision", "internvl", "qwen3_vl"])
def test_both_generations_of_files_give_the_same_integers(arch, tiny, tmp_path, one_thread):
    ours = quantized(tiny(arch), tmp_path / "hub")
    theirs = quantized(tiny(arch, generation="modules"), tmp_path / "modules")
    for file in sorted(p.name for p in ours.path.glob("*.safetensors")):
        assert (ours.path / file).read_bytes() == (theirs.path / file).read_bytes()
    sources = (ours, tiny(arch)), (theirs, tiny(arch, generation="modules"))
    rows = read_rows(bundled.HELDOUT)[:1]
    references = [Reference(artifact.path, rows, source) for artifact, source in sources]
    assert np.array_equal(*(r.logits(r.prompts[0]) for r in references))
