"""The plans of published shapes that docs/scale.md shows."""

import json

from tools.docs import plans
from vlmq_export import Recipe, plan


def test_a_published_shape_is_planned_without_its_weights(tmp_path):
    model = plans.checkpoint(tmp_path, "qwen3_vl")
    found = plan(Recipe(model=str(model), format=["gguf"]))
    assert not found.refusals
    text = found.model.architecture.text
    assert (text["hidden_size"], found.model.architecture.layers) == (2560, 36)
    assert 2.5e9 < found.formats["gguf"].size_bytes < 3e9
    assert (model / "model.safetensors").stat().st_blocks * 512 < 2**20


def test_every_shape_changes_what_a_small_one_says(tmp_path):
    for name, (repository, sizes) in plans.PUBLISHED.items():
        own = json.loads((plans.make_tiny(tmp_path / name, name) / "config.json").read_text())
        assert repository and sizes.keys() <= own.keys()
        for part in ("text_config", "vision_config"):
            assert sizes[part].keys() <= own[part].keys()
