"""imatrix.gguf: the energies of the linears' inputs, under the names that the text model has."""

import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, rtn_artifact
from tests.vlmq_export.test_cli import call, refused
from vlmq_export import bundled
from vlmq_export.errors import ArtifactError, FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.files.imatrix import IMATRIX, energies
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.sources.calibration import draw

EMIT = ("--format", "gguf", "--emit-imatrix")
SAMPLES = 6


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imatrix") / "out"
    floats = ("--vision-bits", "off", "--embedding-bits", "off")  # what layer 0 is shown
    method = ("--bits", 4, *floats, "--method", "vlmq-paper", "--samples", SAMPLES)
    code, _, err = call(*EMIT, *method, "--no-verify", "--out", folder, "--quiet")
    assert code == 0, err
    return folder


def contents(path) -> tuple[dict, dict]:
    """(means, counts), each by GGUF name, as gguf-py reads them."""
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
    assert fields["imatrix.chunk_count"].contents() == SAMPLES
    assert fields["imatrix.chunk_size"].contents() > 1


def test_the_numbers_are_the_weighted_energies_of_the_inputs(out):
    """In layer 0 all weights of tokens are one, and the inputs are those of the float model.

    There the mean can be computed with the model alone.
    """
    drawn = draw(read_rows(bundled.CALIBRATION), SAMPLES, 0)
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    model = load_model(Checkpoint(bundled.REFERENCE_VLM), torch.device("cpu"))
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
    code, _, err = call(out / "artifact", *EMIT, "--no-verify", "--out", folder, "--quiet")
    assert code == 0, err
    assert (folder / "gguf" / IMATRIX).read_bytes() == (out / "gguf" / IMATRIX).read_bytes()


def test_what_has_no_energies_is_refused_in_one_line(tmp_path):
    to = ("--out", tmp_path / "o")
    assert "add --format gguf" in refused("--format", "onnx", "--emit-imatrix", *to, code=2)
    assert "--method rtn" in refused(*EMIT, "--method", "rtn", *to, code=2)
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4"])
    with pytest.raises(FormatError, match="--method rtn"):
        FORMATS["gguf"].write(artifact, tmp_path / "gguf", FormatOptions(gguf_imatrix=True))
    assert not (tmp_path / "gguf").exists()
    with pytest.raises(FormatError, match="no energies of inputs for --emit-imatrix"):
        energies(artifact, Layout.of(artifact.architecture))


def test_energies_of_another_length_are_a_damaged_artifact(out, tmp_path):
    shutil.copytree(out / "artifact", tmp_path / "artifact")
    file = tmp_path / "artifact" / "layer-00000.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.energy"
    save_file(tensors | {key: tensors[key][:-1].clone()}, file)
    with pytest.raises(ArtifactError, match=r"up_proj\.energy"):
        Artifact(tmp_path / "artifact")
