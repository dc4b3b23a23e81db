"""Qwen3-VL, LLaVA-OneVision (random, and the trained second reference) and InternVL3 in plain ONNX Runtime."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from tests.artifacts import GRIDS, rtn_artifact
from tools.reference_vlm import onevision
from tools.reference_vlm.families import make_tiny
from vlmq_export.bundled import HELDOUT
from vlmq_export.formats import onnx as onnx_format
from vlmq_export.formats.base import CheckSettings, FormatOptions, relative_error
from vlmq_export.formats.onnx import writer
from vlmq_export.formats.onnx.checks import FORMAT_GATE
from vlmq_export.formats.onnx.genai import write_genai
from vlmq_export.formats.onnx.graphs import float_graphs
from vlmq_export.formats.onnx.runner import OnnxRunner
from vlmq_export.plan import artifact_plan
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import read_rows
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.reference import Reference

SETTINGS = CheckSettings(images=2, questions=2, threads=1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


FAMILIES = ("qwen3_vl", "llava_onevision", "internvl")
SECOND = "second"  # the trained reference of LLaVA-OneVision's architecture


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Tracing takes most of the time and knows nothing of bits: one graph a model, copied for each writing."""
    made = {}

    def cached(source, known, dtype):
        key = (source / "config.json").read_text(), dtype
        if key not in made:
            made[key] = float_graphs(source, known, dtype)
        return {name: model.clone() for name, model in made[key].items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "float_graphs", cached)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(family, grid) → (reference, folder), made once."""
    made = {}

    def get(arch, tag="w4g128", graph="fused", **options):
        key = (arch, tag, graph, *options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{arch}-{tag}")
            source = onevision.FOLDER if arch == SECOND else make_tiny(folder / "model", arch, **options)
            artifact = rtn_artifact(folder / "artifact", GRIDS[tag], source)
            (folder / "onnx").mkdir()
            onnx_format.write(artifact, folder / "onnx", FormatOptions(onnx_graph=graph))
            made[key] = Reference(artifact.path, read_rows(HELDOUT)[:4]), folder / "onnx"
        return made[key]

    return get


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize("tag", ["w3g128", "w4g128-dynamic", *(slow(t) for t in ("w2g128", "w4g128", "w8g128", "w4"))])
def test_every_grid_passes_every_gate(exported, arch, tag):
    reference, folder = exported(arch, tag)
    rows = onnx_format.check(folder, reference, FormatOptions(), SETTINGS)
    wrong = [c for c in rows if c.status not in ("passed", "info")]
    assert not wrong, wrong
    assert {c.level for c in rows if c.status == "passed"} == {"L1", "L2", "L3"}


@pytest.mark.parametrize(
    ("bits", "group"), [(3, 128), *(slow(b, g) for b in (2, 3, 4, 8) for g in (32, 128, -1) if (b, g) != (3, 128))]
)
def test_every_width_and_group_of_the_second_reference_passes_every_gate(bits, group, tmp_path):
    artifact = rtn_artifact(
        tmp_path / "artifact", QuantConfig("rtn", bits, group, symmetric=bits == 8), onevision.FOLDER
    )
    (tmp_path / "onnx").mkdir()
    onnx_format.write(artifact, tmp_path / "onnx", FormatOptions())
    rows = onnx_format.check(
        tmp_path / "onnx", Reference(artifact.path, read_rows(HELDOUT)[:4]), FormatOptions(), SETTINGS
    )
    assert not [c for c in rows if c.status not in ("passed", "info")], rows
    assert {c.level for c in rows if c.status == "passed"} == {"L1", "L2", "L3"}


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_standard_operators_pass_every_gate(exported, arch):
    reference, folder = exported(arch, graph="plain")
    rows = onnx_format.check(folder, reference, FormatOptions(onnx_graph="plain"), replace(SETTINGS, images=1))
    assert not [c for c in rows if c.status not in ("passed", "info")], rows
    nodes = onnx.load(folder / "text.onnx", load_external_data=False).graph.node
    assert {n.op_type for n in nodes if n.domain} == {"MatMulNBits"}


@pytest.mark.parametrize("arch", [*FAMILIES, SECOND])
def test_one_prompt_at_a_time_passes_every_gate(exported, arch):
    """GroupQueryAttention rotates: by one axis of positions, or by Qwen3-VL's three, woven into one table of angles."""
    reference, folder = exported(arch, graph="single")
    rows = onnx_format.check(folder, reference, FormatOptions(onnx_graph="single"), replace(SETTINGS, images=1))
    assert not [c for c in rows if c.status not in ("passed", "info")], rows
    nodes = onnx.load(folder / "text.onnx", load_external_data=False).graph.node
    (packed,) = {tuple(n.input[1:3]) == ("", "") for n in nodes if n.op_type == "GroupQueryAttention"}
    assert packed == (arch != "qwen3_vl")  # whose query and key are normed before


