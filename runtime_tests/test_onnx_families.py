"""Qwen3-VL, LLaVA-OneVision, InternVL3, SmolVLM and Gemma 3 in ONNX Runtime.

The models are small and random. The second reference VLM is a trained LLaVA-OneVision.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from runtime_tests.test_onnx import assert_all_pass, export, run_check, two_images
from runtime_tests.test_onnx_floats import (
    assert_no_float_is_wider_than_in_the_source,
    assert_numbers_are_those_of_float32_constants,
)
from tests.artifacts import GRIDS
from tools.reference_vlm import onevision
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.onnx import write as writer
from vlmq_export.formats.onnx.genai_config import write_genai
from vlmq_export.formats.onnx.graphs.build import float_graphs
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE
from vlmq_export.formats.proof.checks import CheckSettings, relative_error
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig

SETTINGS = CheckSettings(images=2, questions=2, threads=1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


FAMILIES = ("qwen3_vl", "llava_onevision", "internvl", "idefics3", "smolvlm", "gemma3")
# test_onnx_mistral.py, test_onnx_experts.py and test_onnx_recurrent.py have more.
FAMILIES += (slow("ministral3"), slow("qwen3_vl_moe"), slow("qwen3_5"))
DECODERS = ("internvl3_5",)  # other decoders of these families, in the tests of the whole graphs
# Those whose queries are normed or grow before they are rotated.
QUERIES_CHANGE = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "internvl3_5", "gemma3", "ministral3")
SECOND = "second"  # in the place of a family: the second reference VLM


@pytest.fixture(scope="module", autouse=True)
def traced_once():
    """Trace each model once, and copy its graphs for every export.

    Tracing takes most of the time of an export, and does not depend on the grid.
    """
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
            folder, source = tmp_path_factory.mktemp(f"{arch}-{tag}"), onevision.FOLDER
            if arch != SECOND:
                source = make_tiny(folder / "model", arch, **options)
            made[key] = export(folder, GRIDS[tag], source, FormatOptions(onnx_graph=graph), rows=4)
        return made[key]

    return get


# What these have in common with SmolVLM2 and InternVL3.5 is run there; the rest, in the slow tests.
LIKE_OTHERS = ("idefics3", "internvl")


@pytest.mark.parametrize(
    "arch",
    [slow(a) if a in LIKE_OTHERS else a for a in (*FAMILIES, *DECODERS)],
)
@pytest.mark.parametrize(
    "tag", ["w3g128", "w4g128-dynamic", *(slow(t) for t in ("w2g128", "w4g128", "w8g128", "w4"))]
)
def test_every_grid_passes_every_gate(exported, arch, tag):
    assert_all_pass(run_check(*exported(arch, tag), settings=SETTINGS))


GRIDS_OF_SECOND = [(bits, group) for bits in (2, 3, 4, 8) for group in (32, 128, -1)]


@pytest.mark.parametrize(
    ("bits", "group"),
    [slow(*grid) for grid in GRIDS_OF_SECOND],
)
def test_every_width_and_group_of_the_second_reference_passes_every_gate(bits, group, tmp_path):
    config = QuantConfig("rtn", bits, group, symmetric=bits == 8)
    reference, folder = export(tmp_path, config, onevision.FOLDER, rows=4)
    assert_all_pass(run_check(reference, folder, settings=SETTINGS))


@pytest.mark.parametrize("arch", [*FAMILIES, *DECODERS])
def test_the_standard_operators_pass_every_gate(exported, arch):
    reference, folder = exported(arch, graph="plain")
    options = FormatOptions(onnx_graph="plain")
    assert_all_pass(run_check(reference, folder, options, SETTINGS, images=1))
    text = onnx.load(folder / "text.onnx", load_external_data=False)
    spelled_out = {function.name for function in text.functions}
    assert {n.op_type for n in text.graph.node if n.domain} == {"MatMulNBits", *spelled_out}


@pytest.mark.parametrize("arch", [*FAMILIES, *DECODERS, slow(SECOND)])
def test_one_prompt_at_a_time_passes_every_gate(exported, arch):
    """GroupQueryAttention rotates queries and keys itself, for Qwen3-VL by three axes of positions.

    Query, key and value are one product, except in QUERIES_CHANGE.
    """
    reference, folder = exported(arch, graph="single")
    options = FormatOptions(onnx_graph="single")
    assert_all_pass(run_check(reference, folder, options, SETTINGS, images=1))
    nodes = onnx.load(folder / "text.onnx", load_external_data=False).graph.node
    attentions = [n for n in nodes if n.op_type == "GroupQueryAttention"]
    one_product = arch not in QUERIES_CHANGE
    assert {tuple(n.input[1:3]) == ("", "") for n in attentions} == {one_product}


@pytest.mark.parametrize("arch", FAMILIES)
def test_level_4_has_a_gate_of_its_own(exported, tmp_path, arch):
    reference, _ = exported(arch)
    options = FormatOptions(onnx_accuracy_level=4)
    FORMATS["onnx"].write(Artifact(reference.artifact), tmp_path, options)
    rows = run_check(reference, tmp_path, options, SETTINGS, images=1)
    assert_all_pass(rows)
    kernel = next(c for c in rows if c.name == "logits at accuracy_level 4")
    # inputs rounded to 8 bits cost at least this much: the level was really used
    assert 1e-4 < kernel.value <= kernel.gate


@pytest.mark.parametrize(
    ("arch", "generation"),
    [
        slow("qwen3_vl", "hub"),
        slow("llava_onevision", "modules"),
        slow("idefics3", "hub"),
        slow("smolvlm", "modules"),
        slow("gemma3", "modules"),
    ],
)
def test_a_tied_head_and_names_of_transformers_5(exported, arch, generation):
    reference, folder = exported(arch, tied=True, generation=generation)
    assert_all_pass(run_check(reference, folder, settings=SETTINGS, images=1))


@pytest.mark.parametrize("arch", [*FAMILIES, SECOND])
def test_two_images_in_one_prompt(exported, arch):
    reference, folder = exported(arch)
    prompt = two_images(reference)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_prompt_without_an_image(exported, arch):
    reference, folder = exported(arch)
    turn = {"role": "user", "content": [{"type": "text", "text": "Read."}]}
    row = replace(reference.rows[0], id="words", images=(), messages=(turn,))
    prompt = reference.preprocessor.sample(row, prompt_only=True)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE


@pytest.mark.parametrize("arch", FAMILIES)
def test_an_image_token_without_an_image_is_a_word_and_too_few_features_an_error(exported, arch):
    """A model may generate its image token, and transformers then embeds it as a word."""
    reference, folder = exported(arch)
    runner, token = OnnxRunner(folder), reference.preprocessor.image_token_id
    words = reference.model.get_input_embeddings()
    ids = np.array([[5, token], [token, 7]])
    want = words(torch.from_numpy(ids)).detach().numpy()
    got = runner.embed(ids)
    assert np.array_equal(got[..., : want.shape[-1]], want) and not got[..., want.shape[-1] :].any()
    marks = arch == "gemma3"  # the last column of an embedding, and of no feature
    with pytest.raises(Exception, match=r"(?i)index"):
        runner.embed(ids, np.zeros((1, got.shape[-1] - marks), np.float32))


@pytest.mark.parametrize("graph", ["plain", "fused"])
@pytest.mark.parametrize("arch", [*FAMILIES, SECOND])
def test_a_left_padded_batch_and_its_next_token(exported, arch, graph):
    """Two prompts of unequal length in one batch, and then one more token of each by the cache."""
    reference, folder = exported(arch, graph=graph)
    row = reference.rows[0]
    more_words = {"type": "text", "text": " Read the text, all of it."}
    turn = {"role": "user", "content": [*row.messages[0]["content"], more_words]}
    longer = replace(row, id="longer", messages=(turn,))
    prompts = [reference.preprocessor.sample(r, prompt_only=True) for r in (row, longer)]
    runner, length = OnnxRunner(folder), max(len(p.input_ids) for p in prompts)
    pads = [length - len(p.input_ids) for p in prompts]
    assert pads[0] > 0 == pads[1]
    ids = np.stack([np.pad(p.input_ids.numpy(), (pad, 0)) for p, pad in zip(prompts, pads)])
    embeds = runner.embed(ids, np.concatenate([runner.prompt_features(p) for p in prompts]))
    mask = np.stack([np.arange(length) >= pad for pad in pads]).astype(np.int64)
    each = [reference.position_ids(p) for p in prompts]
    padded = [np.pad(p, [(0, 0)] * (p.ndim - 1) + [(pad, 0)]) for p, pad in zip(each, pads)]
    positions = np.concatenate(padded, axis=-2)
    logits, cache = runner.step(embeds, mask, positions, None)
    for got, p, pad in zip(logits, prompts, pads):
        assert relative_error(got[pad:, : reference.vocabulary], reference.logits(p)) <= FORMAT_GATE
    token = 100
    mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
    after = np.stack([p.max() + 1 for p in each])
    at = np.broadcast_to(after[:, None], (*positions.shape[:-1], 1)).astype(np.int64)
    more, _ = runner.step(runner.embed(np.full((2, 1), token)), mask, at, cache)
    for got, p in zip(more, prompts):
        ids = torch.cat([p.input_ids, torch.tensor([token])])
        vision = torch.cat([p.vision, torch.tensor([False])])
        extended = replace(p, id=f"{p.id}+1", input_ids=ids, vision=vision)
        want = reference.logits(extended)[-1]
        assert relative_error(got[0, : reference.vocabulary], want) <= FORMAT_GATE


def test_qwen3_vl_images_of_unequal_size_in_one_run(exported):
    """The graph computes the rows, frames and learned positions of each image."""
    reference, folder = exported("qwen3_vl")
    grid = torch.tensor([[1, 6, 10], [1, 2, 2], [3, 4, 8]])
    pixels = torch.randn(int(grid.prod(1).sum()), 1536, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = reference.model.model.get_image_features(pixels, grid)
    parts = (out.pooler_output, *out.deepstack_features)
    want = torch.cat([torch.cat(list(part)) for part in parts], dim=-1)
    got = OnnxRunner(folder).features(pixels.numpy(), grid.numpy())
    assert relative_error(got, want.numpy()) <= FORMAT_GATE


def test_internvl_tiles_of_an_image(exported):
    reference, folder = exported("internvl")
    pixels = torch.randn(5, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = reference.model.model.get_image_features(pixels).pooler_output.flatten(0, 1).numpy()
    assert relative_error(OnnxRunner(folder).features(pixels.numpy()), want) <= FORMAT_GATE


def test_smolvlm_tiles_of_two_prompts(exported):
    """The order of the tiles is all that counts, as the processor stacks them and as we do."""
    reference, folder = exported("idefics3")
    pixels = torch.randn(2, 5, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        parts = reference.model.model.get_image_features(pixels).pooler_output
    want, runner = torch.cat(list(parts)).numpy(), OnnxRunner(folder)
    assert relative_error(runner.features(pixels.numpy()), want) <= FORMAT_GATE
    one_by_one = pixels.flatten(0, 1)[:, None].numpy()
    assert relative_error(runner.features(one_by_one), want) <= FORMAT_GATE


# Images cut into tiles of 104 pixels, with 7 × 7 patches each. Some keep all features of their
# tiles. Those of more than nine tiles lose some: for 520 × 520 this computes 35 // 1.666…, whose
# quotient rounds up to a whole number. Others have a single column, or odd sides.
SIZES = [
    (104, 104), (208, 208), (300, 400), (416, 416), (520, 520), (624, 624),
    (37, 1000), (900, 50), (333, 517), (611, 97),
]  # fmt: skip


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
    site_packages = str(Path(torch.__file__).parent.parent).encode()
    for name in ("vision", "embedding", "text"):
        onnx.checker.check_model(folder / f"{name}.onnx")
        # stack traces of the export would name paths of this machine
        assert site_packages not in (folder / f"{name}.onnx").read_bytes()
    text = onnx.load(folder / "text.onnx", load_external_data=False).graph
    dims = {i.name: i.type.tensor_type.shape.dim for i in text.input}
    lengths = {name: [d.dim_param or d.dim_value for d in each] for name, each in dims.items()}
    others = {"gemma3": (2, 128), "ministral3": (2, 128), "qwen3_5": (1, 256)}
    heads, size = others.get(arch, (2, 64))
    assert lengths["inputs_embeds"][:2] == ["batch", "sequence"]
    assert lengths["past_key_values.1.value"] == ["batch", heads, "past_sequence", size]


@pytest.mark.parametrize("arch", FAMILIES)
def test_the_plan_tells_the_size_before(exported, arch):
    reference, folder = exported(arch)
    plan = FORMATS["onnx"].plan(artifact_plan(Artifact(reference.artifact)), FormatOptions())
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert plan.refusals == [] and plan.size_bytes == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize("arch", FAMILIES)
def test_floats_take_the_bytes_of_the_source_and_no_number_changes(exported, tmp_path, arch):
    reference, folder = exported(arch)
    assert_no_float_is_wider_than_in_the_source(reference, folder)
    assert_numbers_are_those_of_float32_constants(reference, folder, tmp_path)


@pytest.mark.parametrize("arch", ["internvl", "internvl3_5", "idefics3"])
def test_a_changed_frequency_is_caught(exported, tmp_path, arch):
    reference, folder = exported(arch)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "text.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "text.rotary.inv_freq")
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[7] = np.nextafter(values[7], np.float32(1))
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    (tmp_path / "text.onnx").write_bytes(model.SerializeToString())
    rows = run_check(reference, tmp_path, settings=SETTINGS, images=1)
    assert [c.worst for c in rows if c.status == "failed"] == ["text.rotary.inv_freq"]


def test_a_changed_connector_of_smolvlm_is_caught(exported, tmp_path):
    """One bit of the matrix behind the pixel shuffle, which the wrong reader might not look at."""
    reference, folder = exported("smolvlm")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = onnx.load(tmp_path / "vision.onnx", load_external_data=False)
    name = "model.connector.modality_projection.proj.weight"
    tensor = next(t for t in model.graph.initializer if t.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    with (tmp_path / where["location"]).open("r+b") as data:
        data.seek(int(where["offset"]) + 2 * 77)
        byte = data.read(1)[0]
        data.seek(-1, 1)
        data.write(bytes([byte ^ 1]))
    rows = run_check(reference, tmp_path, settings=SETTINGS, images=1)
    assert {c.worst.split(" ")[0] for c in rows if c.status == "failed"} == {name}


def test_genai_answers_about_images_as_qwen3_vl(exported, tmp_path, genai):
    """onnxruntime-genai 0.18 does not know DeepStack: its features are part of inputs_embeds."""
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


@pytest.mark.parametrize("arch", ["llava_onevision", "internvl", "idefics3", "smolvlm", "gemma3"])
def test_what_genai_does_not_run_is_said_and_not_half_written(exported, arch, tmp_path):
    reference, folder = exported(arch)
    assert not (folder / "genai_config.json").exists()
    (note,) = write_genai(Artifact(reference.artifact), tmp_path, FormatOptions())
    # onnxruntime-genai knows Gemma 3, and gives each of its images 256 tokens. This one has 16.
    assert (arch if arch != "gemma3" else "of which this model has 16") in note
    assert not list(tmp_path.iterdir())
