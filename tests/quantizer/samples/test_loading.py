"""Samples from rows, in worker processes and in this one, and the estimate of the time left."""

import multiprocessing
import pickle
import random
import select
from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from PIL import ExifTags, Image, ImageFile

from vlmq_export import bundled
from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS, _equal_lengths
from vlmq_export.quantizer.samples import loading
from vlmq_export.quantizer.samples.images import image_size, load_image
from vlmq_export.quantizer.samples.loading import (
    CHUNK,
    MANY,
    Limit,
    count_samples,
    read_samples,
    worker_count,
)
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import Lengths
from vlmq_export.terminal.progress import time_left


@pytest.fixture(scope="module")
def rows():
    return read_rows(bundled.CALIBRATION)[:14]


def test_workers_give_the_same_samples_in_order(rows):
    seen = []
    here, limit = bundled.REFERENCE_VLM, Limit(24)
    one = read_samples(here, rows, limit, workers=1, progress=seen.append)
    two = read_samples(here, rows, limit, workers=2, progress=lambda _: None)
    assert replace(one, samples=[]) == replace(two, samples=[])
    assert one.scaled > 0 == one.dropped
    alone, shared = one.samples, two.samples
    assert len(alone) + one.dropped == len(rows)
    assert seen == list(range(1, len(rows) + 1))
    for a, b in zip(alone, shared, strict=True):
        assert (a.id, a.text, a.row) == (b.id, b.text, b.row)
        assert a.images == b.images == ()
        for name in ("input_ids", "vision", "answer", "pixel_values", "image_grid_thw"):
            x, y = getattr(a, name), getattr(b, name)
            assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y))


@pytest.mark.parametrize(("seq_len", "scale"), [(512, True), (24, True), (30, False)])
def test_samples_are_counted_without_their_pixels(seq_len, scale, rows, monkeypatch):
    limit = Limit(seq_len, scale)
    loaded = read_samples(
        bundled.REFERENCE_VLM, rows, limit, workers=1, progress=lambda _: None
    ).samples

    preprocessor = Preprocessor(bundled.REFERENCE_VLM)

    def refuse(*_):
        raise AssertionError("a pixel was asked for")

    monkeypatch.setattr(Image.Image, "load", refuse)
    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    counted, why = count_samples(preprocessor, rows, limit)
    assert why == "" and counted.share == 1
    found = [(each.tokens, each.images) for each in counted.each]
    assert found == [(len(s.input_ids), int(s.vision.sum())) for s in loaded]
    assert counted.tokens == sum(len(s.input_ids) for s in loaded)


def test_of_many_rows_a_share_is_counted(rows, monkeypatch):
    preprocessor, limit = Preprocessor(bundled.REFERENCE_VLM), Limit(512)
    whole, _ = count_samples(preprocessor, rows * 4, limit)
    monkeypatch.setattr(loading, "COUNTED", 20)
    share, _ = count_samples(preprocessor, rows * 4, limit)
    assert len(share.each) == 19 and share.samples == whole.samples == 56
    assert share.tokens == pytest.approx(whole.tokens, rel=0.2)


def test_batches_of_counted_samples_are_those_of_the_run(rows):
    samples = read_samples(
        bundled.REFERENCE_VLM, rows * 9, Limit(512), workers=1, progress=lambda _: None
    ).samples
    planned = Lengths.of(samples).batches(BATCH_TOKENS)
    run = [(len(group), len(group[0].input_ids)) for group in _equal_lengths(samples)]
    assert planned == run


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"])
def test_the_size_of_an_image_is_in_its_header(kind, orientation, tmp_path):
    file, exif = tmp_path / f"image.{kind.lower()}", Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.new("RGB", (31, 17)).save(file, kind, exif=exif)
    assert image_size(file) == load_image(file).size


@pytest.mark.parametrize("workers", [1, 2])
def test_every_bad_image_is_named_with_its_line(rows, workers, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    shown = [row for row in rows if row.images]
    chosen = {rows[i].where for i in (1, 2, 4, 5, 7, 9)}
    bad = [replace(row, images=(broken,)) if row.where in chosen else row for row in shown]
    with pytest.raises(CalibrationError) as e:
        read_samples(
            bundled.REFERENCE_VLM, bad, Limit(512), workers=workers, progress=lambda _: None
        )
    said = str(e.value)
    wrong = [row.where for row in bad if row.images == (broken,)]
    assert said.startswith(f"{len(wrong)} of {len(bad)} samples cannot be used: ")
    assert "\n" not in said
    for where in wrong[:5]:
        assert f"{where}: " in said
    assert "(and 1 more, above)" in said
    assert any(wrong[5] in record.getMessage() for record in caplog.records)


def test_rows_know_their_place(rows):
    assert [row.where for row in rows[:3]] == ["row 0", "row 1", "row 2"]


def test_progress_may_stop_the_reading(rows):
    class Enough(Exception):
        pass

    def progress(done):
        if done == 2:
            raise Enough

    with pytest.raises(Enough):
        read_samples(bundled.REFERENCE_VLM, rows, Limit(512), workers=1, progress=progress)


def test_few_rows_start_no_workers():
    assert worker_count(MANY - 1) == 1 <= worker_count(MANY) <= 8


@pytest.mark.parametrize("seed", range(20))
def test_time_left_is_right_within_a_fifth_after_two_layers(seed):
    """The layers of a model differ by a few per cent. Here one in ten takes 15 % longer."""
    draw = random.Random(seed)

    def seconds():
        return 60 * draw.uniform(0.95, 1.05) * (1.15 if draw.random() < 0.1 else 1)

    stamps = list(accumulate((seconds() for _ in range(36)), initial=0.0))
    assert time_left(stamps[:1], 36) is None
    for done in range(2, 36):
        left = stamps[-1] - stamps[done]
        assert time_left(stamps[: done + 1], 36) == pytest.approx(left, rel=0.2, abs=10)


def test_layers_that_were_only_walked_do_not_count_for_long():
    """A resumed run passes each solved layer in a second, then takes a minute for each layer."""
    stamps = list(accumulate([1.0] * 20 + [60.0] * 5, initial=0.0))
    assert time_left(stamps, 36) == pytest.approx(11 * 60, rel=0.3)


def test_what_a_worker_sends_cannot_be_cut_in_two(rows, tmp_path, monkeypatch):
    """A worker that is killed within a message leaves a pool that waits for the rest for ever.

    The kernel writes what is smaller than PIPE_BUF at once.
    """
    monkeypatch.setattr(
        loading, "_preprocessor", Preprocessor(bundled.REFERENCE_VLM), raising=False
    )
    monkeypatch.setattr(loading, "_folder", tmp_path, raising=False)
    sent = [loading._work(place, row, Limit(512)) for place, row in enumerate(rows[:CHUNK])]
    assert len(pickle.dumps(sent)) < select.PIPE_BUF / 4


def test_a_killed_worker_is_one_line(rows):
    def kill(_done: int) -> None:
        for child in multiprocessing.active_children():
            child.kill()

    with pytest.raises(CalibrationError, match="was killed, most likely for its memory"):
        read_samples(bundled.REFERENCE_VLM, rows * 4, Limit(512), workers=2, progress=kill)
