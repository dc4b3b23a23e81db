"""Images that are cut into tiles, held to transformers' own Idefics3Processor."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import Idefics3Processor
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from vlmq_export import bundled
from vlmq_export.errors import CalibrationError, CheckpointError
from vlmq_export.quantizer.samples.image_rules import Tiles
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, read_rows

AROUND = ("<fake_token_around_image><global-img>", "<fake_token_around_image>")
# Width and height: square, flat, tall, smaller than a tile, and with odd shorter sides.
SIZES = [(300, 300), (400, 90), (90, 400), (50, 31), (333, 201), (201, 333), (225, 113), (900, 7)]


def published(*, splitting: bool = True) -> Tiles:
    """The rule of SmolVLM-256M, -500M and their second generation."""
    processor = SimpleNamespace(
        max_image_size={"longest_edge": 512},
        size={"longest_edge": 2048},
        do_image_splitting=splitting,
    )
    config = {"vision_config": {"image_size": 512, "patch_size": 16}, "scale_factor": 4}
    return Tiles(processor, config, AROUND)


def asked(preprocessor: Preprocessor, file, **options):
    """A sample with one image, and the processor's own answer to the same image and words."""
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    row = Row("one", ({"role": "user", "content": content},), (file,))
    sample = preprocessor.sample(row, prompt_only=True)
    processor = Idefics3Processor(
        preprocessor.image_processor, preprocessor.tokenizer, image_seq_len=16
    )
    return sample, processor(text=[sample.text], return_tensors="pt", **options)


@pytest.mark.parametrize("arch", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_are_those_of_the_real_processor(arch, size, tiny, tmp_path):
    file = tmp_path / "image.png"
    image = Image.effect_noise(size, 80).convert("RGB")
    image.save(file)
    sample, theirs = asked(Preprocessor(tiny(arch)), file, images=[[image]])
    assert sample.input_ids.tolist() == theirs["input_ids"][0].tolist()
    assert sample.pixel_values.shape[0] == theirs["pixel_values"].shape[1]


@pytest.mark.parametrize("arch", ["idefics3", "smolvlm"])
def test_a_fitted_image_is_left_alone_by_the_real_processor(arch, tiny, tmp_path):
    file, preprocessor = tmp_path / "image.png", Preprocessor(tiny(arch))
    image = preprocessor.fit(Image.effect_noise((333, 201), 80).convert("RGB"))
    image.save(file)
    # Without splitting, the processor enlarges a tile to `size`, and shrinks it again.
    enlarged = preprocessor.image_processor.do_image_splitting
    sample, theirs = asked(preprocessor, file, images=[[image]], do_resize=enlarged)
    assert torch.equal(sample.pixel_values[:, 0], theirs["pixel_values"][0])
    assert bool(theirs["pixel_attention_mask"].all())


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 2), (4, 3)])
def test_text_is_that_of_smolvlm2s_processor_too(rows, columns):
    words = ("<fake_token_around_image>", "<image>", "<global-img>")
    theirs = get_image_prompt_string(rows, columns, 64, *words)
    assert published().text(rows, columns, "<image>") == theirs


@pytest.mark.parametrize(
    ("size", "most", "fitted", "tokens"),
    [
        ((640, 640), None, (2048, 2048), 16 * 66 + 4 + 64),
        ((640, 480), None, (2048, 1536), 12 * 66 + 3 + 64),
        ((480, 640), 500, (1024, 1024), 4 * 66 + 2 + 64),
        ((2000, 100), 400, (2048, 512), 4 * 66 + 1 + 64),
        ((640, 640), 100, (512, 512), 64),
    ],
)
def test_published_sizes(size, most, fitted, tokens):
    rule = published()
    assert rule.size(size, most) == fitted
    assert rule.tokens(fitted) == tokens


def test_without_splitting_every_image_is_one_tile():
    rule = published(splitting=False)
    assert rule.size((2000, 100)) == (512, 512)
    assert rule.tokens((512, 512)) == 64


def test_a_sample_is_as_long_as_the_rule_says(tiny):
    preprocessor = Preprocessor(tiny("idefics3"))
    for row in read_rows(bundled.CALIBRATION)[:4]:
        sample = preprocessor.sample(row)
        bare = preprocessor.ids(sample.text, ["<image>".join(AROUND)] * len(sample.images))
        text = len(bare) - len(sample.images)
        tokens = sum(preprocessor.images.tokens(image.size) for image in sample.images)
        assert len(sample.input_ids) == text + tokens
        assert len(preprocessor.sample(row, seq_len=100).input_ids) <= 100


# --- what cannot be -------------------------------------------------------------------------------


def damaged(source, folder, file, **changed):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    settings = json.loads((folder / file).read_text())
    for key, value in changed.items():
        settings.pop(key) if value is None else settings.update({key: value})
    (folder / file).write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("file", "changed", "why"),
    [
        ("config.json", {"scale_factor": 3}, "scale_factor 3 .* does not divide the 8 patches"),
        ("config.json", {"scale_factor": 0}, "scale_factor in config.json is 0"),
        ("config.json", {"scale_factor": "two"}, "scale_factor in config.json is 'two'"),
        ("config.json", {"image_token_id": 5}, "has no image token|stands for"),
        ("config.json", {"image_token_id": None}, "no image token of the id"),
        ("preprocessor_config.json", {"max_image_size": {"longest_edge": 56}}, "max_image_size"),
        ("preprocessor_config.json", {"max_image_size": {"height": 112}}, "cannot read its image"),
        ("preprocessor_config.json", {"size": {"height": 9, "width": 9}}, "cannot read its image"),
    ],
)
def test_settings_that_do_not_fit_are_refused(file, changed, why, tiny, tmp_path):
    folder = damaged(tiny("idefics3"), tmp_path / "model", file, **changed)
    if changed == {"image_token_id": 5}:  # a letter: the template writes no such image
        row = read_rows(bundled.CALIBRATION)[0]
        with pytest.raises(CalibrationError, match=r"stands for an image|template kept"):
            Preprocessor(folder).sample(row)
        return
    with pytest.raises(CheckpointError, match=why):
        Preprocessor(folder)


def test_a_config_without_scale_factor_has_that_of_transformers(tiny, tmp_path):
    folder = damaged(tiny("idefics3"), tmp_path / "model", "config.json", scale_factor=None)
    assert Preprocessor(folder).images.each == 16  # transformers' default is 2


def test_a_tile_of_zeros_is_refused(tiny, tmp_path):
    """transformers takes it for padding, and drops it."""
    folder = damaged(
        tiny("idefics3"), tmp_path / "model", "preprocessor_config.json", do_normalize=False
    )
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    content = [{"type": "image"}, {"type": "text", "text": "?"}]
    row = Row("dark", ({"role": "user", "content": content},), (tmp_path / "black.png",))
    with pytest.raises(CalibrationError, match="zero everywhere"):
        Preprocessor(folder).sample(row, prompt_only=True)
