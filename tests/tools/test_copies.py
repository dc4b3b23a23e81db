"""What the benches give to peers: the decoder alone, and samples in batches."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from tools.bench.peers.peers import write_decoder
from tools.bench.peers.run_autoround import AT_ONCE, batches_of
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.rotation import rotated


def test_a_rotated_decoder_has_its_own_output_matrix(tmp_path):
    source = Checkpoint(make_tiny(tmp_path / "model", "idefics3"))
    ids, logits = torch.arange(1, 9)[None], []
    for rotate in ("off", "folded"):
        folder = tmp_path / rotate
        write_decoder(rotated(source, rotate, seed=0), folder)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-2, rtol=1e-2)


def test_samples_are_filled_behind_what_they_say():
    samples = [
        {
            "input_ids": torch.full((1, length), 5),
            "attention_mask": torch.ones(1, length, dtype=torch.long),
            "pixel_values": torch.full((1, 2), float(length)),
        }
        for length in range(3, 3 + AT_ONCE + 1)
    ]
    first, last = batches_of(samples, 7)
    assert first["input_ids"].shape == (AT_ONCE, 3 + AT_ONCE) and len(last["input_ids"]) == 1
    assert first["input_ids"][0].tolist() == [5] * 3 + [7] * AT_ONCE
    assert bool(first["attention_mask"].all())
    assert first["pixel_values"][:, 0].tolist() == list(range(3, 3 + AT_ONCE))
