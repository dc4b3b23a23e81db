"""Images that are scaled down to what the length of a sample leaves them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.vlmq_export.own_data import photo
from vlmq_export.quantizer.samples.image_rules import Grid, Tile
from vlmq_export.quantizer.samples.loading import Limit, read_samples
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import truncate
from vlmq_export.quantizer.samples.scaling import scaled_sizes, shares


class Published:
    """The settings of the image processor that Qwen2.5-VL is published with."""

    def __init__(self):
        self.patch_size, self.merge_size = 14, 2
        self.size = {"shortest_edge": 3136, "longest_edge": 12_845_056}


@pytest.fixture
def preprocessor(model):
    """Of the reference model, with the published limits on an image."""
    file = model / "preprocessor_config.json"
    settings = json.loads(file.read_text("utf-8")) | {"max_pixels": 12_845_056}
    file.write_text(json.dumps(settings))
    return Preprocessor(model)


def row(images, question="What is in the picture?", answer="A disc."):
    """A question about images, and its answer."""
    parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return Row("r", ({"role": "user", "content": parts}, said), tuple(images))


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=8), st.integers(0, 5000))
def test_shares_are_fair(wanted, room):
    given_ = shares(wanted, room)
    assert all(0 <= g <= w for g, w in zip(given_, wanted))
    assert given_ == wanted or room - len(wanted) < sum(given_) <= room
    # who gets less than wanted gets no less than anybody else, but for the rest of a division
    short = [g for g, w in zip(given_, wanted) if g < w]
    assert not short or min(short) >= max(given_) - 1


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 4096))
def test_a_size_with_a_limit_keeps_shape_and_limit(width, height, most):
    if max(width, height) > 200 * min(width, height):
        return
    rule = Grid(Published())
    free = rule.size((width, height))
    limited = rule.size((width, height), most)
    assert 8 <= rule.tokens(limited) <= max(8, min(most, rule.tokens(free)))
    assert all(side % 28 == 0 for side in limited)
    if rule.tokens(limited) >= 64 and max(width, height) < 4 * min(width, height):
        assert limited[0] / limited[1] == pytest.approx(width / height, rel=0.2)


def test_a_long_answer_leaves_images_half_of_what_comes_before_it():
    rule = Grid(Published())

    def tokens(text: int) -> int:
        size = scaled_sizes(rule, [(1280, 720)], seq_len=512, text=text, before=12)[0]
        return rule.tokens(size)

    assert 380 <= tokens(112) <= 400
    assert tokens(400) == tokens(3000) and 230 <= tokens(400) <= 250


def test_a_tile_cannot_be_scaled():
    tile = Tile(None, {"vision_config": {"image_size": 384, "patch_size": 14}}, 1)
    assert scaled_sizes(tile, [(9, 9)], seq_len=50, text=9, before=9) == [(384, 384)]


def test_a_photo_fits_and_keeps_its_shape(preprocessor, tmp_path):
    one = row([photo(tmp_path / "one.jpg", 1)])
    whole = preprocessor.sample(one)
    assert len(whole.input_ids) > 1100 and not whole.scaled
    sample = preprocessor.sample(one, seq_len=512)
    assert sample.scaled and 480 < len(sample.input_ids) <= 512
    assert truncate(sample, 512) is sample  # no word of the text is cut
    width, height = sample.images[0].size
    assert width / height == pytest.approx(1280 / 720, rel=0.1)
    assert int(sample.vision.sum()) == width * height // 28**2
    assert sample.text == whole.text


def test_a_small_image_beside_a_photo_keeps_its_size(preprocessor, tmp_path):
    Image.new("RGB", (112, 112), "red").save(tmp_path / "icon.png")
    photos = [photo(tmp_path / f"{i}.jpg", i) for i in range(2)]
    sample = preprocessor.sample(row([photos[0], tmp_path / "icon.png", photos[1]]), seq_len=512)
    areas = [image.size[0] * image.size[1] // 28**2 for image in sample.images]
    assert areas[1] == 16 and areas[0] == areas[2] > 200
    assert len(sample.input_ids) <= 512


def test_what_fits_is_not_touched(preprocessor, tmp_path):
    Image.new("RGB", (1000, 300), "red").save(tmp_path / "a.png")
    one = row([tmp_path / "a.png"])
    free, limited = preprocessor.sample(one), preprocessor.sample(one, seq_len=512)
    assert not limited.scaled and limited.images[0].size == free.images[0].size


def test_a_dropped_sample_says_how_long_it_is(preprocessor, model, tmp_path):
    rows = [row([photo(tmp_path / "a.jpg", 1)]), row([])]
    length = len(preprocessor.sample(rows[0]).input_ids)
    dropped = read_samples(model, rows, Limit(512, scale=False), progress=lambda _: None)
    assert (dropped.dropped, dropped.longest, len(dropped.samples)) == (1, length, 1)
    kept = read_samples(model, rows, Limit(length, scale=False), progress=lambda _: None)
    assert (kept.dropped, kept.scaled, len(kept.samples)) == (0, 0, 2)
    scaled = read_samples(model, rows, Limit(512), progress=lambda _: None)
    assert (scaled.dropped, scaled.scaled, len(scaled.samples)) == (0, 1, 2)
