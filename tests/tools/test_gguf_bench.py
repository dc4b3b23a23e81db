"""The arithmetic of the GGUF bench. The tables of docs/gguf.md are those of the measured cells."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.artifacts import rtn_artifact
from tools.bench import gguf as bench
from tools.bench import tables
from tools.bench.peers import peers
from tools.bench.scoring import load_model, source_weights
from vlmq_export.bundled import CALIBRATION
from vlmq_export.formats.gguf.files.text import write_text
from vlmq_export.formats.gguf.read import decode_ours
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(bench.__file__).parents[2] / "docs" / "gguf.md"


def cell(
    contender: str, mix: str, kl: float, calibration: str = "a.json", model: str = "Qwen2.5-VL"
) -> dict:
    key = {"model": model, "contender": contender, "mix": mix, "calibration": calibration}
    return key | {"samples": 1, "kl": kl}


def test_ratios_are_to_the_image_imatrix_of_the_same_set_and_reference():
    cells = [
        cell(bench.IMAGE, "Q2_K", 0.02),
        cell(bench.IMAGE, "Q2_K", 0.04, "b.json"),
        cell("exact", "Q2_K", 0.01),
        cell("exact", "Q2_K", 0.012, "b.json"),
        cell(bench.PLAIN, "Q2_K", 0.03),
        cell("exact", "Q2_K", 0.5, model="LLaVA-OneVision"),
        cell("vlmq-paper", "Q4_K_M", 0.5),
    ]
    text = bench.all_tables(cells)["ratio Qwen2.5-VL"]
    assert (
        "| exact | .40 ± .10 |" in text
        and "| llama.cpp | 1.50 |" in text
        and "vlmq-paper" not in text
    )
    assert "exact" not in bench.all_tables(cells)["ratio LLaVA-OneVision"]


def test_autorounds_table_has_who_was_measured_beside_it():
    cells = [
        cell("AutoRound", "Q2_K_S", 0.1),
        cell("exact", "Q2_K_S", 0.05),
        cell("exact", "Q2_K_S", 0.07, "b.json"),
        cell("exact", "Q2_K", 0.04),
    ]
    made = bench.all_tables(cells)
    beside = ["| exact | 50 |", "| AutoRound | 100 |"]
    assert made["AutoRound kl Qwen2.5-VL"].splitlines()[2:] == beside
    assert made["kl Qwen2.5-VL"].splitlines()[2:] == ["| exact | 40 |"]


# The third reference is built by a command of its own.
@pytest.mark.parametrize("name", [n for n in bench.MODELS if n != "SmolVLM"])
def test_an_imatrix_has_the_decoder_linears_by_the_names_that_the_file_is_made_with(name):
    """llama.cpp's quantizer ignores entries under other names, and would lose quality by it."""
    folder = bench.MODELS[name]
    samples = [Preprocessor(folder).sample(r) for r in read_rows(CALIBRATION)[:1]]
    found = bench.energies(load_model(folder, source_weights(folder)), samples)
    places = Layout.of(Checkpoint(folder).architecture).text
    of_layers = {n: p for n, p in places.items() if n.startswith("blk.") and "norm" not in n}
    linears = [p.hub for n, p in of_layers.items() if n.endswith(".weight")]
    assert set(found) == {hub.removesuffix(".weight") for hub in linears}


def test_peers_and_full_precision_have_their_rows_where_llama_cpp_looks_for_them(tiny, tmp_path):
    """A Llama decoder's rows of q and k stand in rotary pairs there."""
    folder, shipped = tiny("idefics3"), tmp_path / "ours.gguf"
    artifact = rtn_artifact(tmp_path / "artifact", QuantConfig("rtn", 8, symmetric=True), folder)
    write_text(artifact, Layout.of(artifact.architecture), shipped, bench.OPTIONS)
    bench.full_precision(folder, shipped, tmp_path / "floats.gguf")
    bench.peer(folder, shipped, tmp_path / "peer.gguf", {})
    ours = dict(decode_ours(shipped))
    for name in ("floats", "peer"):
        theirs = dict(decode_ours(tmp_path / f"{name}.gguf"))
        assert theirs.keys() == ours.keys()
        for tensor, array in ours.items():
            scale = np.abs(array).max()
            assert np.abs(theirs[tensor] - array).max() <= 0.01 * scale, (name, tensor)


def test_logits_are_those_where_the_answer_is_predicted():
    """mtmd gives them at text tokens alone, and a prompt with features everywhere."""
    folder = bench.MODELS["LLaVA-OneVision"]
    sample = Preprocessor(folder).sample(read_rows(CALIBRATION)[0])
    every = torch.randn(len(sample.input_ids), 7)
    wanted = every.log_softmax(-1)[torch.nonzero(sample.answer).flatten() - 1]
    for logits in (every, every[~sample.vision]):
        full, found = bench._at_answer(sample, every, logits)
        assert torch.equal(found, wanted) and torch.equal(full, wanted)


def test_the_decoder_alone_computes_what_it_computes_in_the_whole(tmp_path):
    folder, decoder = bench.MODELS["LLaVA-OneVision"], tmp_path / "decoder"
    peers.write_decoder(Checkpoint(folder), decoder)
    row = bench.without_images(read_rows(CALIBRATION)[0])
    sample = Preprocessor(folder).sample(row)
    ids = sample.input_ids[None]
    alone = transformers.AutoModelForCausalLM.from_pretrained(decoder, dtype=torch.float32)
    whole = load_model(folder, source_weights(folder))
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, whole(input_ids=ids).logits, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(decoder).decode(ids[0]) == sample.text


def test_the_page_has_the_tables_of_the_cells(tmp_path):
    cells = json.loads(PAGE.with_name("gguf-quality.json").read_text("utf-8"))
    renewed, page = tmp_path / "page.md", PAGE.read_text("utf-8")
    renewed.write_text(page, "utf-8")
    tables.fill(renewed, bench.all_tables(cells))
    assert "<!-- table " in renewed.read_text("utf-8")
    command = "tools.bench.gguf --mixes '' --out docs/gguf-quality --page docs/gguf.md"
    assert renewed.read_text("utf-8") == page, f"tables and cells differ: run {command}"
