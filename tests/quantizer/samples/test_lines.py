"""Images whose rows of tokens end in one of their own, held to transformers' own Pixtral code."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.pixtral import image_processing_pil_pixtral as pixtral

from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.companions import load_tokenizer
from vlmq_export.quantizer.samples.image_rules import Lines
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.scaling import scaled_sizes

CPU = torch.device("cpu")
# Width and height: square, flat, tall, small, with odd sides, and longer than is allowed.
SIZES = [(224, 224), (300, 90), (90, 400), (50, 31), (333, 201), (201, 333), (29, 1400), (1, 1)]


def published() -> Lines:
    """The rule of Mistral Small 3.1 and Ministral 3."""
    processor = SimpleNamespace(size={"longest_edge": 1540})
    config = {"vision_config": {"patch_size": 14}, "spatial_merge_size": 2}
    return Lines(processor, config, ("", "[IMG_END]"))


@pytest.fixture
def written(monkeypatch):
    """What transformers' processor writes for an image of this height and width.

    Its module asks for torchvision, whose part here is the one with Pillow.
    """
    monkeypatch.setitem(
        sys.modules, "transformers.models.pixtral.image_processing_pixtral", pixtral
    )
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    me = SimpleNamespace(
        patch_size=14,
        spatial_merge_size=2,
        image_token="[IMG]",
        image_break_token="[IMG_BREAK]",
        image_end_token="[IMG_END]",
    )
    return lambda *size: PixtralProcessor.replace_image_token(me, {"image_sizes": [size]}, 0)


def files(tmp_path, *sizes):
    """Images of these sizes, of noise."""
    for number, size in enumerate(sizes):
        file = tmp_path / f"{number}.png"
        Image.effect_noise(size, 80).convert("RGB").save(file)
        yield file


def row(words: str, *images) -> Row:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": words}]
    return Row("row", ({"role": "user", "content": content},), images)


@pytest.mark.parametrize("size", [*SIZES, (1540, 1540), (4000, 3000), (1541, 28), (700, 5000)])
def test_an_image_gets_the_size_that_the_processor_gives_it(size):
    rule = published()
    width, height = rule.size(size)
    image = torch.empty(3, size[1], size[0]).numpy()
    theirs = pixtral.get_resize_output_image_size(image, 1540, rule.unit, "channels_first")
    small = theirs[0] * theirs[1] < 8 * rule.unit**2  # which is enlarged
    assert small or (height, width) == theirs
    assert rule.size((width, height)) == (width, height)
    assert width * height >= 8 * rule.unit**2


@pytest.mark.parametrize("size", [(1540, 1540), (4000, 3000), (700, 5000), (84, 84)])
@pytest.mark.parametrize("most", [2000, 400, 100, 15])
def test_a_size_with_a_limit_keeps_shape_and_limit(size, most):
    rule = published()
    width, height = rule.size(size, most)
    assert rule.tokens((width, height)) <= max(most, rule.tokens((84, 84)), 15)
    whole = rule.size(size)
    if rule.tokens(whole) <= most:
        assert (width, height) == whole
    elif most >= 100:
        assert abs(width / height * size[1] / size[0] - 1) < 0.3
        assert rule.tokens((width, height)) > 0.8 * most


def test_images_of_a_sample_share_what_the_text_leaves():
    rule = published()
    fitted = scaled_sizes(rule, [(4000, 3000), (84, 84)], seq_len=1024, text=600, before=580)
    assert fitted[1] == (84, 84)
    assert 350 < sum(map(rule.tokens, fitted)) <= 424


@pytest.mark.parametrize("size", SIZES)
def test_tokens_are_those_of_the_processor(size, tiny, tmp_path, written):
    preprocessor = Preprocessor(tiny("mistral3"))
    (file,) = files(tmp_path, size)
    sample = preprocessor.sample(row("What is this?", file), prompt_only=True)
    height, width = sample.layout["image_sizes"][0].tolist()
    assert (width, height) == sample.images[0].size
    text = sample.text.replace("[IMG]", written(height, width))
    ids = preprocessor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.input_ids.tolist() == ids
    assert len(ids) == preprocessor.length(row("What is this?", file)).tokens


def test_images_of_several_sizes_are_the_processors_own_pixels(tiny, tmp_path, written):
    """The processor resizes none of them. Tokens and pixels of a sample are in one order."""
    preprocessor = Preprocessor(tiny("mistral3"))
    three = row("Compare.", *files(tmp_path, (196, 60), (60, 196), (100, 100)))
    sample = preprocessor.sample(three, prompt_only=True)
    assert [image.size for image in sample.images] == [(196, 84), (84, 196), (112, 112)]
    assert sample.layout["image_sizes"].tolist() == [[84, 196], [196, 84], [112, 112]]
    theirs = preprocessor.image_processor(
        images=list(sample.images), patch_size=28, return_tensors="pt"
    )
    assert torch.equal(sample.pixel_values, theirs["pixel_values"])
    assert sample.pixel_values.shape == (3, 3, 196, 196)
    assert sample.layout["image_sizes"].tolist() == torch.as_tensor(theirs["image_sizes"]).tolist()
    sizes = iter(sample.layout["image_sizes"].tolist())
    text = re.sub(r"\[IMG\]", lambda _: written(*next(sizes)), sample.text)
    ids = preprocessor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert sample.input_ids.tolist() == ids


def test_the_tokenizer_is_that_of_the_file_where_mistral_common_is_installed(tiny, monkeypatch):
    """Its own makes no special token of a text. A class of its name stands in for it."""
    folder = tiny("mistral3")
    own = load_tokenizer(folder)
    other = type("MistralCommonBackend", (), {})
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: other())
    loaded = load_tokenizer(folder)
    text = "<s>[INST][IMG]What is this?[/INST]"
    assert loaded(text)["input_ids"] == own(text)["input_ids"]
    assert loaded.convert_tokens_to_ids("[IMG]") in loaded(text)["input_ids"]


@torch.no_grad()
def test_samples_of_one_length_and_several_shapes_travel_together(tiny, tmp_path):
    """3 rows of 7, 4 of 5 and 6 of 3, with a token behind each row: 24 tokens in all. Each
    sample gets what the model makes of it alone.
    """
    folder = tiny("ministral3")
    preprocessor, model = Preprocessor(folder), load_model(Checkpoint(folder), CPU)
    images = files(tmp_path, (196, 84), (140, 112), (84, 168))
    samples = [preprocessor.sample(row("What is this?", image)) for image in images]
    (batch,) = decoder_inputs(model, samples, two_streams=False, device=CPU)
    assert [tuple(s.pixel_values.shape[2:]) for s in samples] == [(84, 196), (112, 140), (168, 84)]
    for layer in model.get_decoder().layers:
        batch.pass_layer(layer(batch.quantized, **batch.kwargs), None)
    for sample, hidden in zip(samples, batch.quantized, strict=True):
        logits = model.lm_head(model.get_decoder().norm(hidden))
        expected = model(**sample.model_inputs(), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(batch.quantized[0], batch.quantized[1], atol=1e-2)
