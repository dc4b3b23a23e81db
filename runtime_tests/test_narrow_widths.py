"""The command without a flag on a decoder as wide as SmolVLM-256M's, to the proof of every file."""

import json

import pytest

from tests.vlmq_export.test_narrow_widths import narrow
from tools.reference_vlm.tiny_checkpoints import SMOLVLM_256M, make_tiny
from vlmq_export.bundled import HELDOUT
from vlmq_export.pipeline import run
from vlmq_export.recipes.recipe import Recipe


@pytest.mark.parametrize(
    ("formats", "given"),
    [
        (["gptq", "onnx", "gguf"], {}),
        pytest.param(["gguf"], {}, marks=pytest.mark.slow),
        pytest.param(["gguf"], {"target_bpw": 5.6}, marks=pytest.mark.slow),
    ],
    ids=["shared", "mix", "budget"],
)
@pytest.mark.parametrize("arch", [pytest.param("idefics3", marks=pytest.mark.slow), "smolvlm"])
def test_a_default_run_is_proven(arch, formats, given, tmp_path):
    tied = arch == "smolvlm"
    model = make_tiny(tmp_path / "model", arch, shape=narrow(SMOLVLM_256M), layers=1, tied=tied)
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps(json.loads(HELDOUT.read_text("utf-8"))[:3]), "utf-8")
    recipe = Recipe(
        model=str(model),
        format=formats,
        samples=8,
        verify_data=rows,
        image_root=HELDOUT.parent,
        out=tmp_path / "out",
        **given,
    )
    result = run(recipe)
    bad = [c for c in result.parity.checks if c.status in ("failed", "not run")]
    assert result.verified and not bad, bad
