"""compressed-tensors folders in transformers, which decodes them with the library."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, rtn_artifact
from vlmq_export import bundled
from vlmq_export.formats.compressed_tensors.proof.check import NAME, check, program
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.compressed_tensors.requirements import missing
from vlmq_export.formats.compressed_tensors.write import write
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.in_transformers.proof.rows import KERNEL_GATE, exact_rows
from vlmq_export.formats.in_transformers.proof.runtime import (
    Outcome,
    Request,
    Worker,
    save_prompts,
)
from vlmq_export.formats.proof.checks import Check, CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.rows import read_rows

SETTINGS = CheckSettings(images=2, threads=1)
ALL_PASS = ["L1 passed"] * 3 + ["L2 passed", "L3 passed", "L3 passed", "L3 info"]

pytestmark = pytest.mark.skipif(
    bool(missing()) and NAME not in required_runtimes(),
    reason=f"{missing()} not installed and not declared present",
)


def exported(folder: Path, artifact: Artifact) -> tuple[Path, Reference]:
    """The folder, and the reference with two held-out prompts."""
    folder.mkdir()
    write(artifact, folder, FormatOptions())
    return folder, Reference(artifact.path, read_rows(bundled.HELDOUT)[:2])


def by_level(rows) -> list[str]:
    """Level and status of every row."""
    return [f"{r.level} {r.status}" for r in rows]


def request_for(folder: Path, out: Path, reference: Reference, **loading) -> Request:
    """One prompt in transformers, with the folder loaded as the proof does but for `loading`."""
    how = program(CompressedFolder(folder))
    out.mkdir()
    return Request(
        how.worker,
        str(folder),
        str(out / "out"),
        save_prompts(reference.prompts[:1], out),
        reference.vocabulary,
        16,
        sorted(reference.stop_ids),
        SETTINGS.threads,
        loading={**how.exact_loading, **loading},
        exact=True,
    )


def rows_of(folder: Path, outcome: Outcome, reference: Reference) -> list[Check]:
    """The rows of the loaded model."""
    opened = CompressedFolder(folder)
    return list(exact_rows(program(opened), outcome, opened, reference))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    """3 bits with zero-points, whose products no float16 holds."""
    return rtn_artifact(tmp_path_factory.mktemp("artifact"), GRIDS["w3g128"])


@pytest.fixture(scope="module")
def folder(artifact, tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("compressed") / NAME, artifact)[0]


@pytest.fixture(scope="module")
def reference(artifact) -> Reference:
    return Reference(artifact.path, read_rows(bundled.HELDOUT)[:2])


def test_runtime_is_here():
    assert missing() is None


def test_every_level_on_the_reference_model(folder, reference):
    rows = check(folder, reference, FormatOptions(), SETTINGS)
    assert by_level(rows) == ALL_PASS, rows
    assert rows[0].compared == rows[2].compared == reference.weights.count
    assert rows[3].compared == len(reference.weights.linears)
    assert rows[4].value <= 1e-5 and rows[6].value <= KERNEL_GATE


@pytest.mark.slow
@pytest.mark.parametrize(
    "tag", ["w2", "w2g128", "w3-sym", "w4", "w4g32", "w4g128", "w4g128-sym", "w8g128"]
)
def test_every_level_on_other_grids(tmp_path, tag):
    out, reference = exported(tmp_path / NAME, rtn_artifact(tmp_path / "artifact", GRIDS[tag]))
    rows = check(out, reference, FormatOptions(), SETTINGS)
    assert by_level(rows) == ALL_PASS, rows


# What is loaded by one process, one after the other, because importing takes longer than loading.
FAMILIES = ["qwen3_vl", "internvl", "smolvlm"]
HEADS = {  # what the head's grid is beside the others → the recipe
    "one grid": QuantConfig("rtn", 4, 128, head_bits=4),
    "two grids": QuantConfig("rtn", 4, 128, head_bits=8),
}
FAULT = "model.layers.3.mlp.down_proj"


def test_families_heads_and_faults_in_one_process(tmp_path, tiny, folder, reference):
    cases: dict[str, tuple[Path, Reference]] = {}
    for arch in FAMILIES:
        made = rtn_artifact(tmp_path / f"{arch}-artifact", GRIDS["w4g128"], tiny(arch))
        cases[arch] = exported(tmp_path / arch, made)
    # A model that owns a parameter, without zero-points: it generates only if decoded at once.
    made = rtn_artifact(tmp_path / "llava-artifact", GRIDS["w8g128"], tiny("llava_onevision"))
    cases["llava_onevision"] = exported(tmp_path / "llava_onevision", made)
    for name, config in HEADS.items():
        cases[name] = exported(tmp_path / name, with_head(tmp_path / f"{name}-artifact", config))
    requests = [request_for(f, tmp_path / f"{n}-out", r) for n, (f, r) in cases.items()]
    faulty = faulty_copy(folder, tmp_path / "faulty")
    last = request_for(faulty, tmp_path / "faulty-out", reference)
    with Worker([*requests, last]) as worker:
        for out, expected in cases.values():
            rows = rows_of(out, worker.outcome(), expected)
            assert by_level(rows) == ALL_PASS[2:6], rows
            assert rows[0].compared == expected.weights.count
        weights, *_ = rows_of(faulty, worker.outcome(), reference)
    assert weights.status == "failed" and weights.worst.startswith(f"{FAULT}.weight")
    assert weights.worst.count("(") == 1 and weights.compared == reference.weights.count


def with_head(path: Path, config: QuantConfig) -> Artifact:
    """The bundled model with a head, which is tied in the source, and becomes a matrix here."""
    source = Checkpoint(bundled.REFERENCE_VLM)
    quantize(source, [], config, path, name="m", calibration={}, device="cpu")
    return Artifact(path)


def faulty_copy(folder: Path, copy: Path) -> Path:
    """A copy in which one scale is the next number of float16."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    values = tensors[f"{FAULT}.weight_scale"].numpy()  # shares the memory of the tensor
    values[7, 1] = np.nextafter(values[7, 1], np.float16(np.inf))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.slow
@pytest.mark.parametrize(
    "arch", ["qwen2_vl", "llava_onevision", "idefics3", "mistral3", "ministral3", "qwen3_5"]
)
def test_every_level_of_the_other_families(arch, tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"], tiny(arch))
    out, reference = exported(tmp_path / NAME, artifact)
    rows = check(out, reference, FormatOptions(), SETTINGS)
    assert by_level(rows) == ALL_PASS, rows


@pytest.mark.slow
def test_answers_for_benchmarks_are_those_of_the_reference(folder, reference):
    ask = FORMATS[NAME].answerer(folder, reference, FormatOptions(), threads=1)
    answers = ask(reference.prompts, 16, lambda _done: None)
    assert answers == [reference.answer(prompt) for prompt in reference.prompts]
