"""How much worse a model is than its source: the measurement, its verdict, and where it is said."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, edit, rtn_artifact
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.callbacks import Callbacks
from vlmq_export.cli import _present
from vlmq_export.errors import FormatError, Interrupted
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.planning.run_plan import plan_run
from vlmq_export.proving import beside_source
from vlmq_export.proving.beside_source import _examples, float_source, measure, shown
from vlmq_export.proving.fidelity import Example, Fidelity, mean_over_tokens, verdict
from vlmq_export.proving.verify import _fidelity as fidelity_of
from vlmq_export.proving.verify import describe
from vlmq_export.quantizer.calibration.divergence import Distance
from vlmq_export.quantizer.samples.rows import Row, read_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.recipes.recipe_file import RECIPE_FILE
from vlmq_export.result import Result

CPU = torch.device("cpu")
ROWS = read_rows(HELDOUT)[:6]
ASKED = [replace(row, messages=row.messages[:-1]) for row in ROWS[:3]]  # rows without an answer


def compared(artifact, source, tmp_path, rows=ROWS, memory=None, callbacks=None):
    reference = Reference(artifact.path, rows, memory=memory)
    scratch = tmp_path / "scratch"
    found = measure(reference, source, "", CPU, scratch, callbacks or Callbacks())
    assert not scratch.exists()
    return found, reference


def decoded_source(artifact, folder, **changed):
    """A float checkpoint whose weights are what the artifact decodes to, some of them changed."""
    folder.mkdir()
    for file in artifact.source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    held = {
        name: torch.from_numpy(np.array(array)) for name, array in Weights(artifact.path).items()
    }
    for name, by in changed.items():
        held[name.replace("__", ".")][0] += by
    save_file(held, folder / "model.safetensors")
    return folder


# -- the figures -----------------------------------------------------------------------------------


def test_a_model_is_as_good_as_itself_whatever_its_settings_ask_of_its_answers(artifacts, tmp_path):
    """A repetition penalty in the source's settings would change the answers of one side alone."""
    artifact = artifacts("w4g128")
    source = decoded_source(artifact, tmp_path / "model")
    edit(source / "generation_config.json", lambda c: c.update(repetition_penalty=9.0))
    found, _ = compared(artifact, source, tmp_path)
    assert (found.kl, found.agreement, found.changed) == (0.0, 1.0, 0)
    assert (found.kl_error, found.agreement_error, found.answers) == (0.0, 0.0, len(ROWS))
    assert found.verdict == "close"


def test_one_changed_weight_moves_it(artifacts, tmp_path):
    artifact = artifacts("w4g128")
    name = "model__layers__3__mlp__down_proj__weight"
    source = decoded_source(artifact, tmp_path / "model", **{name: 0.5})
    found, _ = compared(artifact, source, tmp_path)
    assert found.kl is not None and found.kl > 1e-6


@torch.no_grad()
def test_the_figures_are_those_of_two_whole_models(artifacts, tmp_path):
    import transformers

    found, reference = compared(artifacts("w2g128"), REFERENCE_VLM, tmp_path)
    full = transformers.AutoModelForImageTextToText.from_pretrained(
        REFERENCE_VLM, dtype=torch.float32
    ).eval()
    kl, same = [], []
    for row in reference.rows:
        sample = reference.preprocessor.sample(row)
        p, q = (
            m(**sample.model_inputs(), use_cache=False)
            .logits[0, :-1][sample.answer[1:]]
            .double()
            .log_softmax(-1)
            for m in (full, reference.model)
        )
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append((p.argmax(-1) == q.argmax(-1)).double())
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert found.agreement == pytest.approx(float(torch.cat(same).mean()), abs=1e-12)
    assert found.tokens == len(torch.cat(kl)) and found.rows == len(ROWS)
    assert found.kl is not None and found.kl > 1e-3
    worst = found.examples[0]
    assert worst.id in {row.id for row in ROWS} and worst.full is not None
    others = [e.kl for e in found.examples if e.changed == worst.changed]
    assert others == sorted(others, reverse=True)


