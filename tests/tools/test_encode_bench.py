"""The bench of a quantized tower, on a small one."""

import json

import pytest

from tools.bench import encode


@pytest.mark.slow
def test_every_width_is_encoded_by_both_runtimes(monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "SIGLIP", {"image_size": encode.SIDE})
    monkeypatch.setattr(encode, "DEPTH", 1)
    found = encode.measured(encode.TOWERS[1], tmp_path, rounds=1)
    assert {runtime: list(by_bits) for runtime, by_bits in found.items()} == {
        "mtmd": [16, 8, 6, 4],
        "ONNX Runtime": [16, 8, 4],
    }
    assert all(seconds > 0 for by_bits in found.values() for seconds in by_bits.values())


def test_the_towers_have_published_widths(tmp_path):
    widths = []
    for tower in encode.TOWERS:
        config = json.loads((tower.make(tmp_path / tower.name) / "config.json").read_text())
        vision = config["vision_config"]
        widths.append((vision["hidden_size"], vision["intermediate_size"]))
    assert widths == [(1280, 3420), (1152, 4304)]
