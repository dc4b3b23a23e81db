"""A damaged or hostile source folder is refused by name before any weight is used."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer.model.checkpoint import Checkpoint


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two shards, with an index and a config.json."""
    weights = {f"t{i}": torch.randn(4, 8) for i in range(4)}
    save_file({k: weights[k] for k in ("t0", "t1")}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({k: weights[k] for k in ("t2", "t3")}, tmp_path / "model-00002-of-00002.safetensors")
    index = {k: f"model-0000{1 + (k > 't1')}-of-00002.safetensors" for k in weights}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    return tmp_path


def refused(folder) -> str:
    """The error of a folder that is refused, which must be one line."""
    with pytest.raises(CheckpointError) as e:
        Checkpoint(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_shards_are_one_set_of_tensors(folder):
    checkpoint = Checkpoint(folder)
    assert sorted(checkpoint.tensors) == ["t0", "t1", "t2", "t3"]
    assert checkpoint.tensor("t3").shape == (4, 8)
    assert checkpoint.tensors["t3"].nbytes == 4 * 8 * 4


def test_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refused(folder)


@pytest.mark.parametrize("cut", [1, 40])
def test_truncated_shard_is_named(folder, cut):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-cut])
    assert shard.name in refused(folder)


def test_header_longer_than_the_file(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert shard.name in refused(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd"])
def test_a_shard_outside_the_folder_is_refused(folder, name):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": name}}))
    assert "outside the folder" in refused(folder)


def test_index_naming_an_absent_tensor(folder):
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    raw["weight_map"]["ghost"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    assert "ghost" in refused(folder)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    assert "unpickle" in refused(tmp_path)


def test_a_quantized_source_is_refused_by_method(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    assert "awq" in refused(folder)


def test_nan_weights_are_counted_and_named(folder):
    save_file(
        {"t2": torch.full((4, 8), float("nan")), "t3": torch.zeros(4, 8)},
        folder / "model-00002-of-00002.safetensors",
    )
    with pytest.raises(CheckpointError, match="t2 has 32 NaN"):
        Checkpoint(folder).tensor("t2")


def test_not_a_folder_and_no_config(tmp_path):
    assert "no such model folder" in refused(tmp_path / "nothing")
    assert "config.json" in refused(tmp_path)