def test_rows_of_text_alone_count_and_rows_without_an_answer_have_greedy_ones(artifacts, tmp_path):
    text = tuple(
        {**m, "content": [{"type": "text", "text": "Two and two"}]} for m in ROWS[0].messages
    )
    found, _ = compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path, [Row("t", text, ()), *ASKED])
    assert found.rows == found.answers == 4 and found.tokens > 0
    assert found.kl_error is None  # one row with an answer gives no error
    found, _ = compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path, ASKED)
    assert found.kl is None and found.agreement is None and found.tokens == 0
    assert found.answers == 3 and found.measured and found.verdict != "unknown"


def test_a_model_too_large_for_the_memory_has_figures_without_greedy_answers(artifacts, tmp_path):
    small = compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path, memory=10**6)
    roomy = compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path)
    (found, reference), (expected, _) = small, roomy
    assert (found.kl, found.agreement) == (
        expected.kl,
        expected.agreement,
    )  # bit for bit, from disk
    assert found.answers is found.changed is None
    assert "GB for whole models" in found.answers_not_run
    assert "model" not in vars(reference)  # it was never loaded
    assert found.sentence().endswith(found.answers_not_run)
    assert all(e.full is e.quantized is e.changed is None for e in found.examples)


def test_rows_that_are_too_long_are_left_out_and_counted(artifacts, tmp_path, monkeypatch):
    reference = Reference(artifacts("w4g128").path, ROWS)
    lengths = sorted(len(reference.preprocessor.sample(row).input_ids) for row in ROWS)
    monkeypatch.setattr(beside_source, "LONGEST", lengths[2])
    found, _ = compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path)
    kept = sum(n <= lengths[2] for n in lengths)
    assert (found.rows, found.left_out) == (kept, len(ROWS) - kept)
    monkeypatch.setattr(beside_source, "LONGEST", 3)
    found, _ = compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path)
    assert not found.measured and "over 3 tokens" in found.not_measured


def test_what_cannot_be_measured_is_no_zero_and_names_no_place(artifacts, tmp_path):
    artifact = artifacts("w4g128")
    source = decoded_source(artifact, tmp_path / "model")
    name = "model.layers.0.mlp.down_proj.weight"
    held = load_file(source / "model.safetensors")
    save_file({**held, name: torch.full_like(held[name], 3e38)}, source / "model.safetensors")
    found, _ = compared(artifact, source, tmp_path)
    assert not found.measured and "not finite" in found.not_measured
    (source / "model.safetensors").write_bytes(b"no weights")
    found, _ = compared(artifact, source, tmp_path)
    assert not found.measured and found.kl is found.agreement is found.changed is None
    assert found.verdict == "unknown" and str(tmp_path) not in found.not_measured


def test_a_stop_is_heard_between_two_layers(artifacts, tmp_path):
    told = []
    calls = Callbacks(lambda *step: told.append(step), lambda: len(told) >= 2)
    with pytest.raises(Interrupted, match="the files are written"):
        compared(artifacts("w4g128"), REFERENCE_VLM, tmp_path, callbacks=calls)
    assert [step[:2] for step in told] == [("fidelity", 1), ("fidelity", 2)]


