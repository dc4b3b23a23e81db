"""Each family, with its published config scaled down.

Names of tensors, images and prompts, the walk over the layers, and importance.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.jobs import job_for
from tests.oracle import block_gradients
from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export import bundled
from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.calibration.batches import _equal_lengths, decoder_inputs
from vlmq_export.quantizer.calibration.importance import output_gradients
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.calibration.sub_blocks import passed
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.experts import separate
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.image_rules import Tile
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, read_rows
from vlmq_export.quantizer.samples.sample import truncate

CPU = torch.device("cpu")
NEW = ("llava_onevision", "internvl", "qwen3_vl")
ROWS = 4


class Loaded:
    """A tiny checkpoint of one family, its model, and a few samples."""

    def __init__(self, folder):
        self.folder = folder
        self.checkpoint = Checkpoint(folder)
        self.family = self.checkpoint.architecture.family
        self.preprocessor = Preprocessor(folder)
        self.model = load_model(self.checkpoint, CPU)
        separate(self.model)  # experts, if it has any
        layers = self.family.module_name(self.family.layers).rstrip(".")
        self.layers = list(self.model.get_submodule(layers))
        rows = read_rows(bundled.CALIBRATION)[:ROWS]
        self.samples = [self.preprocessor.sample(row) for row in rows]

    def blocks(self, layer: int):
        """The chain that a layer is."""
        return self.checkpoint.architecture.blocks(layer)

    def kinds(self):
        """The first layers up to one of each kind, each with its chain."""
        found = [self.blocks(i) for i in range(len(self.layers))]
        last = max(found.index(chain) for chain in found)
        return list(zip(self.layers[: last + 1], found))

    def walked(self):
        """The batches of these samples at the first decoder layer."""
        return decoder_inputs(
            self.model,
            self.samples,
            two_streams=True,
            device=CPU,
            added=self.family.added,
        )


@pytest.fixture(scope="module", params=sorted(ARCHES))
def loaded(request, tiny):
    return Loaded(tiny(request.param, tied=request.param == "qwen3_vl"))


def test_the_documented_table_is_that_of_the_entries():
    """docs/families.md is written by hand but for this table."""
    page = (Path(__file__).parents[3] / "docs" / "families.md").read_text("utf-8")
    table = page[page.index("| `model_type`") :].split("\n\n")[0]
    assert table.split("\n")[2:] == [family.row for family in FAMILIES.values()]


# --- names ----------------------------------------------------------------------------------------


def test_every_tensor_has_its_module_and_every_module_its_tensor(loaded):
    family, tensors = loaded.family, loaded.checkpoint.tensors
    parameters = {name for name, _ in loaded.model.named_parameters()}
    assert {family.module_name(n) for n in tensors} == parameters
    assert {family.hub_name(n) for n in parameters} == set(tensors)
    assert all(family.module_name(family.module_name(n)) == family.module_name(n) for n in tensors)
    text = (family.module_name(family.layers).removesuffix("layers."), "lm_head.")
    vision = {n for n in tensors if not family.module_name(n).startswith(text)}
    assert {n for n in tensors if family.is_vision(n)} == vision


def test_the_linears_are_all_linears_of_the_decoder_but_those_that_stay(loaded):
    for layer, blocks in loaded.kinds():
        modules = layer.named_modules()
        names = {name for name, module in modules if isinstance(module, torch.nn.Linear)}
        kept = {name for block in blocks for name in block.kept}
        assert kept < names or not kept
        assert {name for block in blocks for name in block.linears} == names - kept


def test_norms_feed_the_linears_that_the_entry_says_and_no_others(loaded):
    """A linear reads a norm where its input is that norm's very output."""
    batches = loaded.walked()
    for index, (layer, blocks) in enumerate(loaded.kinds()):
        # A router reads the norm of experts, and each of them is given some tokens.
        dense = [block for block in blocks if block.kind != "experts"]
        found = readers_of_norms(layer, dense, batches[0], index)
        assert {norm: {*names} for norm, names in found.items()} == {
            block.norm: {*block.readers} for block in dense
        }
        for block in dense:
            assert tuple(name for name in found[block.norm] if name in block.ins) == block.ins


