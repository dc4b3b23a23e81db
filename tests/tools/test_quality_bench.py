"""The arithmetic of the quality bench: cells, tables, and readers of the files of other tools."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tools.bench import ablations, quality, tables
from tools.bench.peers import peers
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.quantizer.methods import METHODS, method_named
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(quality.__file__).parents[2] / "docs" / "quality.md"


def cell(method: str, grid: str, kl: float, **more) -> dict:
    return {"method": method, "grid": grid, "kl": kl} | more


def test_a_table_has_means_and_half_ranges_in_the_order_asked_for():
    cells = [cell("b", "W2", 0.02), cell("b", "W2", 0.04)]
    cells += [cell("a", "W2", 0.5), cell("a", "W3", 0.1)]
    assert tables.table(cells, "method", "grid", "kl", ("W3", "W2", "a")).splitlines() == [
        "| | W3 | W2 |",
        "|---|---|---|",
        "| a | 100 | 500 |",
        "| b |  | 30 ± 10 |",
    ]


def test_figures_have_no_exponent_and_no_zero_before_the_point():
    assert tables.spread([3.1e-5, 3.3e-5], 1e3, ".2g") == ".032 ± .001"
    assert tables.spread([1.234e-6], 1e3, ".2g") == ".0012"
    assert tables.spread([3.456], 1e3, ".2g") == "3500"
    assert tables.spread([1e-8], 1e3, ".2g") == ".00001"
    assert tables.spread([0.0], 1e3, ".2g") == "0"
    assert tables.spread([0.5, 0.5], 1, ".3f") == ".500"
    assert tables.spread([]) == ""


def test_a_table_of_tasks():
    cells = [cell("a", "W2", 0.1, tasks={"read": 0.5, "bars": 0.25}), cell("old", "W2", 0.1)]
    assert tables.table(cells, "method", "grid", "tasks").splitlines()[::2] == [
        "| | read | bars |",
        "| a | .500 | .250 |",
    ]


def test_tables_are_of_the_cells_scored_on_most_rows():
    def made(method, rows, samples, grid="W2", kl=0.1, **more):
        more |= {"rows": rows, "samples": samples, "reference": "llava_onevision"}
        return cell(method, grid, kl, **more)

    cells = [
        made("a", 64, 512, calibration="c.json"),
        made("b", 128, 64, calibration="c.json"),
        made("c", 128, 512, calibration="c.json"),
        made("d", 64, 64, "W3", calibration="c.json"),
        made(quality.FULL, 128, 0, grid="", kl=None, exact=0.7, tasks={"read": 0.6}),
    ]
    made_tables = quality.all_tables(cells)
    assert "| full precision | .700 | .700 |" in made_tables["exact llava_onevision"]
    assert "read" in made_tables["tasks W3 llava_onevision"]
    text = made_tables["kl llava_onevision"]
    assert "| c |" in text and "| d | 100 |" in text
    assert "| a |" not in text and "| b |" not in text


def test_ablations_are_held_against_their_base_on_the_same_grid_and_set():
    def made(method, kl, calibration="c.json", rotate="off"):
        key = {"calibration": calibration, "rotate": rotate, "reference": "llava_onevision"}
        return cell(method, "W2", kl, **key, kl_text=1.0, rows=128, samples=128)

    cells = [
        made("exact min-max", 0.1),
        made("exact min-max", 0.2, "d.json"),
        made("exact min-max, α 0", 0.3),
        made("exact min-max, α 0", 0.3, "d.json"),
        made("exact min-max, α 0", 9.0, "e.json"),
        made("exact min-max", 0.05, rotate="folded"),
        made("gptaq", 1.0),
    ]
    text = quality.all_tables(cells)["ablations kl llava_onevision"]
    # the ratios to the base are 3 and 1.5; on the set e.json there is no base
    assert "| 2 α: exact min-max, α 0 | 2.25 ± .75 |" in text
    assert "| 8 rotation: exact min-max, rotated | .50 |" in text and "gptaq" not in text
    assert "α" not in quality.all_tables(cells)["kl llava_onevision"]


def test_names_of_rows_may_have_commas_and_a_rotation():
    assert quality._rows("gptq,exact min-max, α 0,exact, rotated", ["off"]) == [
        ("gptq", "off"),
        ("exact min-max, α 0", "off"),
        ("exact", "folded"),
    ]
    every = quality._rows("ablations", ["off"])
    assert len(every) == len(set(every))
    bases = {"exact", "vlmq", "gptq", "gptaq-exact", "gptaq"}
    bases |= {"vlmq-paper", "vlmq-exact", "vlmq-gptq", "vlmq-l2", "vlmq-qkv"}
    assert {method for method, _ in every} == {*ablations.ABLATIONS} | bases


def test_an_ablation_is_a_method_while_it_is_measured():
    with ablations.listed("exact min-max, damping 5 %") as changes:
        assert method_named("exact min-max, damping 5 %") == ablations.BASE
        assert changes == {"damp": 0.05}
    assert "exact min-max, damping 5 %" not in METHODS
    with ablations.listed("gptq") as changes:
        assert changes == {}
    assert "gptq" in METHODS


def test_a_page_is_filled_where_it_asks_and_nowhere_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- table kl x -->\nold | table\n<!-- end -->\n"
        "after <!-- table kl x --><!-- end -->"
    )
    tables.fill(page, {"kl x": "| new |"})
    first = page.read_text()
    assert first.startswith("before\n<!-- table kl x -->\n\n| new |\n\n<!-- end -->\nafter")
    assert "old" not in first
    tables.fill(page, {"kl x": "| new |"})
    assert page.read_text() == first
    page.write_text("<!-- table kl y --><!-- end -->")
    with pytest.raises(KeyError):
        tables.fill(page, {})


def test_cells_without_a_reference_are_of_the_first_one(tmp_path):
    """Cells of files that were written before there was a second reference VLM."""
    file = tmp_path / "q.json"
    old = {"method": "gptq", "grid": "W2", "calibration": "calibration.json"}
    old |= {"samples": 512, "seed": 0, "kl": 1e-3}
    file.write_text(json.dumps([old]))
    cells = quality.read_cells(file)
    ((key, result),) = cells.items()
    assert key.reference == "qwen2_5_vl" and key.rows == 512 and result.items() >= old.items()
    quality.write_cells(file, cells)
    assert quality.read_cells(file) == cells


def test_the_page_has_the_tables_of_the_cells(tmp_path):
    page, renewed = PAGE.read_text("utf-8"), tmp_path / "page.md"
    cells = quality.read_cells(PAGE.with_suffix(".json"))
    renewed.write_text(page, "utf-8")
    tables.fill(renewed, quality.all_tables(list(cells.values())))
    command = "tools.bench.quality --out docs/quality"
    assert renewed.read_text("utf-8") == page, f"tables and cells differ: run {command}"


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packed_weights_of_compressed_tensors(bits):
    """Here each row is packed as one long number. Neither rows nor columns fill their last word."""
    rng = np.random.default_rng(bits)
    rows, columns, groups = 5, 12, 3
    codes, zeros = (rng.integers(0, 2**bits, (rows, n)) for n in (columns, groups))
    scales = rng.random((rows, groups)).astype(np.float16)

    def packed(values: np.ndarray) -> torch.Tensor:
        words = -(-values.shape[1] * bits // 32)
        streams = [sum(int(v) << bits * i for i, v in enumerate(row)) for row in values]
        raw = b"".join(stream.to_bytes(4 * words, "little") for stream in streams)
        return torch.from_numpy(np.frombuffer(raw, "<i4").reshape(len(values), words).copy())

    parts = {
        "weight_packed": packed(codes),
        "weight_zero_point": packed(zeros.T).T,
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([rows, columns]),
    }
    group = np.arange(columns) // 4
    want = (codes - zeros[:, group]).astype(np.float32) * scales.astype(np.float32)[:, group]
    assert np.array_equal(peers.decode_packed(parts, bits), want)


def test_a_peer_that_is_not_there_is_said_so(tmp_path, monkeypatch):
    monkeypatch.delenv("AUTOROUND_PYTHON", raising=False)
    with pytest.raises(RuntimeError, match="AUTOROUND_PYTHON"):
        peers.quantize("AutoRound", tmp_path, CALIBRATION, [], 2, 128, tmp_path / "out")


@pytest.mark.parametrize(
    ("reference", "group"),
    [
        ("qwen2_5_vl", 128),
        ("llava_onevision", 128),
        pytest.param("smolvlm", 64, marks=pytest.mark.slow),  # after make reference-smolvlm
    ],
)
def test_a_cell_of_each_reference(reference, group, tmp_path):
    """Rounding to nearest at two bits is worse than full precision, and has its grid's bits."""
    bench = quality.Bench(reference, 10)
    assert bench.scorer.baseline.kl == 0 and bench.scorer.baseline.agreement == 1
    assert bench.scorer.tasks == ["bars", "digits", "form", "read", "shapes"]
    key = quality.Cell("rtn", f"W2 g{group}", CALIBRATION.name, 1, reference=reference)
    result = bench.run(key, CALIBRATION, tmp_path / "a")
    assert result["bits"] == pytest.approx(2 + 18 / group) and result["kl"] > 1e-3
    assert set(result["tasks"]) == set(bench.scorer.tasks)
    # the mean of the tasks, because there are two rows of each
    assert result["exact"] == pytest.approx(np.mean(list(result["tasks"].values())))