def test_a_standard_error_is_over_rows():
    assert mean_over_tokens([], []) == mean_over_tokens([0.0], [0]) == (None, None)
    assert mean_over_tokens([3.0, 0.0], [2, 0]) == (1.5, None)
    draw = np.random.default_rng(0)
    rows = draw.normal(2, 1, 40)
    mean, error = mean_over_tokens((5 * rows).tolist(), [5] * 40)  # equal counts: of plain means
    assert mean == pytest.approx(rows.mean())
    assert error == pytest.approx(rows.std(ddof=1) / 40**0.5)
    counts = draw.integers(1, 9, 60)
    sums = counts * draw.normal(1, 0.5, 60)
    drawn = [draw.integers(0, 60, 60) for _ in range(4000)]
    spread = np.std([sums[i].sum() / counts[i].sum() for i in drawn])
    _, error = mean_over_tokens(sums.tolist(), counts.tolist())
    assert error == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize(
    ("agreement", "equal", "says"),
    [
        (0.99, 0.99, "close"),
        (0.99, 0.5, "far"),
        (0.99, 0.8, "worse"),
        (0.95, 0.99, "worse"),
        (0.8, 1.0, "far"),
        (None, 0.99, "close"),
        (0.99, None, "close"),
        (float("nan"), 0.99, "far"),
        (None, None, "unknown"),
    ],
)
def test_the_worse_of_two_figures_decides(agreement, equal, says):
    assert verdict(agreement, equal) == says


def test_the_worst_rows_are_shown_whatever_they_are_and_others_down_to_the_best():
    assert shown(3, 3) == [0, 1, 2] and shown(0, 3) == []
    assert shown(29, 3) == [9, 19, 28]
    assert all(len(set(shown(n, 3))) == 3 and shown(n, 3)[-1] == n - 1 for n in range(4, 99))
    rows = [replace(row, images=()) if i % 2 else row for i, row in enumerate(ROWS * 4)]
    reference = SimpleNamespace(
        rows=rows,
        preprocessor=SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda *_, **__: "x")),
    )
    worth = torch.rand(len(rows), generator=torch.Generator().manual_seed(0)).double()
    same, token = torch.tensor([True]), torch.tensor([1])
    distances = {i: Distance(worth[i : i + 1], same, token) for i in range(len(rows))}
    answers = {i: ([1], [1]) for i in distances} | {5: ([1], [2])}
    found = _examples(reference, distances, answers)  # pyright: ignore[reportArgumentType]
    by_kl = [i for i in worth.argsort(descending=True).tolist() if i != 5]
    assert [e.row for e in found[:3]] == [5, *by_kl[:2]]  # row 5 has no image, and changed
    assert len(found) == 6 and all(rows[e.row].images for e in found[3:])
    assert found[-1].row == [i for i in by_kl if rows[i].images][-1]


# -- where the source is ---------------------------------------------------------------------------