def readers_of_norms(layer, blocks, batch, ahead: int) -> dict[str, list[str]]:
    """Norm → the linears that read it, in the order in which they run."""
    produced: dict[str, torch.Tensor] = {}
    readers: dict[str, list[str]] = {}  # norm, or "" → its linears

    def keep(norm):
        return lambda _module, _inputs, output: produced.update({norm: output})

    def look(name):
        def hook(_module, inputs):
            norm = next((k for k, v in produced.items() if v is inputs[0]), "")
            readers.setdefault(norm, []).append(name)

        return hook

    norms = [block.norm for block in blocks]
    hooks = [layer.get_submodule(name).register_forward_hook(keep(name)) for name in norms]
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            hooks.append(module.register_forward_pre_hook(look(name)))
    with torch.no_grad():
        layer(batch.quantized, **batch.kwargs_of(ahead))
    for hook in hooks:
        hook.remove()
    return {norm: names for norm, names in readers.items() if norm}


@pytest.mark.parametrize("arch", (*NEW, "gemma3", "idefics3", "smolvlm", "mistral3", "ministral3"))
def test_both_generations_of_files_are_one_checkpoint(arch, tiny):
    old, new = Checkpoint(tiny(arch)), Checkpoint(tiny(arch, generation="modules"))
    assert old.tensors.keys() == new.tensors.keys()
    for name in old.tensors:
        assert torch.equal(old.tensor(name), new.tensor(name))
    saved = load_file(tiny(arch, generation="modules") / "model.safetensors")
    assert all(n.startswith(("model.", "lm_head.")) for n in saved)


@pytest.mark.parametrize(
    "arch", ["llava_onevision", "internvl", "qwen2_5_vl", "idefics3", "gemma3", "mistral3"]
)
def test_what_transformers_saves_today_is_read_too(arch, tiny, tmp_path):
    kind = transformers.AutoModelForImageTextToText
    kind.from_pretrained(tiny(arch), dtype=torch.bfloat16).save_pretrained(tmp_path)
    ours, theirs = Checkpoint(tiny(arch)), Checkpoint(tmp_path)
    assert set(theirs.tensors) == set(ours.tensors)
    assert all(torch.equal(ours.tensor(n), theirs.tensor(n)) for n in ours.tensors)


def test_a_tensor_under_two_names_is_refused(tiny, tmp_path):
    source = tiny("internvl")
    tensors = load_file(source / "model.safetensors")
    norm = tensors["language_model.model.norm.weight"]
    tensors["model.language_model.norm.weight"] = norm.clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="under two names"):
        Checkpoint(tmp_path)


# --- images and prompts ---------------------------------------------------------------------------


