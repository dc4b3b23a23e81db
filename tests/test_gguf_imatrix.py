"""imatrix.gguf: whose numbers they are, and that names and shapes are those of the file's tensors."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, rtn_artifact
from tests.test_cli import call, refused
from vlmq_export import bundled
from vlmq_export.errors import ArtifactError, FormatError
from vlmq_export.formats import gguf as gguf_format
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf.imatrix import IMATRIX, energies
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.pipeline import draw
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.model import load_model

SAMPLES = 6


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imatrix") / "out"
    code, _, err = call(
        "--format", "gguf", "--method", "vlmq", "--samples", SAMPLES, "--emit-imatrix", "--no-verify", "--out", folder, "--quiet"
    )  # fmt: skip
    assert code == 0, err
    return folder


def contents(path) -> tuple[dict, dict]:
    """(means by GGUF name, counts) by gguf-py's reader."""
    tensors = {str(t.name): t.data for t in gguf.GGUFReader(str(path)).tensors}
    names = [n.removesuffix(".in_sum2") for n in tensors if n.endswith(".in_sum2")]
    counts = {n: tensors[f"{n}.counts"] for n in names}
    assert len(tensors) == 2 * len(names)
    return {n: tensors[f"{n}.in_sum2"] / counts[n] for n in names}, counts


def test_names_and_lengths_are_those_of_the_linears_in_the_file(out):
    text = GGUFFile(find_files(out / "gguf")[0])
    linears = {n: t for n, t in text.tensors.items() if n.startswith("blk.") and len(t.shape) == 2}
    means, counts = contents(out / "gguf" / IMATRIX)
    assert means.keys() == linears.keys()
    for name, mean in means.items():
        assert mean.shape == (1, linears[name].shape[1]) and (mean >= 0).all() and mean.max() > 0
        assert counts[name].shape == (1, 1) and counts[name] == np.rint(counts[name])
    fields = gguf.GGUFReader(str(out / "gguf" / IMATRIX)).fields
    assert fields["general.type"].contents() == "imatrix" and "general.architecture" not in fields
    assert fields["imatrix.datasets"].contents() == ["calibration.json"]
    assert fields["imatrix.chunk_count"].contents() == SAMPLES and fields["imatrix.chunk_size"].contents() > 1


def test_the_numbers_are_the_weighted_energies_of_the_inputs(out):
    """Layer 0 has no gradient, so its factors are all one, and its inputs are the model's own."""
    drawn = draw(read_rows(bundled.CALIBRATION), SAMPLES, 0)
    preprocessor, model = (
        Preprocessor(bundled.REFERENCE_VLM),
        load_model(Checkpoint(bundled.REFERENCE_VLM), torch.device("cpu")),
    )
    total, tokens = 0.0, 0

    def watch(_module, args):
        nonlocal total, tokens
        total = total + args[0].double().square().sum((0, 1))
        tokens += args[0].shape[1]

    hook = model.model.language_model.layers[0].self_attn.q_proj.register_forward_pre_hook(watch)
    with torch.no_grad():
        for row in drawn:
            model(**preprocessor.sample(row).model_inputs(), use_cache=False)
    hook.remove()
    means, counts = contents(out / "gguf" / IMATRIX)
    want = (total / tokens).numpy()
    assert np.abs(means["blk.0.attn_q.weight"][0] - want).max() < 1e-5 * want.max()
    assert counts["blk.0.attn_q.weight"] == tokens
    artifact = Artifact(out / "artifact")
    held = artifact.linear("model.layers.3.self_attn.k_proj").energy
    assert np.allclose(means["blk.3.attn_k.weight"][0], held, rtol=1e-6)


def test_an_artifact_keeps_what_a_later_export_needs(out, tmp_path):
    folder = tmp_path / "again"
    code, _, err = call(
        out / "artifact", "--format", "gguf", "--emit-imatrix", "--no-verify", "--out", folder, "--quiet"
    )
    assert code == 0, err
    assert (folder / "gguf" / IMATRIX).read_bytes() == (out / "gguf" / IMATRIX).read_bytes()


def test_what_has_no_energies_is_refused_in_one_line(tmp_path):
    assert "add --format gguf" in refused("--format", "onnx", "--emit-imatrix", "--out", tmp_path / "o", code=2)
    said = refused("--format", "gguf", "--method", "rtn", "--emit-imatrix", "--out", tmp_path / "o", code=2)
    assert "--method rtn" in said
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4"])
    with pytest.raises(FormatError, match="--method rtn"):
        gguf_format.write(artifact, tmp_path / "gguf", FormatOptions(gguf_imatrix=True))
    assert not (tmp_path / "gguf").exists()
    with pytest.raises(FormatError, match="no energies of inputs for --emit-imatrix"):
        energies(artifact)


def test_energies_of_another_length_are_a_damaged_artifact(out, tmp_path):
    shutil.copytree(out / "artifact", tmp_path / "artifact")
    file = tmp_path / "artifact" / "layer-00000.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.energy"
    save_file(tensors | {key: tensors[key][:-1].clone()}, file)
    with pytest.raises(ArtifactError, match=r"up_proj\.energy"):
        Artifact(tmp_path / "artifact")