@pytest.mark.parametrize("arch", FAMILIES)
def test_level_4_has_a_gate_of_its_own(exported, tmp_path, arch):
    reference, _ = exported(arch)
    options = FormatOptions(onnx_accuracy_level=4)
    onnx_format.write(Artifact(reference.artifact), tmp_path, options)
    rows = onnx_format.check(tmp_path, reference, options, replace(SETTINGS, images=1))
    assert not [c for c in rows if c.status not in ("passed", "info")], rows
    kernel = next(c for c in rows if c.name == "logits at accuracy_level 4")
    assert 1e-4 < kernel.value <= kernel.gate  # the level was really used


@pytest.mark.parametrize(("arch", "generation"), [slow("qwen3_vl", "hub"), slow("llava_onevision", "modules")])
def test_a_tied_head_and_names_of_transformers_5(exported, arch, generation):
    reference, folder = exported(arch, tied=True, generation=generation)
    rows = onnx_format.check(folder, reference, FormatOptions(), replace(SETTINGS, images=1))
    assert not [c for c in rows if c.status not in ("passed", "info")], rows


def two_images(reference):
    """A prompt with the images of two rows, words between them."""
    one, two = reference.rows[0], reference.rows[2]
    both = replace(one, id="two", images=one.images + two.images, messages=({
        "role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read the text. "}, *two.messages[0]["content"]],
    },))  # fmt: skip
    return reference.preprocessor.sample(both, prompt_only=True)


@pytest.mark.parametrize("arch", [*FAMILIES, SECOND])
def test_two_images_in_one_prompt(exported, arch):
    reference, folder = exported(arch)
    prompt = two_images(reference)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_prompt_without_an_image(exported, arch):
    reference, folder = exported(arch)
    row = replace(
        reference.rows[0],
        id="words",
        images=(),
        messages=({"role": "user", "content": [{"type": "text", "text": "Read."}]},),
    )
    prompt = reference.preprocessor.sample(row, prompt_only=True)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE


@pytest.mark.parametrize("arch", FAMILIES)
def test_an_image_token_without_an_image_is_a_word_and_too_few_features_an_error(exported, arch):
    """A model may generate its image token: transformers then feeds the word, and a decoding loop must not stop."""
    reference, folder = exported(arch)
    runner, token = OnnxRunner(folder), reference.preprocessor.image_token_id
    words = reference.model.get_input_embeddings()
    ids = np.array([[5, token], [token, 7]])
    want = words(torch.from_numpy(ids)).detach().numpy()
    got = runner.embed(ids)
    assert np.array_equal(got[..., : want.shape[-1]], want) and not got[..., want.shape[-1] :].any()
    with pytest.raises(Exception, match=r"(?i)index"):
        runner.embed(ids, np.zeros((1, got.shape[-1]), np.float32))


@pytest.mark.parametrize("graph", ["plain", "fused"])
@pytest.mark.parametrize("arch", [*FAMILIES, SECOND])
def test_a_left_padded_batch_and_its_next_token(exported, arch, graph):
    """Two prompts of unequal length through one embedding and one text run, then one more token a row by the cache."""
    reference, folder = exported(arch, graph=graph)
    row = reference.rows[0]
    longer = replace(row, id="longer", messages=({
        "role": "user", "content": [*row.messages[0]["content"], {"type": "text", "text": " Read the text, all of it."}],
    },))  # fmt: skip
    prompts = [reference.preprocessor.sample(r, prompt_only=True) for r in (row, longer)]
    runner, length = OnnxRunner(folder), max(len(p.input_ids) for p in prompts)
    pads = [length - len(p.input_ids) for p in prompts]
    assert pads[0] > 0 == pads[1]
    ids = np.stack([np.pad(p.input_ids.numpy(), (pad, 0)) for p, pad in zip(prompts, pads)])
    embeds = runner.embed(ids, np.concatenate([runner.prompt_features(p) for p in prompts]))
    mask = np.stack([np.arange(length) >= pad for pad in pads]).astype(np.int64)
    each = [reference.position_ids(p) for p in prompts]
    positions = np.concatenate([np.pad(p, [(0, 0)] * (p.ndim - 1) + [(pad, 0)]) for p, pad in zip(each, pads)], axis=-2)
    logits, cache = runner.step(embeds, mask, positions, None)
    token = 100
    for got, p, pad in zip(logits, prompts, pads):
        assert relative_error(got[pad:, : reference.vocabulary], reference.logits(p)) <= FORMAT_GATE
    after = np.stack([p.reshape(-1, p.shape[-1]).max(axis=(0, 1)) + 1 for p in each])
    at = np.broadcast_to(after[:, None], (*positions.shape[:-1], 1)).astype(np.int64)
    more, _ = runner.step(
        runner.embed(np.full((2, 1), token)), np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1), at, cache
    )
    for got, p in zip(more, prompts):
        ids = torch.cat([p.input_ids, torch.tensor([token])])
        extended = replace(p, id=f"{p.id}+1", input_ids=ids, vision=torch.cat([p.vision, torch.tensor([False])]))
        want = reference.logits(extended)[-1]
        assert relative_error(got[0, : reference.vocabulary], want) <= FORMAT_GATE


