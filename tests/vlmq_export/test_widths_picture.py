"""The picture of a mixture of widths: a cell for each matrix, and a key."""

import re
from collections import Counter

from tests.vlmq_export.test_cli import call
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.quantizer.artifact.manifest import OUTER, VISION, ModuleRecord
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.report.figures import PROJECTIONS
from vlmq_export.report.widths import width_map


def record(name, layer, bits=4, kind="") -> ModuleRecord:
    return ModuleRecord(name, layer, bits, 64, False, 64, 64, False, type=kind)


def layers(count, widths) -> list[ModuleRecord]:
    """Records whose width is that of its place among `widths`, over and over."""
    names = [(i, f"model.layers.{i}.x.{p}") for i in range(count) for p in PROJECTIONS]
    return [record(name, layer, widths[i % len(widths)]) for i, (layer, name) in enumerate(names)]


def test_one_width_has_no_picture():
    same = layers(3, [4])
    assert width_map(same) is None
    assert width_map([*same, record("lm_head", 3, 8), record("visual.proj", VISION, 8)]) is None
    assert width_map([]) is None


def test_each_matrix_has_a_cell_and_each_width_a_colour():
    found = width_map([*layers(4, [2, 3, 4]), record("lm_head", 4, 8)])
    assert found is not None
    assert [k["kind"] for k in found["key"]] == ["8 bits", "4 bits", "3 bits", "2 bits"]
    cells = 4 * len(PROJECTIONS) + 1
    assert sum(k["count"] for k in found["key"]) == cells
    svg = str(found["svg"])
    assert svg.count("<rect") == cells
    for k in found["key"]:
        assert svg.count(f'fill="{k["colour"]}"') == k["count"]
    assert "layer 2, up_proj: 3 bits, 3 bits per weight" in svg
    assert "output matrix: 8 bits" in svg and ">layer 3</text>" in svg


def test_block_types_are_drawn_by_their_size_and_unknown_ones_are_not():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(3)]
    kinds = ["Q4_K", "IQ2_XS", "Q9_<b>"]
    records = [record(n, i, kind=k) for i, (n, k) in enumerate(zip(names, kinds))]
    found = width_map([*records, record("model.embed_tokens", OUTER, kind="Q6_K")])
    assert found is not None
    assert [(k["kind"], k["bits"]) for k in found["key"]] == [
        ("Q6_K", "6.5625"),
        ("Q4_K", "4.5"),
        ("IQ2_XS", "2.3125"),
    ]
    assert "Q9" not in found["svg"]


def test_many_layers_stay_on_the_page():
    found = width_map(layers(80, [2, 4]))
    assert found is not None
    width = re.search(r'viewBox="0 0 (\d+) ', found["svg"])
    assert width is not None and int(width[1]) < 1000 and "style=" not in found["svg"]


def test_the_report_of_a_mixture_shows_it(tmp_path):
    model = make_random_checkpoint(tmp_path / "model", layers=2, depth=3)
    given = (model, "--format", "gguf", "--target-bpw", 4.8, "--method", "gptq", "--samples", 4)
    floats = ("--vision-bits", "off", "--no-verify", "--quiet")
    code, _, err = call(*given, *floats, "--out", tmp_path / "out")
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "<h2>Bits of each matrix</h2>" in page and "Chosen by what each width" in page
    assert page.count("<rect") == 15  # 14 linears, and the embedding
    records = Artifact(tmp_path / "out" / "artifact").manifest.modules
    for kind, count in Counter(record.type for record in records).items():
        assert f"{count} linears {kind} (" in page  # of the types that were chosen
