"""A model that is read part by part computes what the whole one does.

In memory there is never more of it than the part in use.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlmq_export import bundled
from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.calibration.batches import decoder_inputs
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.calibration.offload import Shelf
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel, load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.storage.tensors import read_infos, read_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "gemma3"),
    *("mistral3", "ministral3", "qwen3_5"),
)


def samples_of(folder, count=6):
    preprocessor = Preprocessor(folder)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:count]]


def ids_of(samples):
    return torch.cat([s.input_ids for s in samples])


def held(model) -> int:
    """Bytes of the parameters that have storage."""
    return sum(p.nbytes for p in model.parameters() if p.device.type != "meta")


@torch.no_grad()
@pytest.mark.parametrize("generation", ["hub", "modules"])
@pytest.mark.parametrize("arch", FAMILIES)
def test_streamed_parts_are_the_whole_model(arch, generation, tiny):
    folder = tiny(arch) if generation == "hub" else tiny(arch, generation=generation)
    checkpoint, samples = Checkpoint(folder), samples_of(folder)
    whole, streamed = load_model(checkpoint, CPU), StreamedModel(checkpoint, CPU)
    family = checkpoint.architecture.family
    options = {"two_streams": True, "device": CPU, "added": family.added}
    expected = decoder_inputs(whole, samples, **options)
    with streamed.filled_prefix(ids_of(samples)) as prefix:
        batches = decoder_inputs(prefix, samples, **options)
    assert held(streamed.model) == 0
    layer = 0
    while f"{family.layers}{layer}.mlp.up_proj.weight" in checkpoint.tensors:
        blocks = checkpoint.architecture.blocks(layer)
        own = whole.get_submodule(family.module_name(f"{family.layers}{layer}"))
        with streamed.filled_layer(layer) as other:
            assert held(streamed.model) == sum(p.nbytes for p in own.parameters()), layer
            assert all(torch.equal(p, q) for p, q in zip(own.parameters(), other.parameters()))
            for module, stream in ((own, expected), (other, batches)):
                walk = LayerWalk(module, blocks, stream, two_streams=True)
                walk.pass_full()
                walk.advance()
        for batch, other in zip(expected, batches):
            assert torch.equal(batch.quantized, other.quantized)
            assert torch.equal(batch.full, other.full)
        layer += 1
    assert layer > 1 and held(streamed.model) == 0


def test_only_the_embedding_rows_that_are_asked_for_are_read(tiny, monkeypatch):
    checkpoint = Checkpoint(tiny("qwen2_5_vl"))
    asked = {}
    read = Checkpoint.tensor

    def spy(self, name, rows=None):
        asked[name] = rows
        return read(self, name, rows)

    monkeypatch.setattr(Checkpoint, "tensor", spy)
    with StreamedModel(checkpoint, CPU).filled_prefix(torch.tensor([7, 3, 7, 5])) as model:
        rows = model.get_input_embeddings()(torch.tensor([[5, 3], [7, 7]]))
    matrix = next(n for n in asked if "embed_tokens" in n)
    assert asked[matrix] == [3, 5, 7]
    assert not any(".layers." in n or "lm_head" in n for n in asked)
    assert torch.equal(rows, read(checkpoint, matrix).float()[torch.tensor([[5, 3], [7, 7]])])


def test_what_does_not_fit_the_class_is_named(tiny):
    checkpoint = Checkpoint(tiny("qwen2_5_vl"))
    taken = checkpoint.tensors.pop("model.norm.weight")
    says = r"tensor model\.norm\.weight is missing that config\.json asks for"
    with pytest.raises(CheckpointError, match=says):
        StreamedModel(checkpoint, CPU)
    checkpoint.tensors |= {taken.name: taken, "model.norm.scale": taken}
    with pytest.raises(CheckpointError, match=r"model\.norm\.scale"):
        StreamedModel(checkpoint, CPU)
    checkpoint = Checkpoint(tiny("qwen2_5_vl"))
    checkpoint.config["x"] = 1
    wide = checkpoint.tensors["model.embed_tokens.weight"]
    checkpoint.tensors["model.norm.weight"] = wide
    says = r"model\.norm\.weight has shape .* where config\.json asks for"
    with pytest.raises(CheckpointError, match=says):
        StreamedModel(checkpoint, CPU)


def test_tensors_are_read_as_the_library_reads_them(tmp_path):
    tensors = {
        "a": torch.randn(5, 3).bfloat16(),
        "b": torch.randint(-9, 9, (2, 3, 4)),
        "c": torch.tensor(2.5),
        "d": torch.zeros(0, 4),
        "e": torch.rand(7) > 0.5,
        "f": torch.randn(6, 2).half(),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    infos, expected = read_infos(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert infos.keys() == expected.keys()
    for name, value in expected.items():
        read = read_tensor(tmp_path, infos[name])
        assert read.dtype == value.dtype and torch.equal(read, value)
    assert torch.equal(read_tensor(tmp_path, infos["b"], rows=[1, 0, 1]), expected["b"][[1, 0, 1]])


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_what_is_put_away_comes_back(place, tmp_path):
    shelf = Shelf(CPU, place, tmp_path)
    value = {
        "a": torch.randn(3, 5),
        "b": (torch.tensor([True, False]), None, [torch.randn(2).bfloat16()]),
        "c": 4,
    }
    rest = shelf.put(value)
    back = rest.get()
    assert torch.equal(back["a"], value["a"])
    assert torch.equal(back["b"][0], value["b"][0])
    assert back["b"][1] is None
    assert torch.equal(back["b"][2][0], value["b"][2][0])
    assert back["c"] == 4
    assert len(list(tmp_path.iterdir())) == (3 if place == "disk" else 0)
    del rest, back
    assert not list(tmp_path.iterdir())