def test_the_source_is_found_or_it_is_said_why_not(artifacts, tmp_path, model):
    artifact = artifacts("w4g128")
    assert float_source(None, REFERENCE_VLM, artifact) == (REFERENCE_VLM, "")
    folder, why = float_source(str(tmp_path / "gone"), None, artifact)
    assert folder is None and "not at hand any more" in why
    edit(model / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    folder, why = float_source(str(model), model, artifact)
    assert folder is None and "GPTQ checkpoint" in why


def test_the_recipe_beside_an_artifact_leads_to_its_source(tmp_path):
    artifact = rtn_artifact(tmp_path / "run" / "artifact", GRIDS["w4g128"])
    folder, why = float_source(str(artifact.path), None, artifact)
    assert folder is None and "MODEL is an artifact" in why
    recipe = tmp_path / "run" / RECIPE_FILE
    recipe.write_text(Recipe(format=["gguf"]).to_yaml())
    assert float_source(str(artifact.path), None, artifact) == (REFERENCE_VLM, "")
    recipe.write_text(Recipe(format=["gguf"], model=str(tmp_path)).to_yaml())  # another model
    assert float_source(str(artifact.path), None, artifact)[0] is None


@pytest.mark.parametrize(
    ("changed", "kept"),
    [([], True), (["gguf/x.gguf (changed)"], True), (["fidelity.json (changed)"], False),
     (["artifact/layer-00000.safetensors (changed)"], False), (None, False)],
)  # fmt: skip
def test_earlier_figures_stay_where_the_source_is_gone_and_the_artifact_is_the_same(
    artifacts, tmp_path, changed, kept
):
    artifact, recipe = artifacts("w4g128"), Recipe(format=[], model=str(tmp_path / "gone"))
    (tmp_path / "artifact").symlink_to(artifact.path)
    FAR.write(tmp_path / "fidelity.json")
    reference = Reference(artifact.path, ROWS)
    found = fidelity_of(tmp_path, recipe, reference, None, Callbacks(), changed)
    assert found.measured == kept and "not at hand" in found.not_again + found.not_measured
    if kept:
        assert found == replace(FAR, not_again=found.not_again)


# -- where it is said ------------------------------------------------------------------------------

FAR = Fidelity(
    rows=2,
    tokens=9,
    kl=0.4,
    kl_error=0.1,
    agreement=0.81,
    agreement_error=0.04,
    answers=2,
    changed=1,
    verdict="far",
    examples=[
        Example(1, ROWS[1].id, "<b>What?</b>", "x", 0.7, "a circle", "a <i>square", True),
        Example(0, "another row", "Which?", "", 0.1, "two", "two", False),
    ],
)


def test_it_is_written_and_read(tmp_path):
    FAR.write(tmp_path / "fidelity.json")
    assert Fidelity.read(tmp_path / "fidelity.json") == FAR
    for key, value in (("kl", "low"), ("examples", [{"row": 1}]), ("rows", None), ("answers", [])):
        raw = asdict(FAR) | {key: value}
        (tmp_path / "fidelity.json").write_text(json.dumps(raw))
        with pytest.raises(FormatError, match="cannot be read as a fidelity report"):
            Fidelity.read(tmp_path / "fidelity.json")


def result_with(fidelity, tmp_path, artifact):
    """A result and the two pages that are written of it."""
    out = tmp_path / "out"
    (out / "artifact").parent.mkdir(exist_ok=True)
    if not (out / "artifact").exists():
        (out / "artifact").symlink_to(artifact.path)
    result = Result(out, plan_run(artifact_plan(artifact), Recipe(format=[])), fidelity=fidelity)
    describe(out, Recipe(format=[]), result, ROWS)
    return result, (out / "report.html").read_text(), (out / "README.md").read_text()


def test_it_comes_first_in_report_card_and_json(artifacts, tmp_path, capsys):
    result, report, card = result_with(FAR, tmp_path, artifacts("w4g128"))
    body = report[report.index("<body>") :]
    assert body.index("far from the source") < body.index("not verified") < body.index("Files")
    assert '<p class="verdict far">' in body and "1 of 2 answers changed" in body
    assert "&lt;b&gt;What?" in body and "a &lt;i&gt;square" in body and "<i>square" not in body
    assert body.count("data:image/jpeg") == 1  # the other row is no longer at hand
    lines = card[card.index("\n# ") :].split("\n\n")
    assert lines[1].startswith("**Far from the source:** 81.0 % ± 4.0 of 9 answer tokens agree")
    assert _present(result, True, 0) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told).index("fidelity") + 1 == list(told).index("parity")
    assert told["fidelity"]["agreement"] == 0.81
    assert _present(result, False, 0) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("far from the source: agreement 81.0 %, KL 0.4, 1 of 2")


def test_it_looks_other_where_the_model_is_close_and_where_nothing_was_measured(
    artifacts, tmp_path
):
    near = replace(FAR, agreement=0.99, changed=0, verdict="close", examples=[])
    _, report, card = result_with(near, tmp_path, artifacts("w4g128"))
    assert '<p class="verdict close">close to the source' in report
    assert "**Close to the source:** 99.0 %" in card
    unknown = Fidelity(not_measured="the source is a GPTQ checkpoint")
    _, report, card = result_with(unknown, tmp_path, artifacts("w4g128"))
    assert '<p class="verdict unknown">fidelity not measured' in report and "0.0 %" not in report
    assert "**Fidelity to the source not measured:** the source is a GPTQ" in card
    _, report, card = result_with(None, tmp_path, artifacts("w4g128"))
    assert "fidelity not measured: the proof was not run" in report
    assert "**Fidelity to the source not measured:** the proof was not run." in card