def test_qwen3_vl_images_of_unequal_size_in_one_run(exported):
    """Every image's rows, frames and learned positions are counted in the graph."""
    reference, folder = exported("qwen3_vl")
    grid = torch.tensor([[1, 6, 10], [1, 2, 2], [3, 4, 8]])
    pixels = torch.randn(int(grid.prod(1).sum()), 1536, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = reference.model.model.get_image_features(pixels, grid)
    want = torch.cat([torch.cat(list(f)) for f in (out.pooler_output, *out.deepstack_features)], dim=-1)
    got = OnnxRunner(folder).features(pixels.numpy(), grid.numpy())
    assert relative_error(got, want.numpy()) <= FORMAT_GATE


def test_internvl_tiles_of_an_image(exported):
    reference, folder = exported("internvl")
    pixels = torch.randn(5, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = reference.model.model.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()
    assert relative_error(OnnxRunner(folder).features(pixels.numpy()), want) <= FORMAT_GATE


# Tiles of 104 with 7 × 7 patches: within nine tiles' worth, beyond them (made smaller), where a quotient rounds up to a
# whole number (520 × 520: 35 // 1.666…), one column, and odd ones.
SIZES = [
    (104, 104),
    (208, 208),
    (300, 400),
    (416, 416),
    (520, 520),
    (624, 624),
    (37, 1000),
    (900, 50),
    (333, 517),
    (611, 97),
]


def test_llava_onevision_cuts_an_image_into_tiles(exported):
    reference, folder = exported("llava_onevision")
    runner, config = OnnxRunner(folder), reference.model.config
    draw = torch.Generator().manual_seed(0)
    for size in SIZES:
        tiles = image_size_to_num_patches(list(size), config.image_grid_pinpoints, 104)
        pixels, sizes = torch.randn(1, tiles, 3, 104, 104, generator=draw), torch.tensor([size])
        with torch.no_grad():
            want = reference.model.model.get_image_features(pixels, sizes).pooler_output[0].numpy()
        got = runner.features(pixels.numpy(), sizes.numpy())
        assert got.shape == want.shape, size
        assert relative_error(got, want) <= FORMAT_GATE, size


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_graphs_are_valid_and_their_lengths_free(exported, arch):
    _, folder = exported(arch)
    for name in ("vision", "embedding", "text"):
        onnx.checker.check_model(folder / f"{name}.onnx")
        assert str(Path(torch.__file__).parent.parent).encode() not in (folder / f"{name}.onnx").read_bytes()
    text = onnx.load(folder / "text.onnx", load_external_data=False).graph
    lengths = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in text.input}
    assert lengths["inputs_embeds"][:2] == ["batch", "sequence"]
    assert lengths["past_key_values.1.value"] == ["batch", 2, "past_sequence", 64]


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_plan_tells_the_size_before(exported, arch):
    reference, folder = exported(arch)
    plan = onnx_format.plan(artifact_plan(Artifact(reference.artifact)), FormatOptions())
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert plan.refusals == [] and plan.size_bytes == pytest.approx(size, rel=0.05)


def test_a_changed_frequency_is_caught(exported, tmp_path):
    reference, folder = exported("internvl")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "text.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "text.rotary.inv_freq")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[7] = np.nextafter(values[7], np.float32(1))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (tmp_path / "text.onnx").write_bytes(model.SerializeToString())
    rows = onnx_format.check(tmp_path, reference, FormatOptions(), replace(SETTINGS, images=1))
    assert [c.worst for c in rows if c.status == "failed"] == ["text.rotary.inv_freq"]


def test_genai_answers_about_images_as_qwen3_vl(exported, tmp_path, genai):
    """onnxruntime-genai 0.18 knows nothing of deepstack: the features come to the decoder inside inputs_embeds."""
    reference, folder = exported("qwen3_vl")
    model = genai.Model(str(folder))
    processor = model.create_multimodal_processor()
    for prompt in [*reference.prompts, two_images(reference)]:
        files = [str(tmp_path / f"{prompt.id}-{i}.png") for i in range(len(prompt.images))]
        for image, file in zip(prompt.images, files):
            image.save(file)
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=1024, do_sample=False)
        generator = genai.Generator(model, params)
        generator.set_inputs(processor(prompt.text, images=genai.Images.open(*files)))
        answer = []
        while not generator.is_done() and len(answer) < 8:
            generator.generate_next_token()
            answer.append(int(generator.get_next_tokens()[0]))
            if answer[-1] in reference.stop_ids:
                answer.pop()
                break
        assert answer == reference.answer(prompt)[:8], prompt.id


@pytest.mark.parametrize("arch", ["llava_onevision", "internvl"])
def test_what_genai_does_not_know_is_said_and_not_half_written(exported, arch, tmp_path):
    reference, folder = exported(arch)
    assert not (folder / "genai_config.json").exists()
    (note,) = write_genai(Artifact(reference.artifact), tmp_path, FormatOptions())
    assert arch in note and not list(tmp_path.iterdir())
