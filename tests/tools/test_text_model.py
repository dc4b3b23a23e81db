"""The bench of a language model alone runs, with every kind of row that it takes."""

import json
import sys

import pytest

from tools.bench import text_model
from tools.reference_vlm.tiny_checkpoints import make_tiny


@pytest.mark.parametrize("method", ["rtn", "vlmq"])
def test_a_row_is_one_line_of_json(method, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text_model, "BUILT", make_tiny(tmp_path / "model", "idefics3"))
    monkeypatch.setattr(text_model, "SAMPLES", 8)
    monkeypatch.setattr(text_model, "TOKENS", 24)
    monkeypatch.setattr(text_model, "EVERY", 40)
    flags = ["--layers", "2", "--bits", "3", "--group", "16", "--method", method]
    monkeypatch.setattr(sys, "argv", ["text_model", *flags])
    text_model.main()
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == method and 0 < told["kl"] < 10