def test_batches_give_what_single_samples_give():
    """Several rows of the second reference VLM in one batch. Its inputs have no image grid."""
    folder = quality.REFERENCES["llava_onevision"]
    rows = read_rows(HELDOUT)[:6]
    model = quality.load_model(folder, quality.source_weights(folder))
    scorer = quality.Scorer(folder, model, rows)
    preprocessor = Preprocessor(folder)
    for row, together in zip(rows, scorer.full):
        with torch.no_grad():
            logits = model(**preprocessor.sample(row).model_inputs()).logits[0]
        alone = logits.log_softmax(-1)
        assert torch.allclose(alone, together, atol=2e-4)


def test_the_first_table_has_ten_methods_on_all_references():
    def made(reference, grid, method):
        more = {"reference": reference, "rows": 64, "samples": 64, "calibration": "c.json"}
        return cell(method, grid, 0.1, kl_text=0.1, exact=0.5, bits=2, user=1, **more)

    cells = [
        made(reference, grid, method)
        for reference, grids in quality.SUMMARY_GRIDS.items()
        for grid in (*grids, "W4 g128")
        for method in (*quality.SUMMARY, "awq")
    ]
    head, _, *rows = quality.all_tables(cells)["summary"].splitlines()
    assert head.count("|") == 8 and "third, W2 g64" in head
    assert [row.split(" | ")[0][2:] for row in rows] == [*quality.SUMMARY]