def test_image_tokens_are_as_many_as_the_model_makes(loaded):
    for sample in loaded.samples:
        features = loaded.model.model.get_image_features(**sample.image_inputs()).pooler_output
        made, tokens = sum(f.numel() // f.shape[-1] for f in features), int(sample.vision.sum())
        assert made == tokens
        assert tokens >= 8 or loaded.family.images not in ("grid", "lines")


@pytest.mark.parametrize(
    ("vision", "more", "newline", "tokens"),
    [
        ({"image_size": 384, "patch_size": 14}, {}, 1, 730),
        ({"image_size": [448, 448], "patch_size": [14, 14]}, {"downsample_ratio": 0.5}, 0, 256),
    ],
    ids=["llava-onevision-qwen2-*-ov-hf", "InternVL3-*-hf"],
)
def test_tokens_of_a_tile_at_published_sizes(vision, more, newline, tokens):
    tile = Tile(None, {"vision_config": vision} | more, newline)
    assert tile.size((50, 900)) == tile.size((50, 900), most=9) == (tile.side, tile.side)
    assert tile.tokens(tile.size((50, 900))) == tokens


def test_several_images_and_none(loaded, tmp_path):
    first, second = tmp_path / "0.png", tmp_path / "1.png"
    for file, size in ((first, (300, 90)), (second, (64, 64))):
        Image.effect_noise(size, 80).convert("RGB").save(file)
    image = {"type": "image"}

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    def row_of(name: str, content: list[dict], *images) -> Row:
        return Row(name, ({"role": "user", "content": content},), images)

    two = row_of("two", [image, text("and"), image, text("?")], first, second)
    none = row_of("none", [text("Hello?")])
    for row in (two, none):
        sample = loaded.preprocessor.sample(row, prompt_only=True)
        with torch.no_grad():
            logits = loaded.model(**sample.model_inputs(), use_cache=False).logits
        assert logits.shape[1] == len(sample.input_ids)
        assert bool(torch.isfinite(logits).all())
        assert bool(sample.vision.any()) == bool(row.images)
    # The features of an image do not depend on another image beside it.
    alone = loaded.preprocessor.sample(row_of("one", [image], second), prompt_only=True)
    both = loaded.preprocessor.sample(two, prompt_only=True)
    with torch.no_grad():
        every = loaded.model.model.get_image_features(**both.image_inputs()).pooler_output
        own = loaded.model.model.get_image_features(**alone.image_inputs()).pooler_output
    last = every[-len(own) :]  # of an image that is cut, the features of each tile
    torch.testing.assert_close(torch.cat([*last]), torch.cat([*own]), rtol=1e-4, atol=1e-5)


def test_the_fitted_image_is_left_alone(loaded):
    """The model gets the fitted image's own pixels, scaled and normalised. None is resampled."""
    image = Image.effect_noise((333, 201), 90).convert("RGB")
    fitted = loaded.preprocessor.fit(image)
    assert loaded.preprocessor.fit(fitted) is fitted
    processor = loaded.preprocessor.image_processor
    encoded = loaded.preprocessor.images.encode([fitted], loaded.preprocessor.image_token)
    pixels = encoded.inputs["pixel_values"].double().numpy()
    want = (np.asarray(fitted, np.float64) / 255 - processor.image_mean) / processor.image_std
    if loaded.family.images != "grid":
        high, wide = pixels.shape[-2:]
        places = np.ndindex(fitted.height // high, fitted.width // wide)
        for tile, (row, column) in zip(pixels, places):
            part = want[row * high :, column * wide :][:high, :wide]
            np.testing.assert_allclose(
                tile.reshape(-1, high, wide).transpose(1, 2, 0), part, 0, 2e-6
            )
    else:  # the same values in the order of the patches, each for two time slices
        twice = np.sort(np.repeat(want.ravel(), 2))
        np.testing.assert_allclose(np.sort(pixels.ravel()), twice, atol=2e-6)


def test_prompts_are_what_the_hugging_face_processors_write(tiny):
    """Their own methods are called on stand-ins: to build the processors takes torchvision."""
    from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
    from transformers.models.internvl.processing_internvl import InternVLProcessor
    from transformers.models.llava_onevision import processing_llava_onevision as llava_onevision
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    if not hasattr(Qwen3VLProcessor, "replace_image_token"):
        pytest.skip("this transformers writes image tokens where no method can be called alone")
    row = read_rows(bundled.CALIBRATION)[0]
    for arch in (*NEW, "gemma3"):
        preprocessor = Preprocessor(tiny(arch))
        sample = preprocessor.sample(row)
        token = preprocessor.image_token
        given = sample.image_inputs()
        if arch == "internvl":
            me = SimpleNamespace(
                start_image_token="<img>",
                end_image_token="</img>",
                image_token=token,
                image_seq_length=16,
            )
            tiles = preprocessor.image_processor(
                images=[sample.images[0]], crop_to_patches=True, return_tensors="pt"
            )
            # The processor cuts images into tiles by default, and makes one tile of a fitted image.
            assert torch.equal(tiles["pixel_values"], sample.pixel_values)
            counts = {"num_patches": tiles["num_patches"].tolist()}
            written = InternVLProcessor.replace_image_token(me, counts, 0)
        elif arch == "llava_onevision":
            me = SimpleNamespace(
                num_image_tokens=49, image_token=token, vision_feature_select_strategy="full"
            )
            processor = llava_onevision.LlavaOnevisionProcessor
            written = processor.replace_image_token(me, given, 0)
        elif arch == "gemma3":
            image_tokens = f"<start_of_image>{token * 16}<end_of_image>"
            me = SimpleNamespace(full_image_sequence=f"\n\n{image_tokens}\n\n")
            written = Gemma3Processor.replace_image_token(me, {"num_crops": [0]}, 0)
        else:
            me = SimpleNamespace(image_processor=preprocessor.image_processor, image_token=token)
            written = Qwen3VLProcessor.replace_image_token(me, given, 0)
        text = sample.text.replace(preprocessor.placeholder, written)
        ids = preprocessor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sample.input_ids.tolist() == ids, arch


def test_the_answer_is_marked_whatever_the_template_writes_around_it(loaded):
    row = read_rows(bundled.CALIBRATION)[0]
    sample = loaded.preprocessor.sample(row)
    marked = loaded.preprocessor.tokenizer.decode(sample.input_ids[sample.answer])
    ends = {"idefics3": "<end_of_utterance>", "gemma3": "<end_of_turn>"}
    ends |= {"smolvlm": ends["idefics3"], "mistral3": "</s>"}
    assert marked.strip() == row.answer + ends.get(loaded.family.model_type, "<|im_end|>")
    prompt = loaded.preprocessor.sample(row, prompt_only=True)
    openings = {"gemma3": "model", "mistral3": "[/inst]"}
    opening = openings.get(loaded.family.model_type, "assistant")
    assert row.answer not in prompt.text[prompt.text.lower().rindex(opening) :]


def test_truncation_keeps_all_that_the_model_is_told(loaded):
    sample = loaded.samples[0]
    end = int(sample.vision.nonzero().max()) + 2
    cut = truncate(sample, end)
    assert len(cut.input_ids) == len(cut.vision) == len(cut.answer) == end
    assert set(cut.model_inputs()) == set(sample.model_inputs())
    assert truncate(sample, end - 2) is None
    # An image of LLaVA-OneVision has 730 tokens; 256 are left for the text.
    lengths = {"llava_onevision": 986, "mistral3": 1024}
    assert loaded.family.seq_len == lengths.get(loaded.family.model_type, 512)


# --- the walk -------------------------------------------------------------------------------------


@torch.no_grad()
def test_layers_walked_one_by_one_are_the_model(loaded):
    batches = loaded.walked()
    if loaded.family.added:
        assert all(len(b.added) == 2 and float(b.added[0].abs().max()) > 0 for b in batches)
    for index, layer in enumerate(loaded.layers):
        expected = [None if b.added else layer(b.quantized, **b.kwargs) for b in batches]
        walk = LayerWalk(layer, loaded.blocks(index), batches, two_streams=True)
        walk.pass_full()
        assert walk.advance() == 0
        for batch, own in zip(batches, expected):
            own = own[0] if isinstance(own, tuple) else own  # as the first transformers 5 has it
            assert own is None or torch.equal(batch.quantized, own)
    travelling = [sample for group in _equal_lengths(loaded.samples) for sample in group]
    arrived = [hidden for batch in batches for hidden in batch.quantized]
    for sample, hidden in zip(travelling, arrived, strict=True):
        logits = loaded.model.lm_head(loaded.model.get_decoder().norm(hidden))
        expected = loaded.model(**sample.model_inputs(), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(b.quantized, b.full) for b in batches)


def test_importance_is_autograds_own(loaded):
    """Norms lie between a linear's output and the loss: of heads, and in Gemma 3 behind `out`."""
    (batch, *_) = loaded.walked()
    generator = torch.Generator().manual_seed(0)
    for index, (layer, blocks) in enumerate(loaded.kinds()):
        hidden, kwargs = batch.quantized, batch.kwargs_of(index)
        full = batch.full + 0.1 * torch.randn(batch.full.shape, generator=generator)
        for block in blocks:
            with torch.no_grad():
                target = passed(layer, block, full, kwargs)
            ours, after = output_gradients(layer, block, hidden, target, kwargs)
            brute = block_gradients(layer, block, hidden, full, kwargs)
            assert ours.keys() == brute.keys() == {*block.linears}
            for name, gradient in brute.items():
                largest = float(gradient.abs().max()) if gradient.numel() else 0.0
                assert largest > 0 or block.kind == "experts"  # to one of which no token may come
                torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * largest)
            hidden, full = after, target


def test_what_is_added_between_layers_reaches_both_streams(tiny):
    """DeepStack adds the same features to both streams.

    After layer 0 the streams differ by the layer's rounding alone, at image tokens as elsewhere.
    """
    loaded = Loaded(tiny("qwen3_vl", tied=True))
    batches = loaded.walked()
    features = [b.added[0].clone() for b in batches]
    layer = loaded.layers[0]
    with torch.no_grad():
        outputs = [layer(b.full, **b.kwargs) for b in batches]
    before = [(b.quantized, b.kwargs) for b in batches]
    walk = LayerWalk(layer, loaded.blocks(0), batches, two_streams=True)
    quantize_layer(walk, "l.", job_for(QuantConfig(method="vlmq", bits=3)))
    walk.advance()
    for batch, output, feature, (hidden, kwargs) in zip(
        batches, outputs, features, before, strict=True
    ):
        with torch.no_grad():
            quantized = layer(hidden, **kwargs)
        for stream, plain in ((batch.full, output), (batch.quantized, quantized)):
            assert torch.equal(stream[~batch.vision], plain[~batch.vision])
            assert torch.equal(stream[batch.vision], plain[batch.vision] + feature)
        assert not torch.equal(batch.full, batch.quantized)
